#!/usr/bin/env bash
# Builds the CUDA device and its tests alone (CUDA toolkit and GoogleTest suffice) and runs them.
# Usage: tools/gpu_test.sh [BUILD_DIR] [GoogleTest arguments]
# CHECK=memcheck or racecheck runs them under compute-sanitizer. ARCH: as in nvcc -arch (default: this GPU's).
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/gpu_test}
shift || true
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
mkdir -p "$build"
objects=()
pids=()
nccl=()
if echo '#include <nccl.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1; then
  nccl=(-DPASSEL_NCCL tests/gpu/nccl_test.cpp gpu/cuda/nccl_collectives.cpp)
fi
cudnn=()
if echo '#include <cudnn.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1 && [[ -d .deps/cudnn_frontend ]]; then
  cudnn=(-DPASSEL_CUDNN -I.deps/cudnn_frontend/include gpu/cuda/cudnn_attention.cpp)
fi
for source in gpu/cuda/*.cu $(ls gpu/cuda/*.cpp | grep -v -e nccl -e cudnn) "${nccl[@]:1}" "${cudnn[@]:2}" gpu/device.cpp gpu/staged_collectives.cpp runtime/base/{error,printable,random}.cpp \
    tests/gpu/{ops,matmul,attention,sampling,cuda}_test.cpp tests/gpu/cuda_backend.cpp; do
  object=$build/$(echo "$source" | tr / _).o
  objects+=("$object")
  "$nvcc" -std=c++20 --extended-lambda -O3 -arch="${ARCH:-native}" -Xcompiler=-Wall -I. "${nccl[@]:0:1}" "${cudnn[@]:0:2}" \
    -c "$source" -o "$object" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"$nvcc" -arch="${ARCH:-native}" "${objects[@]}" -o "$build/cuda_test" -lgtest -lcublas -lpthread \
  ${nccl:+-lnccl} ${cudnn:+-lcudnn -lnvrtc}
run=()
if [[ -n ${CHECK:-} ]]; then
  # Calls that a test expects to fail are no errors.
  run=(compute-sanitizer --tool "$CHECK" --error-exitcode 9)
  if [[ $CHECK == memcheck ]]; then run+=(--report-api-errors no); fi
fi
"${run[@]}" "$build/cuda_test" "$@"
