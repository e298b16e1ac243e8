#pragma once

#include <ostream>

namespace passel {

// `passel doctor`: prints what Passel finds on this machine (MPI, UCX and its transports, CUDA,
// NCCL, CPUs, memory, limits), one line a finding, and advice behind "!" where something will
// hurt. Works without mpirun, without GPU and without any network device. Returns the exit code: 0.
int RunDoctor(std::ostream& out);

}  // namespace passel
