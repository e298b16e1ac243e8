#!/usr/bin/env bash
# Runs clang-tidy over the sources that git knows, or over the files given, with the compile
# commands of the debug preset (configured if it is not). Not part of test.sh: it takes long.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# 16: the first that is on Debian 12 and Ubuntu 24.04 and reads GCC 12's <source_location>.
./tools/setup.sh clang-tidy-16
[[ -f build/debug/compile_commands.json ]] || cmake --preset debug -DPASSEL_CUDA=OFF
# The headers that protoc writes.
cmake --build build/debug --target passel_config passel_control
files=("$@")
if ((${#files[@]} == 0)); then
  mapfile -t files < <(git ls-files -- '*.cpp')
fi
printf '%s\0' "${files[@]}" |
  xargs -0 -n 1 -P "$(nproc)" clang-tidy-16 --quiet -p build/debug
