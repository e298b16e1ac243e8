#!/usr/bin/env bash
# Times the 8B shape (random weights) end to end on one GPU: alone, then with host ranks that sample.
#
#   tools/gpu_bench.sh [CONTEXTS [BATCHES [HOST_RANKS]]]      default: 16384,98304 1,4 3
# PASSEL names a binary to use instead of building one; MODEL a directory for the weights (16 GB).
# THREADS: attention threads of a host rank (default 4). NEW: tokens to generate (default 48). SET: further settings, "a=1 b=2".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/lib.sh

contexts=${1:-16384,98304} batches=${2:-1,4} hosts=${3:-3}
passel=${PASSEL:-build/release/passel}
if [[ -z ${PASSEL:-} ]]; then build release passel; fi
model=${MODEL:-build/random_model}
if [[ ! -f $model/config.json ]]; then python3 tools/make_random_model.py "$model"; fi

# RANKS SETTINGS…
bench() {
  local ranks=$1 settings=()
  shift
  for setting in gpu.backend=CUDA engine.prefill_chunk=2048 "$@" ${SET:-}; do settings+=(--set "$setting"); done
  local_mpirun -np "$ranks" "$passel" bench --config configs/local.textproto \
    --set model.path="$model" "${settings[@]}" \
    --context "$contexts" --batch "$batches" --new-tokens "${NEW:-48}"
}
echo "== the GPU alone"
bench 1
echo "== with $hosts host ranks"
bench $((hosts + 1)) cluster.placement=HEAD attention.k=10 attention.l=150 \
  host.block_tokens=49152 host.threads="${THREADS:-4}"
