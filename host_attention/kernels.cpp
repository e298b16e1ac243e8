#include "host_attention/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace passel::host {
namespace {

float MaxAbs(const bf16* x, uint32_t n) {
  float m = 0;
  for (uint32_t j = 0; j < n; ++j) m = std::max(m, std::fabs(ToFloat(x[j])));
  return m;
}

// x as a multiple of `step` in [lowest, highest].
int QuantizeOne(bf16 x, float step, int lowest, int highest) {
  const float y = step > 0 ? std::nearbyint(ToFloat(x) / step) : 0.0f;
  return static_cast<int>(std::clamp(std::isnan(y) ? 0.0f : y, static_cast<float>(lowest),
                                     static_cast<float>(highest)));
}

// Where the parts of an int8 row begin.
constexpr size_t kInt8Keys = 2 * sizeof(float);
size_t Int8HalfSteps(size_t head_dim) { return kInt8Keys + head_dim; }
size_t Int8Values(size_t head_dim) { return Int8HalfSteps(head_dim) + head_dim / 8; }

}  // namespace

size_t RowStride(KvType type, uint32_t head_dim) {
  const size_t d = head_dim;
  return type == KvType::kBf16 ? 4 * d : Int8Values(d) + d;
}

void StoreRow(KvType type, uint32_t head_dim, const bf16* kv, std::byte* row) {
  if (type == KvType::kBf16) {
    std::memcpy(row, kv, 2 * size_t{head_dim} * sizeof(bf16));
    return;
  }
  const float scales[2] = {MaxAbs(kv, head_dim) / 127.0f, MaxAbs(kv + head_dim, head_dim) / 127.0f};
  std::memcpy(row, scales, sizeof(scales));
  auto* keys = reinterpret_cast<int8_t*>(row + kInt8Keys);
  auto* half_steps = reinterpret_cast<uint8_t*>(row + Int8HalfSteps(head_dim));
  auto* values = reinterpret_cast<int8_t*>(row + Int8Values(head_dim));
  std::fill_n(half_steps, head_dim / 8, uint8_t{0});
  for (uint32_t j = 0; j < head_dim; ++j) {
    const int halves = QuantizeOne(kv[j], scales[0] / 2, -254, 255);
    keys[j] = static_cast<int8_t>(halves >> 1);
    half_steps[j / 8] = static_cast<uint8_t>(half_steps[j / 8] | (halves & 1) << (j % 8));
    values[j] = static_cast<int8_t>(QuantizeOne(kv[head_dim + j], scales[1], -127, 127));
  }
}

void LoadRow(const RowsView& rows, size_t index, float* k, float* v) {
  const std::byte* row = rows.data + index * rows.stride;
  const uint32_t d = rows.head_dim;
  if (rows.type == KvType::kBf16) {
    const auto* x = reinterpret_cast<const bf16*>(row);
    for (uint32_t j = 0; j < d; ++j) {
      k[j] = ToFloat(x[j]);
      v[j] = ToFloat(x[d + j]);
    }
    return;
  }
  float scales[2];
  std::memcpy(scales, row, sizeof(scales));
  const auto* keys = reinterpret_cast<const int8_t*>(row + kInt8Keys);
  const auto* half_steps = reinterpret_cast<const uint8_t*>(row + Int8HalfSteps(d));
  const auto* values = reinterpret_cast<const int8_t*>(row + Int8Values(d));
  for (uint32_t j = 0; j < d; ++j) {
    const int halves = 2 * keys[j] + (half_steps[j / 8] >> (j % 8) & 1);
    k[j] = scales[0] * 0.5f * static_cast<float>(halves);
    v[j] = scales[1] * static_cast<float>(values[j]);
  }
}

size_t WorkFloats(uint32_t heads, uint32_t head_dim) {
  // Arranged q, mean and num padded to 32 each, 32 scores for each of 4 heads; alignment to 64
  // bytes.
  const size_t padded = (size_t{head_dim} + 31) / 32 * 32;
  return heads * 2 * padded + padded + 4 * 32 + 16;
}

const Kernels& KernelsFor(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kScalar:
      break;
  }
  return kScalarKernels;
}

double InclusionProbability(double cosine, uint32_t k, uint32_t l) {
  if (l < 2) return 1;
  const double c = std::clamp(std::isnan(cosine) ? 0.0 : cosine, -1.0, 1.0);
  // acos(−c)/π is 1 − acos(c)/π without the cancellation at c → −1.
  const double p = std::acos(-c) / 3.14159265358979323846;
  const double agree = std::min(std::pow(p, k), 1.0);
  const double tables = l;
  const double expected = (tables - 1) * agree;
  double u;
  if (expected < 0.5) {
    // Few agreements are expected: 1 − … would cancel. The binomial tail Σ_{j≥2} is a sum of
    // positive terms with ratios below expected/(j + 1).
    const double ratio = agree / (1 - agree);
    double series = 1;
    for (int j = 12; j >= 1; --j) {
      series = 1 + ratio * std::max(0.0, tables - 1 - j) / (j + 2) * series;
    }
    u = tables * (tables - 1) / 2 * agree * agree * std::exp((tables - 2) * std::log1p(-agree)) *
        series;
  } else if (agree >= 1) {
    u = 1;
  } else {
    u = -std::expm1((tables - 1) * std::log1p(-agree) + std::log1p(expected));
  }
  return std::clamp(u, 1e-30, 1.0);
}

}  // namespace passel::host
