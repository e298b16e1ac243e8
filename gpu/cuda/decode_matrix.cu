// Decode attention on the matrix units, for the usual head sizes and groups of up to 8 query heads.
//
// The general units would be the limit, not memory: 4 query heads that share a KV head cost 65
// instructions a token, and 10 here. K and V go from memory to the registers that the matrix units
// read. Rows 0 … 7 of an operand are the query heads, rounded to bf16, rows 8 … 15 what rounding
// left: both halves of a product are summed, so queries and weights count with 16 bits and the
// padding of 8 heads to 16 rows is put to use.
//
// Inside a warp, lane 4·g + t holds: of queries and scores head g; of K token g and, in each 32
// elements, 8 from 8·t on; of V tokens 2t, 2t + 1, 2t + 8 and 2t + 9 and, in each 64 elements, 8
// from 8·g on.

#include "gpu/cuda/decode_attention.cuh"
#include "gpu/cuda/matrix_units.cuh"

namespace passel::gpu::cuda {
namespace {

constexpr int kTokens = 16;  // of a warp's step

// K and V are read once: not to be kept in L1.
__device__ inline uint4 LoadOnce(const __nv_bfloat16* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ inline uint32_t Pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
}

// Two numbers as bf16, and what that leaves of them.
__device__ inline void SplitBf16(float x, float y, uint32_t* rounded, uint32_t* rest) {
  const __nv_bfloat16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
  *rounded = Pack(a, b);
  *rest = Pack(__float2bfloat16_rn(x - __bfloat162float(a)),
               __float2bfloat16_rn(y - __bfloat162float(b)));
}

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
  if (split >= cut.splits) return;
  const int32_t group = a.shape.heads / a.shape.kv_heads;
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y);
  const int32_t first_head = kv_head * group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // q[b][half]: the operand of 16 elements: those from 32·b + 8·t + 4·half on, 4 a lane.
  uint32_t q[kKeyBlocks][2][4];
  {
    // Scores to base 2, as exp2f wants them.
    const float scale = a.shape.scale * 1.44269504f;
    const float* q_row = F32Row(a.q, row) + int64_t{first_head + g} * kDim;
#pragma unroll
    for (int b = 0; b < kKeyBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[4] = {};
        if (g < group) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = q_row[b * 32 + t * 8 + half * 4 + i] * scale;
        }
        SplitBf16(x[0], x[1], &q[b][half][0], &q[b][half][1]);
        SplitBf16(x[2], x[3], &q[b][half][2], &q[b][half][3]);
      }
    }
  }

  const int64_t begin = split * cut.split_tokens;
  const int64_t end = min(cut.tokens, begin + cut.split_tokens);
  const int64_t slot = int64_t{2} * a.shape.kv_heads * kDim;
  const __nv_bfloat16* pool = a.pool + int64_t{2} * kv_head * kDim;
  const int32_t* pages = a.pages + cut.first_page;
  // A warp's step lies in one page: splits begin at pages, which steps divide.
  const auto page_of = [&](int64_t step) {
    const int64_t at = step + warp * kTokens;
    return pool + (at < end ? pages[at / kKvPageTokens] : 0) * kKvPageTokens * slot +
           at % kKvPageTokens * slot;
  };
  uint4 k[2][kKeyBlocks], v[kValueBlocks][4];
  const auto load_keys = [&](const __nv_bfloat16* page, int64_t step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int token = tile * 8 + g;
      const bool inside = step + warp * kTokens + token < end;
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b) {
        k[tile][b] =
            inside ? LoadOnce(page + token * slot + b * 32 + t * 8) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  const auto load_values = [&](const __nv_bfloat16* page, int64_t step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * t + i % 2 + i / 2 * 8;
      const bool inside = step + warp * kTokens + token < end;
#pragma unroll
      for (int b = 0; b < kValueBlocks; ++b) {
        v[b][i] =
            inside ? LoadOnce(page + token * slot + kDim + b * 64 + g * 8) : make_uint4(0, 0, 0, 0);
      }
    }
  };

  constexpr int kStep = kDecodeWarps * kTokens;
  // num[b][j]: elements 64·b + 8·(2t) + j and 64·b + 8·(2t + 1) + j, of both halves.
  float num[kValueBlocks][8][4] = {}, max = -INFINITY, den = 0;
  const __nv_bfloat16* page = page_of(begin);
  load_keys(page, begin);
  load_values(page, begin);
  for (int64_t step = begin; step < end; step += kStep) {
    const __nv_bfloat16* next_page = page_of(step + kStep);
    float s[2][2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float c[4] = {};
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b) {
        const uint4 key = k[tile][b];
        MultiplyAdd(c, {q[b][0][0], q[b][0][1], q[b][0][2], q[b][0][3]}, key.x, key.y);
        MultiplyAdd(c, {q[b][1][0], q[b][1][1], q[b][1][2], q[b][1][3]}, key.z, key.w);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = step + warp * kTokens + tile * 8 + 2 * t + i < end;
        s[tile][i] = inside ? c[i] + c[i + 2] : -INFINITY;
      }
    }
    load_keys(next_page, step + kStep);
    float new_max = fmaxf(max, fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1])));
    new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
    new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
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
    // A warp without a token yet: any finite maximum keeps the weights 0.
    const float base = max == -INFINITY ? 0.0f : max;
    uint32_t p[4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float x = exp2f(s[tile][0] - base), y = exp2f(s[tile][1] - base);
      den += x + y;
      SplitBf16(x, y, &p[2 * tile], &p[2 * tile + 1]);
    }
#pragma unroll
    for (int b = 0; b < kValueBlocks; ++b) {
      const auto pairs = [&](uint32_t first, uint32_t second, uint32_t third, uint32_t fourth,
                             int j) {
        MultiplyAdd(num[b][j], p, __byte_perm(first, second, 0x5410),
                    __byte_perm(third, fourth, 0x5410));
        MultiplyAdd(num[b][j + 1], p, __byte_perm(first, second, 0x7632),
                    __byte_perm(third, fourth, 0x7632));
      };
      pairs(v[b][0].x, v[b][1].x, v[b][2].x, v[b][3].x, 0);
      pairs(v[b][0].y, v[b][1].y, v[b][2].y, v[b][3].y, 2);
      pairs(v[b][0].z, v[b][1].z, v[b][2].z, v[b][3].z, 4);
      pairs(v[b][0].w, v[b][1].w, v[b][2].w, v[b][3].w, 6);
    }
    load_values(next_page, step + kStep);
  }

  den += __shfl_xor_sync(0xffffffffu, den, 1);
  den += __shfl_xor_sync(0xffffffffu, den, 2);
  if (t == 0) {
    warp_max[warp][g] = max;
    warp_den[warp][g] = den;
  }
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
  for (int i = threadIdx.x; i < group * kDim; i += kDecodeThreads) {
    const int head = i / kDim, j = i % kDim;
    float new_max = warp_max[0][head];
    for (int w = 1; w < kDecodeWarps; ++w) new_max = fmaxf(new_max, warp_max[w][head]);
    float total = 0, sum = 0;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float own = warp_max[w][head];
      const float weight = own == -INFINITY ? 0.0f : exp2f(own - new_max);
      total += weight * warp_den[w][head];
      sum += weight * warp_num[w][head][j];
    }
    const HeadResult result = cut.splits == 1
                                  ? RowResult(a, row, first_head + head)
                                  : SplitResult(a, cut.first_partial + split, first_head + head);
    result.num[j] = sum;
    if (j == 0) {
      *result.max = new_max * 0.693147181f;  // to base e
      *result.den = total;
    }
  }
}

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
