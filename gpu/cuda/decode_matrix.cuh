#pragma once

#include "gpu/cuda/decode_attention.cuh"
#include "gpu/cuda/matrix_units.cuh"

// Decode attention on the matrix units: a warp's step of 16 tokens, for the usual head sizes and
// groups of up to 8 query heads.
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
namespace passel::gpu::cuda {

inline constexpr int kMatrixTokens = 16;  // of a warp's step
inline constexpr float kLog2E = 1.44269504f;

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

// The operand of 16 elements of a head's query, from block·32 + 8·t + 4·half on, 4 a lane. scale:
// times kLog2E, as weights are powers of two. q: null beyond the group's heads.
__device__ inline void QueryOperand(const float* q, int block, int half, int t, float scale,
                                    uint32_t (&out)[4]) {
  float x[4] = {};
  if (q != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = q[block * 32 + t * 8 + half * 4 + i] * scale;
  }
  SplitBf16(x[0], x[1], &out[0], &out[1]);
  SplitBf16(x[2], x[3], &out[2], &out[3]);
}

// Keys of a step's first `count` tokens, zeros for others. step: the first token's K; slot:
// elements from one token to the next.
template <int kKeyBlocks>
__device__ inline void LoadKeys(const __nv_bfloat16* step, int64_t slot, int64_t count, int g,
                                int t, uint4 (&k)[2][kKeyBlocks]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int token = tile * 8 + g;
#pragma unroll
    for (int b = 0; b < kKeyBlocks; ++b) {
      k[tile][b] =
          token < count ? LoadOnce(step + token * slot + b * 32 + t * 8) : make_uint4(0, 0, 0, 0);
    }
  }
}

// 64 elements of the values, from `step` on.
__device__ inline void LoadValues(const __nv_bfloat16* step, int64_t slot, int64_t count, int g,
                                  int t, uint4 (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 2 * t + i % 2 + i / 2 * 8;
    v[i] = token < count ? LoadOnce(step + token * slot + g * 8) : make_uint4(0, 0, 0, 0);
  }
}

// c += scores of 8 tokens and 32 elements: head g's of tokens 2t and 2t + 1, of both halves.
__device__ inline void AddScores(const uint32_t (&q)[2][4], const uint4& k, float (&c)[4]) {
  MultiplyAdd(c, q[0], k.x, k.y);
  MultiplyAdd(c, q[1], k.z, k.w);
}

// s[tile]: head g's scores of tokens 8·tile + 2t and the next.
__device__ inline float MaxOfScores(const float (&s)[2][2]) {
  float max = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
  max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
  return fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
}

// p: weights 2^(s − base) as an operand; returns their sum.
__device__ inline float WeightOperand(const float (&s)[2][2], float base, uint32_t (&p)[4]) {
  float sum = 0;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float x = exp2f(s[tile][0] - base), y = exp2f(s[tile][1] - base);
    sum += x + y;
    SplitBf16(x, y, &p[2 * tile], &p[2 * tile + 1]);
  }
  return sum;
}

// num[j] += elements 8·(2t) + j and 8·(2t + 1) + j of 64, of both halves.
__device__ inline void AddValues(const uint32_t (&p)[4], const uint4 (&v)[4], float (&num)[8][4]) {
  const auto pairs = [&](uint32_t first, uint32_t second, uint32_t third, uint32_t fourth, int j) {
    MultiplyAdd(num[j], p, __byte_perm(first, second, 0x5410), __byte_perm(third, fourth, 0x5410));
    MultiplyAdd(num[j + 1], p, __byte_perm(first, second, 0x7632),
                __byte_perm(third, fourth, 0x7632));
  };
  pairs(v[0].x, v[1].x, v[2].x, v[3].x, 0);
  pairs(v[0].y, v[1].y, v[2].y, v[3].y, 2);
  pairs(v[0].z, v[1].z, v[2].z, v[3].z, 4);
  pairs(v[0].w, v[1].w, v[2].w, v[3].w, 6);
}

// A warp's max and den of each head, where MergeWarps looks for them. den: this lane's part of it.
__device__ inline void KeepMaxAndDen(float max, float den, int g, int t, float (&max_of)[8],
                                     float (&den_of)[8]) {
  den += __shfl_xor_sync(0xffffffffu, den, 1);
  den += __shfl_xor_sync(0xffffffffu, den, 2);
  if (t == 0) {
    max_of[g] = max;
    den_of[g] = den;
  }
}

// What the warps of a block found, merged and written. max (to base 2), den: [warps][8]; num:
// [warps][num_heads][dim]; in shared memory.
__device__ inline void MergeWarps(const float (*max)[8], const float (*den)[8], const float* num,
                                  int num_heads, int warps, int group, int dim, auto result_of) {
  for (int i = threadIdx.x; i < group * dim; i += blockDim.x) {
    const int head = i / dim, j = i % dim;
    float new_max = max[0][head];
    for (int w = 1; w < warps; ++w) new_max = fmaxf(new_max, max[w][head]);
    float total = 0, sum = 0;
    for (int w = 0; w < warps; ++w) {
      const float own = max[w][head];
      const float weight = own == -INFINITY ? 0.0f : exp2f(own - new_max);
      total += weight * den[w][head];
      sum += weight * num[(w * num_heads + head) * dim + j];
    }
    const HeadResult result = result_of(head);
    result.num[j] = sum;
    if (j == 0) {
      *result.max = new_max * 0.693147181f;  // to base e
      *result.den = total;
    }
  }
}

}  // namespace passel::gpu::cuda
