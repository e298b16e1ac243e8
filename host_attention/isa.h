#pragma once

#include <cstdint>
#include <string_view>

namespace passel::host {

// Levels of the kernels, each a superset of the one before.
enum class Isa : uint8_t { kScalar, kAvx2, kAvx512 };

// The best level of this machine (CPU and operating system).
Isa BestIsa();
// The level in use, decided once per process: PASSEL_ISA=scalar|avx2|avx512 forces one. Throws
// Error{kUsage} for an unknown name or a level that this machine lacks.
Isa ActiveIsa();
std::string_view IsaName(Isa isa);

}  // namespace passel::host
