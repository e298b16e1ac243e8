// Decode attention on the matrix units over few tokens, as where a window alone is on the GPU: a
// warp has one step, so all of K and V is under way at once. Registers are kept few, so that all
// blocks of a batch of 64 are resident: the operands of the query lie in shared memory, and the
// values of 64 elements are added and put away before the next ones.

#include <algorithm>

#include "gpu/cuda/decode_matrix.cuh"
#include "gpu/cuda/list_argument.cuh"

namespace passel::gpu::cuda {
namespace {

constexpr int kMaxWarps = kMaxShortTokens / kMatrixTokens;

template <int kDim, size_t kWords>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    ShortKernel(DecodeArgs a, const __grid_constant__ ListArgument<kWords> list) {
  constexpr int kKeyBlocks = kDim / 32, kValueBlocks = kDim / 64;
  __shared__ uint4 query[kKeyBlocks][2][32];
  __shared__ float warp_max[kMaxWarps][8], warp_den[kMaxWarps][8];
  extern __shared__ float warp_num[];  // [warps][group][kDim]
  LetNextKernelStart();
  if (list.uploaded != nullptr) WaitForEarlierKernels();
  const int64_t row = blockIdx.y;
  const int32_t tokens = list[2 * row];
  const int32_t group = a.shape.heads / a.shape.kv_heads;
  const int32_t kv_head = static_cast<int32_t>(blockIdx.x);
  const int32_t first_head = kv_head * group;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  const int64_t first = warp * kMatrixTokens, count = tokens - first;
  const int64_t slot = int64_t{2} * a.shape.kv_heads * kDim;
  const int64_t page = count > 0 ? list[list[2 * row + 1] + first / kKvPageTokens] : 0;
  const __nv_bfloat16* step =
      a.pool + int64_t{2} * kv_head * kDim + (page * kKvPageTokens + first % kKvPageTokens) * slot;
  if (list.uploaded == nullptr) WaitForEarlierKernels();
  if (tokens < 0) return;
  uint4 k[2][kKeyBlocks], v[kValueBlocks][4];
  LoadKeys(step, slot, count, g, t, k);
#pragma unroll
  for (int b = 0; b < kValueBlocks; ++b) {
    LoadValues(step + kDim + b * 64, slot, count, g, t, v[b]);
  }
  // The warps share out the query's operands.
  const float* q_head = g < group ? F32Row(a.q, row) + (int64_t{first_head} + g) * kDim : nullptr;
  for (int i = warp; i < 2 * kKeyBlocks; i += warps) {
    uint32_t q[4];
    QueryOperand(q_head, i / 2, i % 2, t, a.shape.scale * kLog2E, q);
    query[i / 2][i % 2][lane] = make_uint4(q[0], q[1], q[2], q[3]);
  }
  __syncthreads();

  float c[2][4] = {};
#pragma unroll
  for (int b = 0; b < kKeyBlocks; ++b) {
    const uint4 low = query[b][0][lane], high = query[b][1][lane];
    const uint32_t q[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) AddScores(q, k[tile][b], c[tile]);
  }
  float s[2][2];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[tile][i] = tile * 8 + 2 * t + i < count ? c[tile][i] + c[tile][i + 2] : -INFINITY;
    }
  }
  const float max = MaxOfScores(s);
  uint32_t p[4];
  const float den = WeightOperand(s, max == -INFINITY ? 0.0f : max, p);
  KeepMaxAndDen(max, den, g, t, warp_max[warp], warp_den[warp]);
#pragma unroll
  for (int b = 0; b < kValueBlocks; ++b) {
    float num[8][4] = {};
    AddValues(p, v[b], num);
    if (g >= group) continue;
    float* to = warp_num + (warp * group + g) * kDim + b * 64 + 2 * t * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      to[j] = num[j][0] + num[j][2];
      to[8 + j] = num[j][1] + num[j][3];
    }
  }
  __syncthreads();
  MergeWarps(warp_max, warp_den, warp_num, group, warps, group, kDim,
             [&](int head) { return RowResult(a, row, first_head + head); });
}

template <int kDim>
void Launch(cudaStream_t stream, const DecodeArgs& args, std::span<const int32_t> list,
            const int32_t* uploaded, int64_t tokens) {
  const auto warps =
      static_cast<unsigned>(std::max<int64_t>((tokens + kMatrixTokens - 1) / kMatrixTokens, 1));
  const dim3 grid(static_cast<unsigned>(args.shape.kv_heads), static_cast<unsigned>(args.q.rows));
  const size_t shared = warps * static_cast<size_t>(args.shape.group()) * kDim * sizeof(float);
  WithListArgument(list, uploaded, [&]<size_t kWords>(const ListArgument<kWords>& argument) {
    LaunchBehind(stream, grid, 32 * warps, shared, "launch of DecodeAttention",
                 ShortKernel<kDim, kWords>, args, argument);
  });
}

}  // namespace

bool HasShortRows(const AttentionShape& shape) { return FitsMatrixDecode(shape); }

void LaunchShortDecodeAttention(cudaStream_t stream, PoolView pool, Tensor q,
                                std::span<const int32_t> list, const int32_t* uploaded,
                                int64_t max_tokens, Partials out) {
  const DecodeArgs args{
      q, static_cast<const __nv_bfloat16*>(pool.data), nullptr, nullptr, pool.shape, nullptr, out};
  if (pool.shape.head_dim == 64) return Launch<64>(stream, args, list, uploaded, max_tokens);
  Launch<128>(stream, args, list, uploaded, max_tokens);
}

}  // namespace passel::gpu::cuda
