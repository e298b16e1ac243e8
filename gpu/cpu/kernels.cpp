#include "gpu/cpu/kernels.h"

#include <cstdint>
#include <string>

#include "runtime/base/error.h"

namespace passel::gpu::cpu {
namespace {

// Vectors are passed between functions of this file alone, all of them inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace scalar {
constexpr int64_t kLanes = 4;
#include "gpu/cpu/kernels.inc"
}  // namespace scalar

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
constexpr int64_t kLanes = 8;
#include "gpu/cpu/kernels.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
constexpr int64_t kLanes = 16;
#include "gpu/cpu/kernels.inc"
}  // namespace avx512
#pragma GCC pop_options

constexpr Kernels kScalar = scalar::MakeTable("scalar");
constexpr Kernels kAvx2 = avx2::MakeTable("avx2");
constexpr Kernels kAvx512 = avx512::MakeTable("avx512");

bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Kernels& SelectKernels(std::string_view forced) {
  if (forced.empty()) return HasAvx512() ? kAvx512 : HasAvx2() ? kAvx2 : kScalar;
  if (forced == "scalar") return kScalar;
  if (forced == "avx2" && HasAvx2()) return kAvx2;
  if (forced == "avx512" && HasAvx512()) return kAvx512;
  throw Error(ErrorClass::kUsage, "PASSEL_ISA=" + std::string(forced) +
                                      ": expected scalar, avx2 or avx512, and one this CPU has");
}

}  // namespace passel::gpu::cpu
