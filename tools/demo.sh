#!/usr/bin/env bash
# Installs, builds, fetches SmolLM2-135M-Instruct and lets it answer three prompts, one of them of
# over 4,000 tokens, with the KV cache and the LSH tables spread over two host ranks.
#
#   tools/demo.sh [--set attention.estimator=FULL]…   extra arguments go to `passel run`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/lib.sh

./tools/setup.sh
mkdir -p build
echo "demo: building (log: build/demo-build.log)"
build release passel >build/demo-build.log 2>&1 || {
  tail -n 40 build/demo-build.log >&2
  exit 1
}

prompts=tools/demo_prompts/prompts.jsonl
run=build/demo
rm -rf "$run"
mkdir -p "$run"
command=(build/release/passel run --config configs/local.textproto
  --set model.path=.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf
  -i "$prompts" -o "$run/out.jsonl" --run-dir "$run" "$@")
echo "demo: 1 model rank, 2 host ranks: mpirun -np 3 ${command[*]}"
local_mpirun -np 3 "${command[@]}"
python3 tools/show_run.py "$run/out.jsonl" "$run/summary.json" --prompts "$prompts"
