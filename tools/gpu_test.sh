#!/usr/bin/env bash
# Builds the CUDA device and its tests alone (CUDA toolkit and GoogleTest suffice) and runs them.
# Usage: tools/gpu_test.sh [BUILD_DIR] [GoogleTest arguments]
# MEMCHECK=1 runs them under compute-sanitizer. ARCH: as in nvcc -arch (default: this GPU's).
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/gpu_test}
shift || true
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
mkdir -p "$build"
objects=()
pids=()
for source in gpu/cuda/*.cu gpu/cuda/*.cpp gpu/device.cpp gpu/staged_collectives.cpp runtime/base/{error,random}.cpp \
    tests/gpu/{ops,matmul,attention,cuda}_test.cpp tests/gpu/cuda_backend.cpp; do
  object=$build/$(echo "$source" | tr / _).o
  objects+=("$object")
  "$nvcc" -std=c++20 --extended-lambda -O3 -arch="${ARCH:-native}" -Xcompiler=-Wall -I. \
    -c "$source" -o "$object" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"$nvcc" -arch="${ARCH:-native}" "${objects[@]}" -o "$build/cuda_test" -lgtest -lcublas -lpthread
run=()
if [[ ${MEMCHECK:-0} == 1 ]]; then run=(compute-sanitizer --tool memcheck --error-exitcode 9); fi
"${run[@]}" "$build/cuda_test" "$@"
