#!/usr/bin/env bash
# Everything a change must pass, in the order of what fails fastest. Stops at the first failure.
#
#   PASSEL_TEST_STEPS="release asan"   runs only the named steps (default: all)
#   PASSEL_FUZZ_SECONDS=60             how long each parser is fuzzed (default: 60)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=${PASSEL_TEST_STEPS-"format release asan tsan fuzz nocuda"}
jobs=$(nproc)
source tools/lib.sh
# Open MPI refuses root unless told twice.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
wants() { [[ " $steps " == *" $1 "* ]]; }

# clang: for the fuzz targets.
./tools/setup.sh clang-16 libclang-rt-16-dev

if wants format; then
  say "format"
  ./tools/format.sh
fi

if wants release; then
  if [[ -n $(find_nvcc) ]]; then
    say "release build, with CUDA ($(find_nvcc))"
  else
    say "release build, WITHOUT CUDA: no nvcc here, the CUDA backend is not compiled"
  fi
  build release all
  say "headers compile alone"
  cmake --build --preset release -j "$jobs" --target all_verify_interface_header_sets
  say "all tests"
  ctest --preset release --no-tests=error
fi

if wants asan; then
  say "address and undefined behaviour sanitizer: unit tests"
  build asan unit_tests
  ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    ctest --preset asan --no-tests=error -j "$jobs"
fi

if wants tsan; then
  say "thread sanitizer: threaded tests"
  # No suppressions. ThreadSanitizer cannot see how the distribution's TBB and oneDNN, compiled
  # without it, hand work to their threads: tests that run on those have not the label `threaded`.
  build tsan threaded_tests
  # UCX patches libc's madvise to learn of unmapped memory. The C library calls it when a thread
  # ends, after ThreadSanitizer has let go of the thread, and that crashes.
  UCX_MEM_EVENTS=n \
    TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1" \
    ctest --preset tsan --no-tests=error
fi

if wants fuzz; then
  say "fuzzing the parsers of model files"
  build fuzz fuzz_targets
  build/fuzz/tests/fuzz/make_fuzz_corpus build/fuzz/corpus
  # What was found in earlier runs is kept beside the corpus and goes on from there.
  fuzz() {
    mkdir -p "build/fuzz/found/$1"
    "build/fuzz/tests/fuzz/fuzz_$1" -max_total_time="${PASSEL_FUZZ_SECONDS-60}" -timeout=10 \
      -rss_limit_mb=1024 -max_len=16384 -print_final_stats=1 -verbosity=0 \
      -artifact_prefix="build/fuzz/$1-" "build/fuzz/found/$1" "build/fuzz/corpus/$1" \
      >"build/fuzz/$1.log" 2>&1 && tail -n 6 "build/fuzz/$1.log" && return
    cat "build/fuzz/$1.log"
    return 255  # xargs stops
  }
  export -f fuzz
  printf '%s\n' gguf split_gguf safetensors config_json tokenizer_json hf_model |
    xargs -P "$jobs" -I{} bash -c 'fuzz {}'
fi

if wants nocuda; then
  say "configuring without CUDA"
  mkdir -p build
  cmake --fresh --preset release -B build/nocuda -DPASSEL_CUDA=OFF >build/nocuda.log || {
    cat build/nocuda.log
    exit 1
  }
fi

say "passed: $steps"
