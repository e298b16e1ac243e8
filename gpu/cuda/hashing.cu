// SimHash codes: product with the projections, sign and packing in one pass.
//
// On the matrix units with three TF32 products for each float32 one: an operand is the sum of two
// TF32 numbers, and only the product of the two small parts, 2^-22 of the whole, is left out. A
// sign near 0 must not flip because an operand was rounded. A vector's sums do not depend on its
// neighbours, so it has the same codes alone and in a batch.

#include "gpu/cuda/async_copy.cuh"
#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, 16 vectors each
constexpr int kThreads = 32 * kWarps;
constexpr int kVectors = 16 * kWarps;
constexpr int kDims = 32;  // of a step
// Rows of the tile of projections are apart by half the banks: the 8 threads that are served at a
// time, 4 in each of two rows, then meet no bank twice.
constexpr int kStride = kDims + 16;

struct HashArgs {
  const float* projections;  // [tables · kBits, dim], zeros where a table is padded
  int32_t dim, bits, tables;
  Tensor x, mean, codes;
  bool aligned;  // rows of x can be read 16 bytes at a time
};

struct Split {
  uint32_t large[4], small[4];
};

// Four numbers as sums of two TF32 numbers each.
__device__ inline Split SplitTf32(const float (&values)[4]) {
  Split s;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s.large[i] = __float_as_uint(values[i]) & 0xffffe000u;
    s.small[i] = __float_as_uint(values[i] - __uint_as_float(s.large[i])) & 0xffffe000u;
  }
  return s;
}

// c: [16, 8] += a: [16, 8] · b: [8, 8].
__device__ inline void MultiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where a head vector lies; row < 0 beyond the last.
struct VectorPlace {
  int64_t row, col;
};

// Elements [at, at + 4) of a head vector, centred; zeros beyond the vectors and dim.
__device__ inline void LoadVector(const HashArgs& a, const VectorPlace& place, int at,
                                  float (&out)[4]) {
  if (place.row < 0 || at >= a.dim) {
    out[0] = out[1] = out[2] = out[3] = 0;
    return;
  }
  const int64_t col = place.col + at;
  if (a.aligned && a.x.type == DType::kF32) {
    const float4 v = *reinterpret_cast<const float4*>(F32Row(a.x, place.row) + col);
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = LoadElement(a.x, place.row, col + i);
  }
  if (a.mean.data) {
    const float* mean = F32Row(a.mean, a.mean.rows == 1 ? 0 : place.row) + col;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] -= mean[i];
  }
}

// Tables of a block, by their padded columns: what shared memory holds.
template <int kBits>
constexpr int kBlockTables = kBits <= 10 ? 16 : 8;
template <int kBits>
constexpr size_t kTileFloats = size_t{kBlockTables<kBits>} * kBits* kStride;

// kBits: columns of a table, padded. Projections come to shared memory one step ahead.
template <int kBits>
__global__ void __launch_bounds__(kThreads, 3) HashKernel(HashArgs a) {
  constexpr int kTables = kBlockTables<kBits>;
  constexpr int kColumns = kTables * kBits;
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
    float* tile = r_tiles + begin / kDims % 2 * kTileFloats<kBits>;
    for (int i = threadIdx.x; i < kColumns * kDims / 4; i += kThreads) {
      const int c = i / (kDims / 4), d = i % (kDims / 4) * 4;
      // dim is a multiple of 4 (checked by SetProjections).
      const bool inside = begin + d < a.dim && first_column + c < columns;
      CopyAsync16(tile + c * kStride + d,
                  inside ? a.projections + (first_column + c) * a.dim + begin + d : a.projections,
                  inside);
    }
    CommitCopies();
  };
  const auto place_of = [&](int64_t vector) {
    return vector < vectors ? VectorPlace{vector / heads, vector % heads * a.dim}
                            : VectorPlace{-1, 0};
  };
  const VectorPlace low_place = place_of(first_vector + row);
  const VectorPlace high_place = place_of(first_vector + row + 8);
  // In any order of k, as long as both operands have it: a thread takes 4 neighbours.
  float low_next[kSteps][4], high_next[kSteps][4];
  const auto load_vectors = [&](int begin) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      LoadVector(a, low_place, begin + step * 16 + piece, low_next[step]);
      LoadVector(a, high_place, begin + step * 16 + piece, high_next[step]);
    }
  };
  load_projections(0);
  LetNextKernelStart();
  WaitForEarlierKernels();
  load_vectors(0);
  float acc[kGroups][4] = {};
  for (int begin = 0; begin < a.dim; begin += kDims) {
    Split low[kSteps], high[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      low[step] = SplitTf32(low_next[step]);
      high[step] = SplitTf32(high_next[step]);
    }
    if (begin + kDims < a.dim) {
      load_projections(begin + kDims);
      load_vectors(begin + kDims);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    const float* tile = r_tiles + begin / kDims % 2 * kTileFloats<kBits>;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Split &l = low[step], &h = high[step];
      // Two groups side by side: a product need not wait for the one before.
#pragma unroll
      for (int g = 0; g < kGroups; g += 2) {
        Split b[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const float4 r = *reinterpret_cast<const float4*>(tile + ((g + s) * 8 + row) * kStride +
                                                            step * 16 + piece);
          const float values[4] = {r.x, r.y, r.z, r.w};
          b[s] = SplitTf32(values);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            MultiplyAdd(acc[g + s], l.small[i], h.small[i], l.small[i + 1], h.small[i + 1],
                        b[s].large[i], b[s].large[i + 1]);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            MultiplyAdd(acc[g + s], l.large[i], h.large[i], l.large[i + 1], h.large[i + 1],
                        b[s].small[i], b[s].small[i + 1]);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            MultiplyAdd(acc[g + s], l.large[i], h.large[i], l.large[i + 1], h.large[i + 1],
                        b[s].large[i], b[s].large[i + 1]);
          }
        }
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
    static_cast<uint16_t*>(a.codes.data)[vector / heads * a.codes.stride +
                                         vector % heads * a.tables + first_table + t] =
        static_cast<uint16_t>(code & ((1u << a.bits) - 1));
  }
}

template <int kBits>
void Launch(cudaStream_t stream, const HashArgs& args) {
  const int64_t vectors = args.x.rows * (args.x.cols / args.dim);
  if (vectors == 0) return;
  const dim3 grid(
      static_cast<unsigned>((vectors + kVectors - 1) / kVectors),
      static_cast<unsigned>((args.tables + kBlockTables<kBits> - 1) / kBlockTables<kBits>));
  constexpr size_t kBytes = 2 * kTileFloats<kBits> * sizeof(float);
  CheckCuda(cudaFuncSetAttribute(HashKernel<kBits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kBytes)),
            "cudaFuncSetAttribute");
  LaunchBehind(stream, grid, kThreads, kBytes, "launch of HashCodes", HashKernel<kBits>, args);
}

}  // namespace

int32_t HashColumns(int32_t k) {
  return k <= 4 ? 4 : k <= 8 ? 8 : k <= 10 ? 10 : k <= 12 ? 12 : 16;
}

void LaunchHashCodes(cudaStream_t stream, const float* projections, int32_t head_dim, int32_t k,
                     int32_t l, Tensor x, Tensor mean, Tensor codes) {
  const HashArgs args{
      projections, head_dim,
      k,           l,
      x,           mean,
      codes,       reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 4 == 0};
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
