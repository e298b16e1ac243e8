#include "runtime/base/random.h"

#include <cmath>
#include <numbers>

namespace passel {

double Random::Normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
  const double angle = 2.0 * std::numbers::pi * Uniform();
  spare_ = radius * std::sin(angle);
  has_spare_ = true;
  return radius * std::cos(angle);
}

uint64_t HashBytes(const void* data, size_t size, uint64_t basis) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t h = basis;
  for (size_t i = 0; i < size; ++i) h = (h ^ bytes[i]) * 0x100000001b3u;
  return h;
}

std::vector<float> RandomProjections(uint64_t seed, size_t head_dim, size_t k, size_t l) {
  Random random(seed);
  std::vector<float> r(head_dim * k * l);
  for (float& x : r) x = static_cast<float>(random.Normal());
  return r;
}

}  // namespace passel
