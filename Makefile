# Everything a contributor runs. One target directory serves all of it.

.PHONY: test bench lint fmt servers

# All tests: the binary that the system tests start, the servers and clients they talk to, then every crate.
test: servers
	cargo build --locked -p baton
	cargo test --locked --workspace

# A real etcd and the official OpenAI client, once, into the checkout.
servers:
	tests/servers/install.sh

# The figures of this machine and of Baton on it: a table, and target/bench.jsonl. `make bench ONLY=engine` measures a part.
bench:
	cargo run --locked --release -p baton -- bench $(if $(ONLY),--only $(ONLY))

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
	else echo "lint: cargo-deny is not installed, licences and sources are not checked"; fi

fmt:
	cargo fmt --all
