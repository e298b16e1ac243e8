# Shared by demo.sh and test.sh; sourced from the repository's root.

# Builds a preset: NAME TARGET, then options for cmake. With ccache and the CUDA compiler where the
# machine has them.
build() {
  local preset=$1 target=$2 options=()
  shift 2
  if command -v ccache >/dev/null; then options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
  if [[ -n $(find_nvcc) ]]; then options+=("-DCMAKE_CUDA_COMPILER=$(find_nvcc)"); fi
  cmake --preset "$preset" "${options[@]}" "$@"
  cmake --build --preset "$preset" --target "$target" -j "$(nproc)"
}

# The path of nvcc, or nothing.
find_nvcc() {
  command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true
}

# mpirun for ranks on this one machine: more ranks than cores is fine, and no rank is bound to one.
local_mpirun() {
  # Open MPI refuses root unless told twice.
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 UCX_WARN_UNUSED_ENV_VARS=n \
    mpirun --oversubscribe --bind-to none --mca pml ob1 --mca btl self,vader \
    --mca mpi_yield_when_idle 1 "$@"
}
