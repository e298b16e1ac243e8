// The KV pool of CpuDevice and attention over its pages.

#include <algorithm>
#include <cstring>
#include <vector>

#include "gpu/cpu/cpu_device.h"
#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"
#include "runtime/base/partial.h"

namespace passel::gpu::cpu {

void CpuDevice::CreateKvPool(const AttentionShape& shape, int32_t pages) {
  Check(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 &&
            shape.head_dim > 0 && shape.head_dim % 16 == 0 && pages > 0,
        "CreateKvPool: shape");
  const uint64_t slot = uint64_t{2} * sizeof(bf16) * static_cast<uint64_t>(shape.kv_heads) *
                        static_cast<uint64_t>(shape.head_dim);
  pool_.reset();
  pool_ = Allocate(slot * kKvPageTokens * static_cast<uint64_t>(pages));
  pool_shape_ = shape;
  pool_pages_ = pages;
}

bf16* CpuDevice::SlotPtr(std::span<const int32_t> pages, int64_t slot) const {
  const int64_t index = slot / kKvPageTokens;
  Check(slot >= 0 && index < static_cast<int64_t>(pages.size()), "KV slot beyond the pages");
  const int32_t page = pages[static_cast<size_t>(index)];
  Check(page >= 0 && page < pool_pages_, "KV page beyond the pool");
  const int64_t slot_elements = int64_t{2} * pool_shape_.kv_heads * pool_shape_.head_dim;
  return static_cast<bf16*>(pool_->data()) +
         (int64_t{page} * kKvPageTokens + slot % kKvPageTokens) * slot_elements;
}

void CpuDevice::CheckKvRows(std::span<const int64_t> slots, const Tensor& k,
                            const Tensor& v) const {
  const int64_t cols = int64_t{pool_shape_.kv_heads} * pool_shape_.head_dim;
  Check(pool_ != nullptr, "KV access before CreateKvPool");
  Check(static_cast<int64_t>(slots.size()) == k.rows && v.rows == k.rows && k.cols == cols &&
            v.cols == cols,
        "KV rows do not fit the pool");
}

void CpuDevice::StoreKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                        Tensor v) {
  CheckKvRows(slots, k, v);
  const int64_t dim = pool_shape_.head_dim;
  for (int64_t i = 0; i < k.rows; ++i) {
    bf16* slot = SlotPtr(pages, slots[static_cast<size_t>(i)]);
    for (const auto& [tensor, offset] : {std::pair(k, int64_t{0}), std::pair(v, dim)}) {
      for (int64_t h = 0; h < pool_shape_.kv_heads; ++h) {
        bf16* out = slot + 2 * h * dim + offset;
        if (tensor.type == DType::kF32) {
          kernels_.to_bf16(RowPtr<float>(tensor, i) + h * dim, out, dim);
        } else {
          Check(tensor.type == DType::kBf16, "StoreKv: f32 and bf16 only");
          std::copy_n(RowPtr<bf16>(tensor, i) + h * dim, dim, out);
        }
      }
    }
  }
}

void CpuDevice::LoadKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                       Tensor v) {
  CheckKvRows(slots, k, v);
  Check(k.type == DType::kBf16 && v.type == DType::kBf16, "LoadKv: bf16 only");
  const int64_t dim = pool_shape_.head_dim;
  for (int64_t i = 0; i < k.rows; ++i) {
    const bf16* slot = SlotPtr(pages, slots[static_cast<size_t>(i)]);
    for (int64_t h = 0; h < pool_shape_.kv_heads; ++h) {
      std::copy_n(slot + 2 * h * dim, dim, RowPtr<bf16>(k, i) + h * dim);
      std::copy_n(slot + (2 * h + 1) * dim, dim, RowPtr<bf16>(v, i) + h * dim);
    }
  }
}

void CpuDevice::PackKv(Tensor k, Tensor v, Tensor out) {
  CheckPackKv(k, v, out);
  const int64_t dim = out.cols / 2;
  ForRows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t head = r / k.rows, i = r % k.rows;
      std::copy_n(RowPtr<bf16>(k, i) + head * dim, dim, RowPtr<bf16>(out, r));
      std::copy_n(RowPtr<bf16>(v, i) + head * dim, dim, RowPtr<bf16>(out, r) + dim);
    }
  });
}

void CpuDevice::UnpackKv(Tensor in, Tensor k, Tensor v) {
  CheckPackKv(k, v, in);
  const int64_t dim = in.cols / 2;
  ForRows(in.rows, in.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t head = r / k.rows, i = r % k.rows;
      std::copy_n(RowPtr<bf16>(in, r), dim, RowPtr<bf16>(k, i) + head * dim);
      std::copy_n(RowPtr<bf16>(in, r) + dim, dim, RowPtr<bf16>(v, i) + head * dim);
    }
  });
}

namespace {

// A run of pages of one sequence and KV head: one task. Runs are cut the same way whatever the
// batch and the threads, and merged in order.
struct PageRun {
  int64_t row;
  int64_t kv_head;
  int64_t begin, end;  // tokens
};

}  // namespace

void CpuDevice::DecodeAttention(Tensor q, std::span<const KvView> views, Partials out) {
  Check(pool_ != nullptr, "DecodeAttention before CreateKvPool");
  const int64_t n = q.rows;
  const int64_t dim = pool_shape_.head_dim;
  const int64_t group = pool_shape_.group();
  Check(q.type == DType::kF32 && q.cols == pool_shape_.heads * dim &&
            static_cast<int64_t>(views.size()) == n,
        "DecodeAttention: q and views disagree");
  Check(out.max.rows == n && out.den.rows == n && out.num.rows == n &&
            out.max.cols == pool_shape_.heads && out.den.cols == pool_shape_.heads &&
            out.num.cols == q.cols,
        "DecodeAttention: out does not fit");
  constexpr int64_t kRunTokens = 16 * kKvPageTokens;
  std::vector<PageRun> runs;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t tokens = views[static_cast<size_t>(i)].tokens;
    for (int64_t h = 0; h < pool_shape_.kv_heads; ++h) {
      for (int64_t t = 0; t < tokens; t += kRunTokens) {
        runs.push_back({i, h, t, std::min(tokens, t + kRunTokens)});
      }
    }
  }
  const int64_t size = group * (dim + 2);  // of a run's partials: max, den, num
  const auto run_count = static_cast<int64_t>(runs.size());
  float* partials = decode_scratch_.Get<float>(run_count * size);
  context_.executor.For(run_count, 2, [&](int64_t begin, int64_t end) {
    float* query = row_scratch_.local().Get<float>(group * dim);
    for (int64_t r = begin; r < end; ++r) {
      const PageRun& run = runs[static_cast<size_t>(r)];
      const KvView& view = views[static_cast<size_t>(run.row)];
      float* max = partials + r * size;
      float* den = max + group;
      float* num = den + group;
      std::fill_n(max, group, kEmptyMax);
      std::fill_n(den, group * (dim + 1), 0.0f);
      const float* source = RowPtr<float>(q, run.row) + run.kv_head * group * dim;
      for (int64_t j = 0; j < group * dim; ++j) query[j] = source[j] * pool_shape_.scale;
      for (int64_t t = run.begin; t < run.end; t += kKvPageTokens) {
        kernels_.attend_page(
            query, SlotPtr(view.pages, t) + 2 * run.kv_head * dim, 2 * dim * pool_shape_.kv_heads,
            std::min<int64_t>(kKvPageTokens, run.end - t), group, dim, max, den, num);
      }
    }
  });
  ClearPartials(out);
  for (int64_t r = 0; r < run_count; ++r) {
    const PageRun& run = runs[static_cast<size_t>(r)];
    const float* max = partials + r * size;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = run.kv_head * group + g;
      MergePartial({RowPtr<float>(out.max, run.row) + head, RowPtr<float>(out.den, run.row) + head,
                    RowPtr<float>(out.num, run.row) + head * dim},
                   max[g], max[group + g], max + 2 * group + g * dim, static_cast<size_t>(dim));
    }
  }
}

}  // namespace passel::gpu::cpu
