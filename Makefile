# Everything a contributor runs. One target directory serves all of it.

.PHONY: test bench lint fmt servers fuzz

# All tests: the binary that the system tests start, the servers and clients they talk to, then every crate.
test: servers
	cargo build --locked -p baton
	cargo test --locked --workspace

# A real etcd and the clients that people use, once, into the checkout.
servers:
	tests/servers/install.sh

# The figures of this machine and of Baton on it: a table, and target/bench.jsonl. `make bench ONLY=engine` measures a part.
bench:
	cargo run --locked --release -p baton -- bench $(if $(ONLY),--only $(ONLY)) \
		$(if $(wildcard .test-servers/ucx/lib/libucp.so.0),--ucx-library .test-servers/ucx/lib/libucp.so.0)

# What reads models from disk and what peers, models and clients say, each for ten minutes; wants `cargo install cargo-fuzz`. Stable Rust does: coverage guides without a sanitizer.
FUZZ_SECONDS ?= 600
fuzz:
	for target in $(or $(ONLY),safetensors_index gguf tokenizer frames tool_parsers templates chat_bodies grpc_bodies); do \
		mkdir -p fuzz/corpus/$$target && \
		cargo fuzz run --sanitizer none $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -max_len=65536 || exit 1; \
	done

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
	else echo "lint: cargo-deny is not installed, licences and sources are not checked"; fi

fmt:
	cargo fmt --all
