// Causal attention of prefill chunks: CpuDevice::CausalAttention.
//
// Keys are taken in blocks of kKeys; K and V of a run of blocks are packed for oneDNN once, then
// every tile of queries multiplies with them and keeps its running maximum, sum and numerator (the
// online softmax of Milakov and Gimelshein 2018, in blocks as in FlashAttention). Blocks, tiles and
// their order depend on the arguments alone, so bits do not depend on the number of threads.

#include <algorithm>
#include <cstring>

#include "gpu/cpu/cpu_device.h"
#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"
#include "runtime/base/partial.h"

namespace passel::gpu::cpu {
namespace {

constexpr int64_t kKeys = 256;         // of a block
constexpr int64_t kBlocksOfPass = 16;  // packed at once: bounds the working memory
constexpr int64_t kMaxQueryRows = 64;  // token rows of a query tile
constexpr int64_t kTargetRows = 192;   // rows of a product (token rows × heads of a group)

int64_t Up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The attention of one chunk, in fixed tiles.
struct Plan {
  AttentionShape shape;
  int64_t start, n, window;
  int64_t dim;      // head_dim, padded for the product with K
  int64_t out_dim;  // head_dim, padded for the product with V
  int64_t rows;     // token rows of a tile
  int64_t tiles;
  int64_t first_block, last_block;  // [first, last)

  int64_t product_rows() const { return rows * shape.group(); }
  int64_t tasks() const { return tiles * shape.kv_heads; }
  // First key that the token at `position` sees.
  int64_t FirstKey(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
  }
};

Plan MakePlan(const AttentionShape& shape, int64_t start, int64_t n, int64_t window) {
  Plan plan{shape, start, n, window, 0, 0, 0, 0, 0, 0};
  plan.dim = Up(shape.head_dim, 32);
  plan.out_dim = Up(shape.head_dim, kPanel);
  plan.rows = std::clamp(Up(kTargetRows / shape.group(), 16), int64_t{16}, kMaxQueryRows);
  plan.rows = std::min(plan.rows, Up(n, 16));
  plan.tiles = (n + plan.rows - 1) / plan.rows;
  plan.first_block = plan.FirstKey(start) / kKeys;
  plan.last_block = (start + n + kKeys - 1) / kKeys;
  return plan;
}

}  // namespace

void CpuDevice::CausalAttention(const AttentionShape& shape, Tensor q, Tensor k, Tensor v,
                                int64_t start, int64_t window, Tensor out) {
  const int64_t head_dim = shape.head_dim;
  Check(shape.kv_heads > 0 && head_dim > 0 && shape.heads % shape.kv_heads == 0 && start >= 0 &&
            window >= 0,
        "CausalAttention: shape");
  Check(q.type == DType::kF32 && q.cols == shape.heads * head_dim && out.rows == q.rows &&
            out.cols == q.cols && (out.type == DType::kF32 || out.type == activation_),
        "CausalAttention: q and out disagree");
  Check(k.type == DType::kBf16 && v.type == DType::kBf16 && k.rows >= start + q.rows &&
            v.rows >= start + q.rows && k.cols == shape.kv_heads * head_dim && v.cols == k.cols,
        "CausalAttention: k and v do not fit q");
  if (q.rows == 0) return;
  const Plan plan = MakePlan(shape, start, q.rows, window);
  const DType type = activation_;
  const size_t element = SizeOf(type);
  const int64_t group = shape.group();
  const int64_t m = plan.product_rows();

  Packer& pack_k = context_.cache.PackerFor(type, plan.dim, kKeys, /*transposed=*/true);
  Packer& pack_v = context_.cache.PackerFor(type, kKeys, plan.out_dim, /*transposed=*/false);
  const size_t k_bytes = RoundUp(context_.cache.Layout(type, plan.dim, kKeys).bytes(), 64);
  const size_t v_bytes = RoundUp(context_.cache.Layout(type, kKeys, plan.out_dim).bytes(), 64);
  const auto scores = context_.cache.KernelFor(type, m, plan.dim, kKeys);
  const auto values = context_.cache.KernelFor(type, m, kKeys, plan.out_dim);

  // Packed K and V of a pass, then every task's max, den: [m] and num: [m, out_dim].
  const size_t block_bytes = k_bytes + v_bytes;
  const size_t packed_bytes =
      block_bytes *
      static_cast<size_t>(std::min(kBlocksOfPass, plan.last_block - plan.first_block) *
                          shape.kv_heads);
  const int64_t state_size = m * (2 + plan.out_dim);
  char* packed = static_cast<char*>(attention_scratch_.Get(
      packed_bytes + static_cast<size_t>(plan.tasks() * state_size) * sizeof(float)));
  auto* states = reinterpret_cast<float*>(packed + packed_bytes);

  // Copies keys [first, first + kKeys) of one KV head to [kKeys, width], zero-padded.
  const auto gather = [&](const Tensor& t, int64_t first, int64_t kv_head, int64_t width,
                          void* to) {
    std::memset(to, 0, static_cast<size_t>(kKeys * width) * element);
    const int64_t count = std::min(kKeys, start + q.rows - first);
    for (int64_t i = 0; i < count; ++i) {
      const bf16* row = RowPtr<bf16>(t, first + i) + kv_head * head_dim;
      if (type == DType::kBf16) {
        std::copy_n(row, head_dim, static_cast<bf16*>(to) + i * width);
      } else {
        kernels_.to_f32(row, static_cast<float*>(to) + i * width, head_dim);
      }
    }
  };
  const auto pack = [&](int64_t block, int64_t kv_head, char* to) {
    void* rows = row_scratch_.local().Get(
        static_cast<size_t>(kKeys * std::max(plan.dim, plan.out_dim)) * element);
    gather(k, block * kKeys, kv_head, plan.dim, rows);
    pack_k.Run(rows, to);
    gather(v, block * kKeys, kv_head, plan.out_dim, rows);
    pack_v.Run(rows, to + k_bytes);
  };

  // Row r of a tile's products: token r / group, head r % group of the KV head.
  const auto attend = [&](int64_t task, int64_t pass_begin, int64_t pass_end) {
    const int64_t kv_head = task % shape.kv_heads;
    const int64_t first = task / shape.kv_heads * plan.rows;
    const int64_t count = std::min(plan.rows, q.rows - first);
    float* max = states + task * state_size;
    float* den = max + m;
    float* num = den + m;
    const int64_t block_begin = std::max(pass_begin, plan.FirstKey(start + first) / kKeys);
    const int64_t block_end = std::min(pass_end, (start + first + count - 1) / kKeys + 1);
    if (block_begin >= block_end) return;

    auto* queries =
        static_cast<char*>(row_scratch_.local().Get(static_cast<size_t>(m * plan.dim) * element));
    std::memset(queries, 0, static_cast<size_t>(m * plan.dim) * element);
    for (int64_t r = 0; r < count * group; ++r) {
      const float* row =
          RowPtr<float>(q, first + r / group) + (kv_head * group + r % group) * head_dim;
      WriteRow(row, head_dim, Tensor{queries, type, m, head_dim, plan.dim}, r);
    }
    float* s = score_scratch_.local().Get<float>(m * (kKeys + plan.out_dim + 1));
    float* product = s + m * kKeys;
    float* shrink = product + m * plan.out_dim;
    void* weights = type == DType::kF32
                        ? static_cast<void*>(s)
                        : weight_scratch_.local().Get(static_cast<size_t>(m * kKeys) * element);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const char* kv = packed + block_bytes * static_cast<size_t>(
                                                  (block - pass_begin) * shape.kv_heads + kv_head);
      scores.gemm->Run(queries, kv, s);
      const int64_t key = block * kKeys;
      for (int64_t r = 0; r < m; ++r) {
        const int64_t position = start + first + std::min(r / group, count - 1);
        const int64_t end = std::clamp<int64_t>(position + 1 - key, 0, kKeys);
        const int64_t begin = std::clamp<int64_t>(plan.FirstKey(position) - key, 0, end);
        shrink[r] =
            kernels_.softmax_row(s + r * kKeys, begin, end, kKeys, shape.scale, &max[r], &den[r]);
        if (type == DType::kBf16) {
          kernels_.to_bf16(s + r * kKeys, static_cast<bf16*>(weights) + r * kKeys, kKeys);
        }
      }
      values.gemm->Run(weights, kv + k_bytes, product);
      for (int64_t r = 0; r < m; ++r) {
        kernels_.scale_add(num + r * plan.out_dim, shrink[r], product + r * plan.out_dim,
                           plan.out_dim);
      }
    }
  };

  for (int64_t task = 0; task < plan.tasks(); ++task) {
    float* state = states + task * state_size;
    std::fill_n(state, m, kEmptyMax);
    std::fill_n(state + m, state_size - m, 0.0f);
  }
  for (int64_t pass = plan.first_block; pass < plan.last_block; pass += kBlocksOfPass) {
    const int64_t pass_end = std::min(plan.last_block, pass + kBlocksOfPass);
    context_.executor.For((pass_end - pass) * shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pack(pass + i / shape.kv_heads, i % shape.kv_heads,
             packed + block_bytes * static_cast<size_t>(i));
      }
    });
    context_.executor.For(plan.tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) attend(task, pass, pass_end);
    });
  }
  ForRows(q.rows, q.cols, [&](int64_t begin, int64_t end) {
    float* buffer = row_scratch_.local().Get<float>(q.cols);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const float* state = states + (i / plan.rows * shape.kv_heads + h / group) * state_size;
        const int64_t r = i % plan.rows * group + h % group;
        const float inverse = 1.0f / state[m + r];
        const float* num = state + 2 * m + r * plan.out_dim;
        for (int64_t j = 0; j < head_dim; ++j) buffer[h * head_dim + j] = num[j] * inverse;
      }
      WriteRow(buffer, q.cols, out, i);
    }
  });
}

}  // namespace passel::gpu::cpu
