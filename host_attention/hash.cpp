#include "host_attention/hash.h"

#include <algorithm>

#include "runtime/base/error.h"

namespace passel::host {

Hasher::Hasher(std::span<const float> projections, uint32_t head_dim, uint32_t k, uint32_t l)
    : kernels_(KernelsFor(ActiveIsa())),
      head_dim_(head_dim),
      k_(k),
      l_(l),
      columns_((size_t{k} * l + 31) / 32 * 32),
      projections_(head_dim * columns_) {
  const size_t used = size_t{k} * l;
  Check(projections.size() == head_dim * used, "projections are [head_dim, k·l]");
  for (size_t j = 0; j < head_dim; ++j) {
    std::copy_n(projections.begin() + static_cast<std::ptrdiff_t>(j * used), used,
                projections_.begin() + static_cast<std::ptrdiff_t>(j * columns_));
  }
}

void Hasher::Hash(const float* x, size_t count, const float* mean, uint16_t* codes) const {
  // A tile of rows stays in the L1 cache while all projections pass.
  constexpr size_t kTile = 64;
  const size_t words = columns_ / 16;
  std::vector<float> centred(kTile * head_dim_);
  std::vector<uint16_t> bits(kTile * words + 2);
  const uint32_t mask = (1u << k_) - 1;
  for (size_t at = 0; at < count; at += kTile) {
    const size_t rows = std::min(kTile, count - at);
    for (size_t i = 0; i < rows * head_dim_; ++i) {
      centred[i] = x[at * head_dim_ + i] - (mean == nullptr ? 0.0f : mean[i % head_dim_]);
    }
    kernels_.sign_bits(centred.data(), rows, head_dim_, projections_.data(), columns_, bits.data());
    for (size_t i = 0; i < rows; ++i) {
      for (size_t t = 0; t < l_; ++t) {
        const size_t bit = t * k_;
        const uint16_t* word = &bits[i * words + bit / 16];
        const uint32_t two = word[0] | uint32_t{word[1]} << 16;
        codes[(at + i) * l_ + t] = static_cast<uint16_t>((two >> (bit % 16)) & mask);
      }
    }
  }
}

}  // namespace passel::host
