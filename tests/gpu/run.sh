#!/bin/bash
# What a card computes and how fast, for the day there is one: recorded references and batch invariance on the card, then prefill and decode
# beside the card's own limits. Takes a few minutes; prints JSON, one object a line, and fails when anything differs from what it should be.
#
#     tests/gpu/run.sh [CARD] [FILE]      the card's number (0), and where the lines go as well (target/gpu/lines.jsonl)
#     tests/gpu/run.sh build              only builds what it runs, target/gpu/tests and target/gpu/card: carried along with the repository
#                                         they run on a machine without Rust
#
# BATON_NVRTC_LIBRARY names NVRTC's library where the system's loader does not know it (PyPI: nvidia-cuda-nvrtc), and BATON_CUBLASLT_LIBRARY that of
# cuBLASLt (nvidia-cublas), with which everything is measured again: --exact off. Where python3 has PyTorch, the limits come from it.
set -euo pipefail

cd "$(dirname "$0")/../.."
mkdir -p target/gpu
if command -v cargo >/dev/null; then
    cargo build --release -p engine --example card
    tests=$(cargo test -p engine --lib --no-run 2>&1 | tee /dev/stderr | sed -n 's/.*Executable.*(\(.*\))$/\1/p')
    strip -o target/gpu/card target/release/examples/card
    strip -o target/gpu/tests "$tests"
fi
[ "${1:-}" != build ] || exit 0

card=${1:-0}
to=${2:-target/gpu/lines.jsonl}
: >"$to"

say() { printf '%s\n' "$1" | tee -a "$to"; }

command -v nvidia-smi >/dev/null || { echo "run: nvidia-smi is missing: this machine has no card of NVIDIA" >&2; exit 1; }
name=$(nvidia-smi --id="$card" --query-gpu=name,driver_version --format=csv,noheader)
say "{\"card\": \"$name\", \"commit\": \"$(git rev-parse --short HEAD 2>/dev/null || echo unknown)\", \"date\": \"$(date -u +%FT%TZ)\"}"

CARGO_MANIFEST_DIR=$PWD/engine BATON_CARD=$card target/gpu/tests --ignored on_a_card
say '{"tests": "passed"}'

if python3 -c 'import torch' 2>/dev/null; then
    python3 tests/gpu/limits.py "$card" | tee -a "$to"
fi
for exact in on off; do
    target/gpu/card "cuda:$card" "$exact" "${BATON_NVRTC_LIBRARY:-}" "${BATON_CUBLASLT_LIBRARY:-}" | tee -a "$to"
done
