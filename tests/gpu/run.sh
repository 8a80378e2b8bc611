#!/bin/sh
# What a card computes and how fast, for the day there is one: recorded references and batch invariance on the card, then prefill and decode
# beside the card's own limits. Takes a few minutes; prints JSON, one object a line, and fails when anything differs from what it should be.
#
#     tests/gpu/run.sh [CARD] [FILE]      the card's number (0), and where the lines go as well (target/gpu.jsonl)
#
# BATON_NVRTC_LIBRARY names NVRTC's library where the system's loader does not know it (PyPI: nvidia-cuda-nvrtc). Where python3 has PyTorch, the
# limits come from it.
set -eu

cd "$(dirname "$0")/../.."
card=${1:-0}
to=${2:-target/gpu.jsonl}
mkdir -p "$(dirname "$to")"
: >"$to"

say() { printf '%s\n' "$1" | tee -a "$to"; }

command -v nvidia-smi >/dev/null || { echo "run: nvidia-smi is missing: this machine has no card of NVIDIA" >&2; exit 1; }
name=$(nvidia-smi --id="$card" --query-gpu=name,driver_version --format=csv,noheader)
say "{\"card\": \"$name\", \"commit\": \"$(git rev-parse --short HEAD 2>/dev/null || echo unknown)\", \"date\": \"$(date -u +%FT%TZ)\"}"

BATON_CARD=$card cargo test --release -p engine --lib -- --ignored on_a_card
say '{"tests": "passed"}'

if python3 -c 'import torch' 2>/dev/null; then
    python3 tests/gpu/limits.py "$card" | tee -a "$to"
fi
cargo run --release -p engine --example card -- "cuda:$card" ${BATON_NVRTC_LIBRARY:+"$BATON_NVRTC_LIBRARY"} | tee -a "$to"
