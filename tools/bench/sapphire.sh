#!/usr/bin/env bash
# Builds the benchmarks of host attention alone (a C++20 compiler, hwloc and Google Benchmark suffice)
# and runs them: for machines that lack the rest of what Passel needs.
# Usage: tools/bench/sapphire.sh [BUILD_DIR] [Google Benchmark arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build/bench}
shift || true
mkdir -p "$build"
objects=()
pids=()
for source in host_attention/*.cpp runtime/base/{error,printable,random}.cpp tools/bench/{layer,limits,attend_bench}.cpp; do
  object=$build/$(echo "$source" | tr / _).o
  objects+=("$object")
  "${CXX:-g++}" -std=c++20 -O3 -DNDEBUG -I. -c "$source" -o "$object" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"${CXX:-g++}" "${objects[@]}" -o "$build/attend_bench" -lbenchmark -lhwloc -lpthread
lscpu | grep -E 'Model name|^CPU\(s\)|L2|L3'
"$build/attend_bench" "$@"
