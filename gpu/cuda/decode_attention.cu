// The KV pool and exact attention of decode batches over its pages, split over tokens
// (Flash-Decoding): a block takes a run of one sequence's tokens for one KV head and all or part of
// its group of query heads, so that K and V are read once; a second kernel merges the runs in
// order.

#include "gpu/cuda/decode_attention.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

__device__ inline void Unpack(const uint4& packed, float* out) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// kLanes lanes hold a token's head vector, 8 elements each (head_dim ≤ 8·kLanes); a warp takes
// 32 / kLanes tokens side by side, and a lane kUnroll such tokens a step. Each group of lanes keeps
// its own online softmax for kHeads query heads; they are merged at the end, in a fixed order.
template <int kLanes, int kHeads>
__global__ void __launch_bounds__(kDecodeThreads) SplitKernel(DecodeArgs a, int32_t parts) {
  constexpr int kSideBySide = 32 / kLanes;
  constexpr int kUnroll = kHeads > 4 ? 2 : 4;
  __shared__ float warp_max[kDecodeWarps][kHeads], warp_den[kDecodeWarps][kHeads];
  __shared__ float warp_num[kDecodeWarps][kHeads][8 * kLanes];

  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.z;
  const DecodeRow cut = a.rows[row];
  const int split = static_cast<int>(blockIdx.x);
  if (split >= cut.splits) return;
  const int32_t dim = a.shape.head_dim, group = (a.shape.heads / a.shape.kv_heads);
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y) / parts;
  const int32_t first_in_group = static_cast<int32_t>(blockIdx.y) % parts * kHeads;
  const int32_t heads = min(kHeads, group - first_in_group);
  const int32_t first_head = kv_head * group + first_in_group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int col = lane % kLanes * 8;
  const bool active = col < dim;

  float q[kHeads][8], num[kHeads][8], max[kHeads], den[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    max[g] = -INFINITY;
    den[g] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      num[g][j] = 0;
      q[g][j] = active && g < heads
                    ? F32Row(a.q, row)[int64_t{first_head + g} * dim + col + j] * a.shape.scale
                    : 0.0f;
    }
  }

  const int64_t begin = split * cut.split_tokens;
  const int64_t end = min(cut.tokens, begin + cut.split_tokens);
  const int64_t slot_elements = int64_t{2} * a.shape.kv_heads * dim;
  for (int64_t step = begin; step < end; step += kDecodeWarps * kSideBySide * kUnroll) {
    uint4 k[kUnroll], v[kUnroll];
    bool valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t token = step + (u * kDecodeWarps + warp) * kSideBySide + lane / kLanes;
      valid[u] = token < end;
      k[u] = v[u] = make_uint4(0, 0, 0, 0);
      if (valid[u] && active) {
        const int64_t page = a.pages[cut.first_page + token / kKvPageTokens];
        const __nv_bfloat16* head = a.pool +
                                    (page * kKvPageTokens + token % kKvPageTokens) * slot_elements +
                                    int64_t{2} * kv_head * dim + col;
        k[u] = *reinterpret_cast<const uint4*>(head);
        v[u] = *reinterpret_cast<const uint4*>(head + dim);
      }
    }
    float scores[kUnroll][kHeads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[8];
      Unpack(k[u], key);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) dot = fmaf(q[g][j], key[j], dot);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        }
        scores[u][g] = valid[u] ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      float new_max = max[g];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) new_max = fmaxf(new_max, scores[u][g]);
      if (new_max == -INFINITY) continue;  // none of this group of lanes' tokens is valid yet
      const float shrink = __expf(max[g] - new_max);  // 0 where max is −∞
      max[g] = new_max;
      den[g] *= shrink;
#pragma unroll
      for (int j = 0; j < 8; ++j) num[g][j] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        scores[u][g] = __expf(scores[u][g] - new_max);
        den[g] += scores[u][g];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!valid[u]) continue;
      float value[8];
      Unpack(v[u], value);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int j = 0; j < 8; ++j) num[g][j] = fmaf(scores[u][g], value[j], num[g][j]);
      }
    }
  }

  // The groups of lanes of a warp, then the warps.
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float other = __shfl_xor_sync(0xffffffffu, max[g], offset);
      const float new_max = fmaxf(max[g], other);
      const float own_weight = RescaleWeight(max[g], new_max);
      const float other_weight = RescaleWeight(other, new_max);
      max[g] = new_max;
      den[g] = own_weight * den[g] + other_weight * __shfl_xor_sync(0xffffffffu, den[g], offset);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        num[g][j] =
            own_weight * num[g][j] + other_weight * __shfl_xor_sync(0xffffffffu, num[g][j], offset);
      }
    }
  }
  if (lane < kLanes) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      if (lane == 0) {
        warp_max[warp][g] = max[g];
        warp_den[warp][g] = den[g];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) warp_num[warp][g][col + j] = num[g][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * dim; i += kDecodeThreads) {
    const int g = i / dim, j = i % dim;
    float new_max = warp_max[0][g];
    for (int w = 1; w < kDecodeWarps; ++w) new_max = fmaxf(new_max, warp_max[w][g]);
    float total = 0, sum = 0;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = RescaleWeight(warp_max[w][g], new_max);
      total += weight * warp_den[w][g];
      sum += weight * warp_num[w][g][j];
    }
    const HeadResult result = cut.splits == 1
                                  ? RowResult(a, row, first_head + g)
                                  : SplitResult(a, cut.first_partial + split, first_head + g);
    result.num[j] = sum;
    if (j == 0) {
      *result.max = new_max;
      *result.den = total;
    }
  }
}

// One block a (head, row): merges the row's splits in order.
__global__ void __launch_bounds__(kDecodeThreads) MergeSplitsKernel(DecodeArgs a) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int32_t head = static_cast<int32_t>(blockIdx.x);
  const int64_t row = blockIdx.y;
  const DecodeRow cut = a.rows[row];
  if (cut.splits == 1) return;
  float max = -INFINITY;
  for (int s = 0; s < cut.splits; ++s) {
    max = fmaxf(max, *SplitResult(a, cut.first_partial + s, head).max);
  }
  const HeadResult result = RowResult(a, row, head);
  for (int j = threadIdx.x; j < a.shape.head_dim; j += kDecodeThreads) {
    float den = 0, num = 0;
    for (int s = 0; s < cut.splits; ++s) {
      const HeadResult part = SplitResult(a, cut.first_partial + s, head);
      const float weight = RescaleWeight(*part.max, max);
      den += weight * *part.den;
      num += weight * part.num[j];
    }
    result.num[j] = num;
    if (j == 0) {
      *result.max = max;
      *result.den = den;
    }
  }
}

template <int kLanes, int kHeads>
void LaunchSplits(cudaStream_t stream, const DecodeArgs& args, int32_t max_splits) {
  const int32_t parts = (args.shape.group() + kHeads - 1) / kHeads;
  const dim3 grid(static_cast<unsigned>(max_splits),
                  static_cast<unsigned>(args.shape.kv_heads * parts),
                  static_cast<unsigned>(args.q.rows));
  LaunchBehind(stream, grid, kDecodeThreads, 0, "launch of DecodeAttention",
               SplitKernel<kLanes, kHeads>, args, parts);
}

template <int kLanes>
void LaunchForGroup(cudaStream_t stream, const DecodeArgs& args, int32_t max_splits) {
  const int32_t group = args.shape.group();
  if (group == 1) return LaunchSplits<kLanes, 1>(stream, args, max_splits);
  if (group == 2) return LaunchSplits<kLanes, 2>(stream, args, max_splits);
  if (group <= 4) return LaunchSplits<kLanes, 4>(stream, args, max_splits);
  return LaunchSplits<kLanes, 8>(stream, args, max_splits);
}

struct KeyAndValue {
  Four k, v;
};

// K of all heads (part 0) or V (1) at a slot, as rows of kv_heads · 2 · head_dim elements.
__device__ inline Tensor SlotRows(const PoolView& pool, int64_t part) {
  const int64_t dim = pool.shape.head_dim, cols = 2 * pool.shape.kv_heads * dim;
  return {static_cast<__nv_bfloat16*>(pool.data) + part * dim, DType::kBf16, 0, cols, cols};
}

}  // namespace

void CutDecodeRow(DecodeRow* row) {
  // Enough splits to fill a large GPU with one sequence; few enough to merge quickly.
  constexpr int64_t kMinSplitTokens = 8 * kKvPageTokens;
  constexpr int64_t kMaxSplits = 128;
  const int64_t share = (row->tokens + kMaxSplits - 1) / kMaxSplits;
  const int64_t pages = (share + kKvPageTokens - 1) / kKvPageTokens;
  row->split_tokens =
      pages * kKvPageTokens > kMinSplitTokens ? pages * kKvPageTokens : kMinSplitTokens;
  const int64_t splits = (row->tokens + row->split_tokens - 1) / row->split_tokens;
  row->splits = splits > 1 ? static_cast<int32_t>(splits) : 1;
}

void LaunchStoreKv(cudaStream_t stream, PoolView pool, const int64_t* slots, Tensor k, Tensor v) {
  const int64_t dim = pool.shape.head_dim;
  ForFours(
      stream, k.rows, pool.shape.kv_heads, dim,
      [=] __device__(int64_t i, int64_t h, int64_t j, int count) {
        return KeyAndValue{LoadFour(k, i, h * dim + j, count), LoadFour(v, i, h * dim + j, count)};
      },
      [=] __device__(int64_t i, int64_t h, int64_t j, int count, const KeyAndValue& both) {
        StoreFour(SlotRows(pool, 0), slots[i], 2 * h * dim + j, count, both.k);
        StoreFour(SlotRows(pool, 1), slots[i], 2 * h * dim + j, count, both.v);
      });
}

void LaunchLoadKv(cudaStream_t stream, PoolView pool, const int64_t* slots, Tensor k, Tensor v) {
  const int64_t dim = pool.shape.head_dim;
  ForFours(
      stream, k.rows, pool.shape.kv_heads, dim,
      [=] __device__(int64_t i, int64_t h, int64_t j, int count) {
        return KeyAndValue{LoadFour(SlotRows(pool, 0), slots[i], 2 * h * dim + j, count),
                           LoadFour(SlotRows(pool, 1), slots[i], 2 * h * dim + j, count)};
      },
      [=] __device__(int64_t i, int64_t h, int64_t j, int count, const KeyAndValue& both) {
        StoreFour(k, i, h * dim + j, count, both.k);
        StoreFour(v, i, h * dim + j, count, both.v);
      });
}

void LaunchPackKv(cudaStream_t stream, Tensor k, Tensor v, Tensor out) {
  const int64_t dim = out.cols / 2, rows = k.rows;
  ForFours(
      stream, out.rows, 1, dim,
      [=] __device__(int64_t r, int64_t, int64_t j, int count) {
        const int64_t i = r % rows, from = r / rows * dim + j;
        return KeyAndValue{LoadFour(k, i, from, count), LoadFour(v, i, from, count)};
      },
      [=] __device__(int64_t r, int64_t, int64_t j, int count, const KeyAndValue& both) {
        StoreFour(out, r, j, count, both.k);
        StoreFour(out, r, dim + j, count, both.v);
      });
}

void LaunchUnpackKv(cudaStream_t stream, Tensor in, Tensor k, Tensor v) {
  const int64_t dim = in.cols / 2, rows = k.rows;
  ForFours(
      stream, in.rows, 1, dim,
      [=] __device__(int64_t r, int64_t, int64_t j, int count) {
        return KeyAndValue{LoadFour(in, r, j, count), LoadFour(in, r, dim + j, count)};
      },
      [=] __device__(int64_t r, int64_t, int64_t j, int count, const KeyAndValue& both) {
        const int64_t i = r % rows, to = r / rows * dim + j;
        StoreFour(k, i, to, count, both.k);
        StoreFour(v, i, to, count, both.v);
      });
}

void LaunchDecodeAttention(cudaStream_t stream, PoolView pool, Tensor q, const int32_t* pages,
                           const DecodeRow* rows, int32_t max_splits, float* scratch,
                           Partials out) {
  const DecodeArgs args{
      q, static_cast<const __nv_bfloat16*>(pool.data), pages, rows, pool.shape, scratch, out};
  const int32_t dim = pool.shape.head_dim;
  if (FitsMatrixDecode(pool.shape)) {
    LaunchMatrixSplits(stream, args, max_splits);
  } else if (dim <= 32) {
    LaunchForGroup<4>(stream, args, max_splits);
  } else if (dim <= 64) {
    LaunchForGroup<8>(stream, args, max_splits);
  } else if (dim <= 128) {
    LaunchForGroup<16>(stream, args, max_splits);
  } else {
    LaunchForGroup<32>(stream, args, max_splits);
  }
  if (max_splits > 1) {
    const dim3 grid(static_cast<unsigned>(pool.shape.heads), static_cast<unsigned>(q.rows));
    LaunchBehind(stream, grid, kDecodeThreads, 0, "launch of DecodeAttention's merge",
                 MergeSplitsKernel, args);
  }
}

}  // namespace passel::gpu::cuda
