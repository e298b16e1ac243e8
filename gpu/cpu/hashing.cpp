// SimHash codes of CpuDevice.

#include <algorithm>

#include "gpu/cpu/cpu_device.h"
#include "runtime/base/error.h"

namespace passel::gpu::cpu {

void CpuDevice::SetProjections(std::span<const float> r, int32_t head_dim, int32_t k, int32_t l) {
  Check(head_dim > 0 && k > 0 && k <= 16 && l > 0, "SetProjections: k in 1 … 16, l ≥ 1");
  const int64_t columns = int64_t{k} * l;
  Check(static_cast<int64_t>(r.size()) == head_dim * columns, "SetProjections: size of R");
  hash_dim_ = head_dim;
  hash_bits_ = k;
  hash_tables_ = l;
  // A panel holds whole tables, so that a code comes from one panel.
  const int64_t tables = kPanel / k;
  projections_ = std::make_unique<PanelMatrix>(
      context_, ledger_, DType::kF32, DType::kF32, (l + tables - 1) / tables, head_dim,
      [&](int64_t p, void* data) {
        auto* rows = static_cast<float*>(data);
        std::fill_n(rows, kPanel * head_dim, 0.0f);
        const int64_t first = p * tables * k;
        const int64_t count = std::min(tables * k, columns - first);
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t j = 0; j < head_dim; ++j) {
            rows[c * head_dim + j] = r[static_cast<size_t>(j * columns + first + c)];
          }
        }
      });
}

void CpuDevice::HashCodes(Tensor x, Tensor mean, Tensor codes) {
  Check(projections_ != nullptr, "HashCodes before SetProjections");
  const int64_t dim = hash_dim_;
  const int64_t heads = x.cols / dim;
  Check((x.type == DType::kF32 || x.type == DType::kBf16) && x.cols == heads * dim &&
            codes.type == DType::kU16 && FitCodes(codes, x.rows, heads, hash_tables_),
        "HashCodes: shapes disagree");
  Check(mean.data == nullptr || (mean.type == DType::kF32 && mean.cols == x.cols &&
                                 (mean.rows == 1 || mean.rows == x.rows)),
        "HashCodes: mean does not fit x");
  constexpr int64_t kRows = 4096;  // vectors hashed at once: bounds the working memory
  const int64_t step = std::max<int64_t>(1, kRows / heads);
  for (int64_t begin = 0; begin < x.rows; begin += step) {
    const int64_t n = std::min(step, x.rows - begin);
    float* centred = hash_scratch_.Get<float>(n * x.cols);
    ForRows(n, x.cols, [&](int64_t from, int64_t to) {
      float* buffer = row_scratch_.local().Get<float>(x.cols);
      for (int64_t i = from; i < to; ++i) {
        const float* row = RowAsF32(x, begin + i, x.cols, buffer);
        const int64_t at = mean.rows == 1 ? 0 : begin + i;
        const float* mu = mean.data ? RowPtr<float>(mean, at) : nullptr;
        for (int64_t j = 0; j < x.cols; ++j) centred[i * x.cols + j] = row[j] - (mu ? mu[j] : 0.0f);
      }
    });
    const int64_t tables = kPanel / hash_bits_;
    const uint64_t bits = (uint64_t{1} << hash_bits_) - 1;
    // Tiles always fixed: a vector has the same codes alone and in a batch.
    projections_->Multiply(
        context_, centred, n * heads, dim, /*fixed_tiles=*/true,
        [&](int64_t p, int64_t row, int64_t count, const float* tile) {
          const int64_t first = p * tables;
          const int64_t last = std::min<int64_t>(first + tables, hash_tables_);
          for (int64_t i = 0; i < count; ++i) {
            uint64_t mask = kernels_.positive_mask(tile + i * kPanel);
            const int64_t at = begin + (row + i) / heads;
            const int64_t head = (row + i) % heads;
            uint16_t* out = codes.rows == x.rows ? RowPtr<uint16_t>(codes, at) + head * hash_tables_
                                                 : RowPtr<uint16_t>(codes, head * x.rows + at);
            for (int64_t t = first; t < last; ++t, mask >>= hash_bits_) {
              out[t] = static_cast<uint16_t>(mask & bits);
            }
          }
        });
  }
}

}  // namespace passel::gpu::cpu
