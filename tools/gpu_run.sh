#!/usr/bin/env bash
# Runs the demo prompts with the model rank on a GPU and holds the tokens to the CPU backend's:
# the GPU alone, with two host ranks (exact, then sampled), and two tensor-parallel ranks on it.
#
#   tools/gpu_run.sh [MODEL]     default: the model of tools/demo.sh
# PASSEL names a binary to use instead of building one; RUN a directory for results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/lib.sh

model=${1:-.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf}
passel=${PASSEL:-build/release/passel}
if [[ -z ${PASSEL:-} ]]; then build release passel; fi
run=${RUN:-build/gpu_run}
rm -rf "$run"
mkdir -p "$run"
python3 - tools/demo_prompts/prompts.jsonl "$run/in.jsonl" <<'PY'
import json, sys
with open(sys.argv[1]) as source, open(sys.argv[2], "w") as out:
    for line in source:
        request = json.loads(line)
        body = request.get("body", request)
        chat = "messages" in body
        body.update(temperature=0, max_tokens=48, return_token_ids=True, ignore_eos=True,
                    **({"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}))
        out.write(json.dumps(request) + "\n")
PY

# NAME RANKS SETTINGS…
one() {
  local name=$1 ranks=$2 settings=()
  shift 2
  for setting in "$@"; do settings+=(--set "$setting"); done
  echo "gpu_run: $name"
  local_mpirun -np "$ranks" "$passel" run --config configs/local.textproto \
    --set model.path="$model" "${settings[@]}" -i "$run/in.jsonl" -o "$run/$name.jsonl" \
    --run-dir "$run/$name"
}
hosts=(attention.exact_below=0 attention.no_dense_layers=true host.block_tokens=1024)
one cpu_alone 1 gpu.backend=CPU
one gpu_alone 1 gpu.backend=CUDA
one gpu_full 3 gpu.backend=CUDA attention.estimator=FULL "${hosts[@]}"
one gpu_two_ranks 2 gpu.backend=CUDA cluster.model_ranks=2
one cpu_lsh 3 gpu.backend=CPU
one gpu_lsh 3 gpu.backend=CUDA
python3 tools/gpu_compare.py "$run"/{cpu_alone,gpu_alone,gpu_full,gpu_two_ranks}.jsonl
python3 tools/gpu_compare.py --error 0.5 "$run"/{cpu_lsh,gpu_lsh}.jsonl
