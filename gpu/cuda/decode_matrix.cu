// Decode attention on the matrix units over long runs of tokens: a warp has its next step's K and V
// under way while it is at work on this one's.

#include "gpu/cuda/decode_matrix.cuh"

namespace passel::gpu::cuda {
namespace {

template <int kDim>
__global__ void __launch_bounds__(kDecodeThreads) MatrixSplitKernel(DecodeArgs a) {
  constexpr int kKeyBlocks = kDim / 32, kValueBlocks = kDim / 64;
  __shared__ float warp_max[kDecodeWarps][8], warp_den[kDecodeWarps][8];
  __shared__ float warp_num[kDecodeWarps][8][kDim];
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.z;
  const DecodeRow cut = a.rows[row];
  const int split = static_cast<int>(blockIdx.x);
  if (split >= cut.splits || IsShort(cut.tokens)) return;
  const int32_t group = a.shape.heads / a.shape.kv_heads;
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y);
  const int32_t first_head = kv_head * group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  uint32_t q[kKeyBlocks][2][4];
  {
    const float scale = a.shape.scale * kLog2E;
    const float* q_head = g < group ? F32Row(a.q, row) + (int64_t{first_head} + g) * kDim : nullptr;
#pragma unroll
    for (int b = 0; b < kKeyBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) QueryOperand(q_head, b, half, t, scale, q[b][half]);
    }
  }

  const int64_t begin = split * cut.split_tokens;
  const int64_t end = min(cut.tokens, begin + cut.split_tokens);
  const int64_t slot = int64_t{2} * a.shape.kv_heads * kDim;
  const __nv_bfloat16* pool = a.pool + int64_t{2} * kv_head * kDim;
  const int32_t* pages = a.pages + cut.first_page;
  // A warp's step lies in one page: splits begin at pages, which steps divide.
  const auto step_at = [&](int64_t step) {
    const int64_t at = step + warp * kMatrixTokens;
    return pool + (at < end ? pages[at / kKvPageTokens] : 0) * kKvPageTokens * slot +
           at % kKvPageTokens * slot;
  };
  const auto count_at = [&](int64_t step) { return end - step - warp * kMatrixTokens; };
  uint4 k[2][kKeyBlocks], v[kValueBlocks][4];
  const auto load_values = [&](const __nv_bfloat16* page, int64_t step) {
#pragma unroll
    for (int b = 0; b < kValueBlocks; ++b) {
      LoadValues(page + kDim + b * 64, slot, count_at(step), g, t, v[b]);
    }
  };

  constexpr int kStep = kDecodeWarps * kMatrixTokens;
  float num[kValueBlocks][8][4] = {}, max = -INFINITY, den = 0;
  const __nv_bfloat16* page = step_at(begin);
  LoadKeys(page, slot, count_at(begin), g, t, k);
  load_values(page, begin);
  for (int64_t step = begin; step < end; step += kStep) {
    const __nv_bfloat16* next_page = step_at(step + kStep);
    float s[2][2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float c[4] = {};
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b) AddScores(q[b], k[tile][b], c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[tile][i] = tile * 8 + 2 * t + i < count_at(step) ? c[i] + c[i + 2] : -INFINITY;
      }
    }
    LoadKeys(next_page, slot, count_at(step + kStep), g, t, k);
    const float new_max = fmaxf(max, MaxOfScores(s));
    if (__any_sync(0xffffffffu, new_max > max)) {
      const float shrink = new_max == -INFINITY ? 1.0f : exp2f(max - new_max);
      max = new_max;
      den *= shrink;
#pragma unroll
      for (int b = 0; b < kValueBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) num[b][j][i] *= shrink;
        }
      }
    }
    uint32_t p[4];
    // A warp without a token yet: any finite maximum keeps the weights 0.
    den += WeightOperand(s, max == -INFINITY ? 0.0f : max, p);
#pragma unroll
    for (int b = 0; b < kValueBlocks; ++b) AddValues(p, v[b], num[b]);
    load_values(next_page, step + kStep);
  }

  KeepMaxAndDen(max, den, g, t, warp_max[warp], warp_den[warp]);
#pragma unroll
  for (int b = 0; b < kValueBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        warp_num[warp][g][b * 64 + (2 * t + i) * 8 + j] = num[b][j][i] + num[b][j][i + 2];
      }
    }
  }
  __syncthreads();
  MergeWarps(warp_max, warp_den, warp_num[0][0], 8, kDecodeWarps, group, kDim, [&](int head) {
    return cut.splits == 1 ? RowResult(a, row, first_head + head)
                           : SplitResult(a, cut.first_partial + split, first_head + head);
  });
}

// Rows that are not short, on the matrix units.
template <int kDim>
void Launch(cudaStream_t stream, const DecodeArgs& args, int32_t max_splits) {
  const dim3 grid(static_cast<unsigned>(max_splits), static_cast<unsigned>(args.shape.kv_heads),
                  static_cast<unsigned>(args.q.rows));
  LaunchBehind(stream, grid, kDecodeThreads, 0, "launch of DecodeAttention",
               MatrixSplitKernel<kDim>, args);
}

}  // namespace

bool FitsMatrixDecode(const AttentionShape& shape) {
  return (shape.head_dim == 64 || shape.head_dim == 128) && shape.group() <= 8;
}

void LaunchMatrixSplits(cudaStream_t stream, const DecodeArgs& args, int32_t max_splits) {
  if (args.shape.head_dim == 64) return Launch<64>(stream, args, max_splits);
  Launch<128>(stream, args, max_splits);
}

}  // namespace passel::gpu::cuda
