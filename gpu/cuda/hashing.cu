// SimHash codes: product with the projections, sign and packing in one pass.
//
// On the matrix units with three float16 products for each float32 one: an operand, scaled by a
// power of two to the middle of their range, is the sum of two float16 numbers, and only the
// product of the two small parts, 2^-22 of the whole, is left out. A sign near 0 must not flip
// because an operand was rounded, and scales do not change it. A vector's sums do not depend on its
// neighbours, so it has the same codes alone and in a batch.

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "gpu/cuda/async_copy.cuh"
#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, 16 vectors each
constexpr int kThreads = 32 * kWarps;
constexpr int kVectors = 16 * kWarps;

// So many blocks of many tables leave processors idle.
constexpr unsigned kFewBlocks = 64;

// Codes for host memory, which takes whole lines much faster than pieces, are put together here
// first; the last block of some vectors writes them to where they belong.
constexpr int64_t kGathered = 64;  // runs of kVectors
constexpr int64_t kGatheredCodes = int64_t{1} << 19;
struct HashScratch {
  uint32_t counts[kGathered];  // of blocks that are through, by their vectors
  alignas(16) uint16_t codes[kGatheredCodes];
};

struct HashArgs {
  const uint4* projections;  // [tables · kBits, dim / 4], as PackProjections makes them
  int32_t dim, bits, tables;
  Tensor x, mean, codes;
  HashScratch* scratch;  // null: codes go where they belong at once
};

constexpr int kScaledExponent = 10;  // of the largest element, scaled

struct Split {
  uint32_t large[2], small[2];  // of 4 numbers
};

__device__ inline uint32_t PackHalves(__half low, __half high) {
  return uint32_t{__half_as_ushort(low)} | uint32_t{__half_as_ushort(high)} << 16;
}

__device__ inline Split SplitHalf(const float (&values)[4], float scale) {
  __half large[4], small[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = values[i] * scale;
    large[i] = __float2half_rn(x);
    small[i] = __float2half_rn(x - __half2float(large[i]));
  }
  return {{PackHalves(large[0], large[1]), PackHalves(large[2], large[3])},
          {PackHalves(small[0], small[1]), PackHalves(small[2], small[3])}};
}

// The power of two that brings `largest` ≥ 0 to an exponent of kScaledExponent.
__device__ inline float ScaleFor(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  return __uint_as_float(static_cast<uint32_t>(min(2 * 127 + kScaledExponent - exponent, 254))
                         << 23);
}

__device__ inline uint4 LoadShared(const float* p) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(SharedAddress(p)));
  return v;
}

// c: [16, 8] += a: [16, 16] · b: [16, 8].
__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&low)[2],
                                   const uint32_t (&high)[2], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(b0), "r"(b1));
}

// Where a head vector lies; row < 0 beyond the last.
struct VectorPlace {
  int64_t row, col;
};

// Elements [at, at + 4) of a head vector, centred; zeros beyond the vectors and dim. kWide: x and
// mean are f32 and can be read 16 bytes at a time.
template <bool kWide>
__device__ inline void LoadVector(const HashArgs& a, const VectorPlace& place, int at,
                                  float (&out)[4]) {
  if (place.row < 0 || at >= a.dim) {
    out[0] = out[1] = out[2] = out[3] = 0;
    return;
  }
  const int64_t col = place.col + at;
  const float* mean =
      a.mean.data ? F32Row(a.mean, a.mean.rows == 1 ? 0 : place.row) + col : nullptr;
  if constexpr (kWide) {
    const float4 v = *reinterpret_cast<const float4*>(F32Row(a.x, place.row) + col);
    const float4 m = mean ? *reinterpret_cast<const float4*>(mean) : make_float4(0, 0, 0, 0);
    out[0] = v.x - m.x;
    out[1] = v.y - m.y;
    out[2] = v.z - m.z;
    out[3] = v.w - m.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = LoadElement(a.x, place.row, col + i) - (mean ? mean[i] : 0.0f);
    }
  }
}

// How the work is cut. Of many vectors a block has as many tables as shared memory holds: with 10
// bits, the usual number, 2,048 vectors (64 rows of 32 heads) and 150 tables are 256 blocks, two a
// processor. Of few vectors it has few tables, and all of the usual dimensions are under way at
// once.
template <int kTableBits, bool kFew>
struct Cut {
  static constexpr int kBits = kTableBits;  // columns of a table, padded
  static constexpr int kTables = kFew ? 4 : kBits == 10 ? 20 : kBits < 10 ? 16 : 8;
  static constexpr int kDims = kFew ? 128 : 32;  // of a step
  // Rows of the tile of projections are apart by half the banks: the 8 threads that are served at a
  // time, 4 in each of two rows, then meet no bank twice.
  static constexpr int kStride = kDims + 16;
  static constexpr int kColumns = kTables * kBits;
  static constexpr size_t kTileFloats = size_t{kColumns} * kStride;
};

// By all blocks of some vectors when their codes are in scratch memory: the last copies them, and
// resets the count.
__device__ inline void CopyIfLast(const HashArgs& a, int64_t vectors) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* count = a.scratch->counts + blockIdx.x;
    last = atomicAdd(count, 1) + 1 == gridDim.y;
    if (last) *count = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  constexpr int kWide = 8, kAtOnce = 8;  // codes; reads under way
  const int64_t first = int64_t{blockIdx.x} * kVectors * a.tables;
  const int64_t end = min(first + int64_t{kVectors} * a.tables, vectors * a.tables);
  const uint16_t* from = a.scratch->codes;
  auto* to = static_cast<uint16_t*>(a.codes.data);
  const int64_t step = int64_t{kThreads} * kWide;
  for (int64_t at = first + int64_t{threadIdx.x} * kWide; at < end; at += kAtOnce * step) {
    uint4 held[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      if (at + e * step + kWide <= end) {
        held[e] = __ldcg(reinterpret_cast<const uint4*>(from + at + e * step));
      }
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const int64_t i = at + e * step;
      if (i + kWide <= end) {
        *reinterpret_cast<uint4*>(to + i) = held[e];
      } else {
        for (int64_t k = i; k < end; ++k) to[k] = __ldcg(from + k);
      }
    }
  }
}

// Projections come to shared memory one step ahead.
template <typename C, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) HashKernel(HashArgs a) {
  constexpr int kBits = C::kBits, kTables = C::kTables, kColumns = C::kColumns;
  constexpr int kDims = C::kDims, kStride = C::kStride;
  constexpr int kGroups = kColumns / 8;
  constexpr int kSteps = kDims / 16;
  extern __shared__ __align__(16) float r_tiles[];  // [2][kColumns][kStride]
  __shared__ uint32_t signs[kVectors][(kColumns + 31) / 32 + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, piece = lane % 4 * 4;
  const int64_t first_table = int64_t{blockIdx.y} * kTables;
  const int64_t first_column = first_table * kBits, columns = int64_t{a.tables} * kBits;
  const int64_t first_vector = int64_t{blockIdx.x} * kVectors + warp * 16;
  const int64_t heads = a.x.cols / a.dim;
  const int64_t vectors = a.x.rows * heads;
  const auto load_projections = [&](int begin) {
    float* tile = r_tiles + begin / kDims % 2 * C::kTileFloats;
#pragma unroll 2
    for (int i = threadIdx.x; i < kColumns * kDims / 4; i += kThreads) {
      const int c = i / (kDims / 4), d = i % (kDims / 4) * 4;
      // dim is a multiple of 4 (checked by SetProjections).
      const bool inside = begin + d < a.dim && first_column + c < columns;
      CopyAsync16(
          tile + c * kStride + d,
          inside ? a.projections + ((first_column + c) * a.dim + begin + d) / 4 : a.projections,
          inside);
    }
    CommitCopies();
  };
  // Vectors are numbered as their codes lie: by row, or by head.
  const bool by_row = a.codes.rows == a.x.rows;
  const auto place_of = [&](int64_t vector) {
    if (vector >= vectors) return VectorPlace{-1, 0};
    if (by_row) return VectorPlace{vector / heads, vector % heads * a.dim};
    return VectorPlace{vector % a.x.rows, vector / a.x.rows * a.dim};
  };
  const VectorPlace low_place = place_of(first_vector + row);
  const VectorPlace high_place = place_of(first_vector + row + 8);
  // In any order of k, as long as both operands have it: a thread takes 4 neighbours.
  float low_next[kSteps][4], high_next[kSteps][4];
  const auto load_vectors = [&](int begin) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      LoadVector<kWide>(a, low_place, begin + step * 16 + piece, low_next[step]);
      LoadVector<kWide>(a, high_place, begin + step * 16 + piece, high_next[step]);
    }
  };
  load_projections(0);
  LetNextKernelStart();
  WaitForEarlierKernels();
  // The 4 threads that share a vector see all of it.
  float low_largest = 0, high_largest = 0;
#pragma unroll 1
  for (int begin = 0; begin < a.dim; begin += kDims) {
    load_vectors(begin);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low_largest = fmaxf(low_largest, fabsf(low_next[step][i]));
        high_largest = fmaxf(high_largest, fabsf(high_next[step][i]));
      }
    }
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    low_largest = fmaxf(low_largest, __shfl_xor_sync(0xffffffffu, low_largest, offset));
    high_largest = fmaxf(high_largest, __shfl_xor_sync(0xffffffffu, high_largest, offset));
  }
  const float low_scale = ScaleFor(low_largest), high_scale = ScaleFor(high_largest);
  if (a.dim > kDims) load_vectors(0);
  float acc[kGroups][4] = {};
#pragma unroll 1
  for (int begin = 0; begin < a.dim; begin += kDims) {
    Split low[kSteps], high[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      low[step] = SplitHalf(low_next[step], low_scale);
      high[step] = SplitHalf(high_next[step], high_scale);
    }
    if (begin + kDims < a.dim) {
      load_projections(begin + kDims);
      load_vectors(begin + kDims);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    const float* tile = r_tiles + begin / kDims % 2 * C::kTileFloats;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Split &l = low[step], &h = high[step];
      // Groups side by side: a product need not wait for the one before.
      constexpr int kSide = kGroups % 4 == 0 ? 4 : kGroups % 5 == 0 ? 5 : 2;
#pragma unroll
      for (int g = 0; g < kGroups; g += kSide) {
        uint4 b[kSide];  // large parts of 4 numbers, then small ones
#pragma unroll
        for (int s = 0; s < kSide; ++s) {
          b[s] = LoadShared(tile + ((g + s) * 8 + row) * kStride + step * 16 + piece);
        }
#pragma unroll
        for (int s = 0; s < kSide; ++s) MultiplyAdd(acc[g + s], l.small, h.small, b[s].x, b[s].y);
#pragma unroll
        for (int s = 0; s < kSide; ++s) MultiplyAdd(acc[g + s], l.large, h.large, b[s].z, b[s].w);
#pragma unroll
        for (int s = 0; s < kSide; ++s) MultiplyAdd(acc[g + s], l.large, h.large, b[s].x, b[s].y);
      }
    }
    __syncthreads();  // before the copies after next overwrite what was read here
  }
  // Bits of 8 columns from the 4 threads that hold them, as a byte.
  auto* bytes = reinterpret_cast<uint8_t*>(&signs[0][0]);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned bits = (acc[g][2 * half] > 0 ? 1u : 0u) | (acc[g][2 * half + 1] > 0 ? 2u : 0u);
      bits <<= lane % 4 * 2;
      bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
      bits |= __shfl_xor_sync(0xffffffffu, bits, 2);
      if (lane % 4 == 0) {
        bytes[(warp * 16 + row + half * 8) * sizeof(signs[0]) + g] = static_cast<uint8_t>(bits);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kTables; i += 32) {
    const int v = i / kTables, t = i % kTables;
    const int64_t vector = first_vector + v;
    if (vector >= vectors || first_table + t >= a.tables) continue;
    const uint32_t* words = signs[warp * 16 + v] + t * kBits / 32;
    const uint32_t code = __funnelshift_r(words[0], words[1], t * kBits % 32);
    uint16_t* codes = a.scratch != nullptr ? a.scratch->codes + vector * a.tables
                      : by_row             ? static_cast<uint16_t*>(a.codes.data) +
                                     vector / heads * a.codes.stride + vector % heads * a.tables
                               : static_cast<uint16_t*>(a.codes.data) + vector * a.codes.stride;
    codes[first_table + t] = static_cast<uint16_t>(code & ((1u << a.bits) - 1));
  }
  if (a.scratch != nullptr) CopyIfLast(a, vectors);
}

template <typename C>
dim3 GridOf(const HashArgs& args) {
  const int64_t vectors = args.x.rows * (args.x.cols / args.dim);
  return {static_cast<unsigned>((vectors + kVectors - 1) / kVectors),
          static_cast<unsigned>((args.tables + C::kTables - 1) / C::kTables)};
}

template <typename C>
void LaunchCut(cudaStream_t stream, const HashArgs& args) {
  constexpr size_t kBytes = 2 * C::kTileFloats * sizeof(float);
  const auto in_fours = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride % 4 == 0;
  };
  const bool wide = args.x.type == DType::kF32 && in_fours(args.x) &&
                    (args.mean.data == nullptr || in_fours(args.mean));
  const auto kernel = wide ? HashKernel<C, true> : HashKernel<C, false>;
  CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kBytes)),
            "cudaFuncSetAttribute");
  LaunchBehind(stream, GridOf<C>(args), kThreads, kBytes, "launch of HashCodes", kernel, args);
}

template <int kBits>
void Launch(cudaStream_t stream, const HashArgs& args) {
  if (args.x.rows == 0 || args.x.cols < args.dim) return;
  const dim3 blocks = GridOf<Cut<kBits, false>>(args);
  if (blocks.x * blocks.y <= kFewBlocks) {
    LaunchCut<Cut<kBits, true>>(stream, args);
  } else {
    LaunchCut<Cut<kBits, false>>(stream, args);
  }
}

}  // namespace

int32_t HashColumns(int32_t k) {
  return k <= 4 ? 4 : k <= 8 ? 8 : k <= 10 ? 10 : k <= 12 ? 12 : 16;
}

std::vector<uint16_t> PackProjections(std::span<const float> projections) {
  float largest = 0;
  for (const float r : projections) largest = std::max(largest, std::abs(r));
  int exponent = 0;
  std::frexp(largest, &exponent);
  const float scale = std::ldexp(1.0f, kScaledExponent + 1 - exponent);
  std::vector<uint16_t> packed(2 * projections.size());
  for (size_t i = 0; i < projections.size(); ++i) {
    const float r = projections[i] * scale;
    const __half large = __float2half_rn(r);
    const __half small = __float2half_rn(r - __half2float(large));
    uint16_t* four = packed.data() + i / 4 * 8;
    four[i % 4] = static_cast<__half_raw>(large).x;
    four[4 + i % 4] = static_cast<__half_raw>(small).x;
  }
  return packed;
}

size_t HashScratchBytes() { return sizeof(HashScratch); }

void LaunchHashCodes(cudaStream_t stream, const void* projections, int32_t head_dim, int32_t k,
                     int32_t l, void* scratch, Tensor x, Tensor mean, Tensor codes) {
  cudaPointerAttributes where{};
  CheckCuda(cudaPointerGetAttributes(&where, codes.data), "cudaPointerGetAttributes");
  const bool is_host = where.type == cudaMemoryTypeHost;
  const bool gathered = is_host && codes.stride == codes.cols &&
                        reinterpret_cast<uintptr_t>(codes.data) % 16 == 0 &&
                        codes.rows * codes.cols <= kGatheredCodes &&
                        x.rows * (x.cols / head_dim) <= kGathered * kVectors;
  const HashArgs args{static_cast<const uint4*>(projections),
                      head_dim,
                      k,
                      l,
                      x,
                      mean,
                      codes,
                      gathered ? static_cast<HashScratch*>(scratch) : nullptr};
  switch (HashColumns(k)) {
    case 4:
      return Launch<4>(stream, args);
    case 8:
      return Launch<8>(stream, args);
    case 10:
      return Launch<10>(stream, args);
    case 12:
      return Launch<12>(stream, args);
    default:
      return Launch<16>(stream, args);
  }
}

}  // namespace passel::gpu::cuda
