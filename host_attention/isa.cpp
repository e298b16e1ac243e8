#include "host_attention/isa.h"

#include <cstdlib>
#include <string>

#include "runtime/base/error.h"

namespace passel::host {
namespace {

Isa Choose() {
  const char* name = std::getenv("PASSEL_ISA");
  if (name == nullptr || *name == '\0') return BestIsa();
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (IsaName(isa) != name) continue;
    if (isa > BestIsa()) {
      throw Error(ErrorClass::kUsage, std::string("PASSEL_ISA=") + name + ": this machine has " +
                                          std::string(IsaName(BestIsa())) + " at most");
    }
    return isa;
  }
  throw Error(ErrorClass::kUsage,
              std::string("PASSEL_ISA=") + name + ": expected scalar, avx2 or avx512");
}

}  // namespace

Isa BestIsa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : Isa::kAvx2;
}

Isa ActiveIsa() {
  static const Isa isa = Choose();
  return isa;
}

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

}  // namespace passel::host
