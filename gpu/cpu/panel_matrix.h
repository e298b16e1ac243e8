#pragma once

#include <oneapi/tbb/enumerable_thread_specific.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "gpu/cpu/executor.h"
#include "gpu/cpu/kernels.h"
#include "gpu/cpu/memory.h"
#include "gpu/cpu/onednn.h"
#include "gpu/cpu/scratch.h"

namespace passel::gpu::cpu {

// Output features of a panel: the N of every product with weights.
inline constexpr int64_t kPanel = 64;
// Rows of a tile where tiles need not be fixed.
inline constexpr int64_t kMaxRows = 64;

// What products share: primitives, threads, working memory.
struct GemmContext {
  explicit GemmContext(const Kernels& k, int32_t threads) : kernels(k), executor(threads) {}

  const Kernels& kernels;
  Executor executor;
  GemmCache cache;
  Scratch padded_rows;  // of the issuing thread
  tbb::enumerable_thread_specific<Scratch> tile, panel;
};

// A weight matrix as panels of kPanel output features, each packed for oneDNN. Every (panel, tile
// of rows) is one single-threaded product, so bits do not depend on the number of threads; with
// tiles fixed (`fixed_tiles`), not on the number of rows either. Panels that are multiplied as f32
// may be held as bf16: each is widened where a run of tiles is multiplied with it.
class PanelMatrix {
 public:
  // Fills rows of panel `p`: [kPanel, in] row-major bf16 or f32 as `held` says. Called from several
  // threads at once. Padding rows are the filler's to zero.
  using PanelFiller = std::function<void(int64_t p, void* rows)>;

  // type: of the products; held: the same or, with values that bf16 represents, kBf16.
  PanelMatrix(GemmContext& context, const std::shared_ptr<Ledger>& ledger, DType type, DType held,
              int64_t panels, int64_t in, const PanelFiller& fill);

  int64_t in() const { return in_; }
  int64_t panels() const { return panels_; }
  const PackedLayout& layout() const { return *layout_; }
  // Panel p as it is held, in layout().
  const void* panel(int64_t p) const {
    return static_cast<const char*>(memory_->data()) + static_cast<size_t>(p) * panel_bytes_;
  }

  // x: [n, in] of type(), rows `stride` elements apart. For every panel p and run of rows
  // [row, row + count): emit(p, row, count, tile) with tile: [count, kPanel] f32; from several
  // threads at once.
  template <typename Emit>
  void Multiply(GemmContext& context, const void* x, int64_t n, int64_t stride, bool fixed_tiles,
                const Emit& emit) const;

 private:
  struct Tile {
    int64_t row = 0;
    int64_t count = 0;
    GemmCache::Kernel kernel;
    const void* x = nullptr;
  };
  std::vector<Tile> Tiles(GemmContext& context, const void* x, int64_t n, int64_t stride,
                          bool fixed_tiles) const;
  // Puts the rows of a panel, [kPanel, in] bf16, where the layout has them.
  void Place(const bf16* rows, bf16* to) const;
  // Panel p as the products want it, perhaps in memory of the thread's own.
  const void* Widened(GemmContext& context, int64_t p) const;

  DType type_, held_;
  int64_t in_, panels_;
  const PackedLayout* layout_;
  int64_t panel_elements_;
  size_t panel_bytes_;
  std::unique_ptr<Buffer> memory_;
};

template <typename Emit>
void PanelMatrix::Multiply(GemmContext& context, const void* x, int64_t n, int64_t stride,
                           bool fixed_tiles, const Emit& emit) const {
  if (n == 0) return;
  const std::vector<Tile> tiles = Tiles(context, x, n, stride, fixed_tiles);
  // A task has enough work to be worth handing over, and reuses its panels while cached.
  constexpr int64_t kTilesOfTask = 8;
  const auto tile_count = static_cast<int64_t>(tiles.size());
  const int64_t runs = (tile_count + kTilesOfTask - 1) / kTilesOfTask;
  context.executor.For(runs * panels_, 1, [&](int64_t begin, int64_t end) {
    float* c = context.tile.local().Get<float>(kMaxRows * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % panels_;
      const int64_t first = task / panels_ * kTilesOfTask;
      const void* b = Widened(context, p);
      for (int64_t t = first; t < std::min(tile_count, first + kTilesOfTask); ++t) {
        const Tile& tile = tiles[static_cast<size_t>(t)];
        tile.kernel.gemm->Run(tile.x, b, c);
        emit(p, tile.row, tile.count, static_cast<const float*>(c));
      }
    }
  });
}

}  // namespace passel::gpu::cpu
