#!/usr/bin/env bash
# Tensor parallelism over two GPUs or more, by NCCL: tokens of T = 2 against those of T = 1, a model
# rank that is killed and the job resumed, then step times of a Llama-3.1-8B-shaped model.
#
#   tools/gpu_tensor_parallel.sh [MODEL]     default: the model of tools/demo.sh
# PASSEL names a binary to use instead of building one, DECODE and RANKS_TEST those of gpu_decode and
# cuda_ranks_test (without them: those built, where they are); RUN a directory for results; BIG a
# directory of tools/make_random_model.py (made where it is not there); CONTEXTS the bench's with
# host ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/lib.sh

model=${1:-.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf}
passel=${PASSEL:-build/release/passel}
if [[ -z ${PASSEL:-} ]]; then build release passel; fi
run=${RUN:-build/gpu_tensor_parallel}
big=${BIG:-$run/model}
rm -rf "$run"
mkdir -p "$run"
if [[ ! -f $big/config.json ]]; then
  python3 tools/make_random_model.py "$big" &
  making=$!
fi
python3 - "$run/in.jsonl" <<'PY'
import json, sys
with open(sys.argv[1], "w") as out:
    for i in range(8):
        prompt = f"Chapter {i}. The keeper of the lighthouse wrote down what he saw: " * (3 + 4 * i)
        out.write(json.dumps({"custom_id": f"r{i}", "body": {
            "prompt": prompt, "max_tokens": 96, "temperature": 0, "ignore_eos": True,
            "logprobs": 2, "return_token_ids": True}}) + "\n")
PY

# NAME RANKS MODEL_RANKS SETTINGS…
one() {
  local name=$1 ranks=$2 parallel=$3 settings=() input=${INPUT:-$run/in.jsonl}
  shift 3
  for setting in "$@"; do settings+=(--set "$setting"); done
  echo "== $name"
  local_mpirun -np "$ranks" "$passel" run --config configs/local.textproto \
    --set model.path="$model" --set gpu.backend=CUDA --set cluster.model_ranks="$parallel" \
    "${settings[@]}" -i "$input" -o "$run/$name.jsonl" --run-dir "$run/$name" \
    2> >(tee "$run/$name.log" >&2)
}
by_nccl() {
  grep -q "model ranks over NCCL" "$run/$1.log" || {
    echo "$1: NCCL was not used" >&2
    exit 1
  }
}

one t1 1 1
one t2 2 2 && by_nccl t2
one t2_full 4 2 attention.estimator=FULL attention.exact_below=0 attention.no_dense_layers=true &&
  by_nccl t2_full
python3 tools/gpu_compare.py "$run"/{t1,t2,t2_full}.jsonl

echo "== a model rank is killed"
sed 's/"max_tokens": 96/"max_tokens": 2000/' "$run/in.jsonl" >"$run/long.jsonl"
local_mpirun -np 2 "$passel" run --config configs/local.textproto --set model.path="$model" \
  --set gpu.backend=CUDA --set cluster.model_ranks=2 --set engine.max_batch=2 \
  -i "$run/long.jsonl" -o "$run/killed.jsonl" --run-dir "$run/killed" 2>"$run/killed.log" &
job=$!
until grep -q request_done "$run/killed/events.jsonl" 2>/dev/null; do
  kill -0 "$job" || break
  sleep 0.2
done
kill -9 "$(python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))[1]["pid"])' \
  "$run/killed/ranks.json")"
start=$SECONDS
code=0
wait "$job" || code=$?
echo "ended with $code after $((SECONDS - start)) s; $(wc -l <"$run/killed.jsonl") results kept"
grep -v tokens/s "$run/killed.log" | head -20
local_mpirun -np 2 "$passel" run --config configs/local.textproto --set model.path="$model" \
  --set gpu.backend=CUDA --set cluster.model_ranks=2 --resume \
  -i "$run/long.jsonl" -o "$run/killed.jsonl" --run-dir "$run/resumed"
echo "resumed: $(wc -l <"$run/killed.jsonl") results"

if [[ -n ${making:-} ]]; then wait "$making"; fi
head -n 2 "$run/in.jsonl" >"$run/two.jsonl"
INPUT=$run/two.jsonl model=$big one big_t1 1 1
INPUT=$run/two.jsonl model=$big one big_t2 2 2 && by_nccl big_t2
python3 tools/gpu_compare.py "$run"/big_{t1,t2}.jsonl
# NAME RANKS MODEL_RANKS CONTEXTS BATCHES SETTINGS…
measure() {
  local name=$1 ranks=$2 parallel=$3 contexts=$4 batches=$5 settings=()
  shift 5
  for setting in "$@"; do settings+=(--set "$setting"); done
  echo "== $name"
  local_mpirun -np "$ranks" "$passel" bench --set model.path="$big" --set gpu.backend=CUDA \
    --set cluster.model_ranks="$parallel" "${settings[@]}" --context "$contexts" \
    --batch "$batches" --new-tokens 64
}
measure t1 1 1 1024 1,32
measure t2 2 2 1024 1,32
measure t1_hosts 5 1 "${CONTEXTS:-16384}" 1,4 host.threads=4
measure t2_hosts 6 2 "${CONTEXTS:-16384}" 1,4 host.threads=4

# What the ranks sum against float64, and the step alone.
ranks_test=${RANKS_TEST:-build/release/tests/gpu/cuda_ranks_test}
if [[ -x $ranks_test ]]; then local_mpirun -np 2 "$ranks_test"; fi
decode=${DECODE:-build/release/tools/bench/gpu_decode}
if [[ -x $decode ]]; then
  for ranks in 1 2; do local_mpirun -np "$ranks" "$decode" | grep -E 'step|sums|;'; done
fi
