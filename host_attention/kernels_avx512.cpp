// The avx512 level. Nothing with external linkage is defined under the target pragma.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "host_attention/kernels.h"
#include "runtime/base/partial.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
// Each needs the ones above it.
// clang-format off
#include "host_attention/simd_avx512.h"
#include "host_attention/simd_math.h"
#include "host_attention/simd_probe.h"
#include "host_attention/simd_attend.h"
#include "host_attention/simd_dense.h"
#include "host_attention/simd_kernels.h"
// clang-format on
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace passel::host {

const Kernels kAvx512Kernels = kTable;

}  // namespace passel::host
