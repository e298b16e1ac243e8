// SimHash codes: product with the projections, sign and packing in one pass.
//
// In float32 on the general units: a sign near 0 must not flip because an operand was rounded. A
// thread adds up its dot products alone and in order, so a vector has the same codes alone and in a
// batch.

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kTables = 16;       // of a block
constexpr int kVectorLanes = 16;  // threads side by side over vectors
constexpr int kVectorsEach = 4;   // of a thread
constexpr int kVectors = kVectorLanes * kVectorsEach;
constexpr int kDims = 32;  // of a step

// kBits: columns of a table, padded. Thread (table, lane) of a block hashes vectors lane,
// lane + kVectorLanes, … of the block's kVectors.
template <int kBits>
__global__ void __launch_bounds__(kTables* kVectorLanes)
    HashKernel(const float* projections, int32_t dim, int32_t bits, int32_t tables, Tensor x,
               Tensor mean, Tensor codes) {
  // Columns of a table apart by an odd number of pairs: the tables of a warp then hit all banks.
  constexpr int kStride = kBits / 2 % 2 == 1 ? kBits : kBits + 2;
  __shared__ __align__(8) float r_tile[kDims][kTables * kStride];
  __shared__ float x_tile[kVectors][kDims + 1];
  const int table = threadIdx.x % kTables;
  const int lane = threadIdx.x / kTables;
  const int64_t first_table = int64_t{blockIdx.y} * kTables;
  const int64_t first_vector = int64_t{blockIdx.x} * kVectors;
  const int64_t heads = x.cols / dim;
  const int64_t vectors = x.rows * heads;
  float dots[kVectorsEach][kBits] = {};
  for (int begin = 0; begin < dim; begin += kDims) {
    for (int i = threadIdx.x; i < kDims * kTables * kBits; i += blockDim.x) {
      const int d = i / (kTables * kBits), t = i / kBits % kTables, b = i % kBits;
      const bool inside = begin + d < dim && first_table + t < tables;
      r_tile[d][t * kStride + b] =
          inside ? projections[(int64_t{begin + d} * tables + first_table + t) * kBits + b] : 0.0f;
    }
    for (int i = threadIdx.x; i < kVectors * kDims; i += blockDim.x) {
      const int v = i / kDims, d = i % kDims;
      const int64_t vector = first_vector + v;
      float value = 0;
      if (vector < vectors && begin + d < dim) {
        const int64_t col = vector % heads * dim + begin + d;
        value = LoadElement(x, vector / heads, col);
        if (mean.data) value -= F32Row(mean, 0)[col];
      }
      x_tile[v][d] = value;
    }
    __syncthreads();
    for (int d = 0; d < kDims; ++d) {
      float r[kBits];
#pragma unroll
      for (int b = 0; b < kBits; b += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(&r_tile[d][table * kStride + b]);
        r[b] = pair.x;
        r[b + 1] = pair.y;
      }
#pragma unroll
      for (int v = 0; v < kVectorsEach; ++v) {
        const float value = x_tile[lane + v * kVectorLanes][d];
#pragma unroll
        for (int b = 0; b < kBits; ++b) dots[v][b] = fmaf(value, r[b], dots[v][b]);
      }
    }
    __syncthreads();
  }
  if (first_table + table >= tables) return;
#pragma unroll
  for (int v = 0; v < kVectorsEach; ++v) {
    const int64_t vector = first_vector + lane + v * kVectorLanes;
    if (vector >= vectors) continue;
    unsigned code = 0;
#pragma unroll
    for (int b = 0; b < kBits; ++b) {
      if (b < bits && dots[v][b] > 0) code |= 1u << b;
    }
    static_cast<uint16_t*>(
        codes.data)[vector / heads * codes.stride + vector % heads * tables + first_table + table] =
        static_cast<uint16_t>(code);
  }
}

template <int kBits>
void Launch(cudaStream_t stream, const float* projections, int32_t dim, int32_t k, int32_t l,
            Tensor x, Tensor mean, Tensor codes) {
  const int64_t vectors = x.rows * (x.cols / dim);
  if (vectors == 0) return;
  const dim3 grid(static_cast<unsigned>((vectors + kVectors - 1) / kVectors),
                  static_cast<unsigned>((l + kTables - 1) / kTables));
  HashKernel<kBits>
      <<<grid, kTables * kVectorLanes, 0, stream>>>(projections, dim, k, l, x, mean, codes);
  CheckCuda(cudaGetLastError(), "launch of HashCodes");
}

}  // namespace

int32_t HashColumns(int32_t k) {
  return k <= 4 ? 4 : k <= 8 ? 8 : k <= 10 ? 10 : k <= 12 ? 12 : 16;
}

void LaunchHashCodes(cudaStream_t stream, const float* projections, int32_t head_dim, int32_t k,
                     int32_t l, Tensor x, Tensor mean, Tensor codes) {
  const auto launch = [&](auto run) { run(stream, projections, head_dim, k, l, x, mean, codes); };
  switch (HashColumns(k)) {
    case 4:
      return launch(Launch<4>);
    case 8:
      return launch(Launch<8>);
    case 10:
      return launch(Launch<10>);
    case 12:
      return launch(Launch<12>);
    default:
      return launch(Launch<16>);
  }
}

}  // namespace passel::gpu::cuda
