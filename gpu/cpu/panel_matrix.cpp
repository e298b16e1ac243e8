#include "gpu/cpu/panel_matrix.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::gpu::cpu {

PanelMatrix::PanelMatrix(GemmContext& context, const std::shared_ptr<Ledger>& ledger, DType type,
                         DType held, int64_t panels, int64_t in, const PanelFiller& fill)
    : type_(type), held_(held), in_(in), panels_(panels) {
  Check(panels > 0 && in > 0, "PanelMatrix: empty matrix");
  Check(held == type || held == DType::kBf16, "PanelMatrix: how panels are held");
  layout_ = &context.cache.Layout(type, in, kPanel);
  panel_elements_ = static_cast<int64_t>(layout_->bytes() / SizeOf(type));
  panel_bytes_ = RoundUp(static_cast<size_t>(panel_elements_) * SizeOf(held), 64);
  const auto bytes = CheckedMul(static_cast<uint64_t>(panels), panel_bytes_);
  memory_ = MakeBuffer(ledger, bytes.value_or(std::numeric_limits<uint64_t>::max()));
  Packer* packer =
      held == type ? &context.cache.PackerFor(type, in, kPanel, /*transposed=*/true) : nullptr;
  context.executor.For(panels, 1, [&](int64_t begin, int64_t end) {
    // Not the thread's lasting scratch: panels of a whole model would stay in it.
    Scratch rows;
    void* data = rows.Get(static_cast<size_t>(kPanel * in) * SizeOf(held));
    for (int64_t p = begin; p < end; ++p) {
      void* to = static_cast<char*>(memory_->data()) + static_cast<size_t>(p) * panel_bytes_;
      fill(p, data);
      if (packer != nullptr) {
        packer->Run(data, to);
      } else {
        Place(static_cast<const bf16*>(data), static_cast<bf16*>(to));
      }
    }
  });
}

void PanelMatrix::Place(const bf16* rows, bf16* to) const {
  std::fill_n(to, panel_elements_, bf16{0});  // the layout may have gaps
  for (int64_t k = 0; k < in_; ++k) {
    bf16* row = to + layout_->row_offsets()[static_cast<size_t>(k)];
    for (int64_t n = 0; n < kPanel; ++n) {
      row[layout_->col_offsets()[static_cast<size_t>(n)]] = rows[n * in_ + k];
    }
  }
}

const void* PanelMatrix::Widened(GemmContext& context, int64_t p) const {
  if (held_ == type_) return panel(p);
  auto* wide = context.panel.local().Get<float>(panel_elements_);
  context.kernels.to_f32(static_cast<const bf16*>(panel(p)), wide, panel_elements_);
  return wide;
}

std::vector<PanelMatrix::Tile> PanelMatrix::Tiles(GemmContext& context, const void* x, int64_t n,
                                                  int64_t stride, bool fixed_tiles) const {
  std::vector<Tile> tiles;
  int64_t padded = 0;  // rows to copy: those whose kernel wants other rows than x has
  for (int64_t row = 0; row < n;) {
    const int64_t left = n - row;
    const int64_t count = fixed_tiles || left < kMaxRows ? std::min(left, kTileRows) : kMaxRows;
    Tile tile{row, count, {}, nullptr};
    tile.kernel = context.cache.KernelFor(type_, fixed_tiles ? kTileRows : count, in_, kPanel);
    if (tile.kernel.rows != count || stride != in_) padded += tile.kernel.rows;
    tiles.push_back(tile);
    row += count;
  }
  const size_t row_bytes = static_cast<size_t>(in_) * SizeOf(type_);
  const size_t stride_bytes = static_cast<size_t>(stride) * SizeOf(type_);
  char* copy =
      padded == 0
          ? nullptr
          : static_cast<char*>(context.padded_rows.Get(static_cast<size_t>(padded) * row_bytes));
  for (Tile& tile : tiles) {
    const char* source = static_cast<const char*>(x) + static_cast<size_t>(tile.row) * stride_bytes;
    tile.x = source;
    if (tile.kernel.rows == tile.count && stride == in_) continue;
    tile.x = copy;
    for (int64_t i = 0; i < tile.kernel.rows; ++i, copy += row_bytes) {
      if (i < tile.count) {
        std::memcpy(copy, source + static_cast<size_t>(i) * stride_bytes, row_bytes);
      } else {
        std::memset(copy, 0, row_bytes);
      }
    }
  }
  return tiles;
}

}  // namespace passel::gpu::cpu
