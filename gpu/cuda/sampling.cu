// Choosing a token from a row of logits: one block a row, no sorting. The set of likeliest tokens
// is found by its lowest logit, bit by bit from the top: with each bit of a logit's ordered number,
// the weights at or above it are summed. Sums are float64 in a fixed order.

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kThreads = 1024;

// A value and its column. The better one is the larger, then the one further left; NaN beats all.
struct Candidate {
  float value;
  int32_t column;
};

__device__ inline Candidate Better(const Candidate& a, const Candidate& b) {
  if (isnan(a.value)) return a;
  if (isnan(b.value) || b.value > a.value) return b;
  return b.value == a.value && b.column < a.column ? b : a;
}

__device__ inline Candidate BetterOfWarp(Candidate c) {
  for (int offset = 16; offset > 0; offset /= 2) {
    c = Better(c, {__shfl_xor_sync(0xffffffffu, c.value, offset),
                   __shfl_xor_sync(0xffffffffu, c.column, offset)});
  }
  return c;
}

// The order of floats as that of unsigned numbers.
__device__ inline uint32_t Ordered(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // −0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
  const float* logits;
  int64_t cols;
  float max, inverse_temperature;

  __device__ float Weight(float logit) const {
    return logit == max ? 1.0f : expf((logit - max) * inverse_temperature);
  }
};

// The sum of the block's values, in every thread.
__device__ double SumOfBlock(double value) {
  __shared__ double sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  __syncthreads();  // before what was read of the last sum is overwritten
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += sums[w];
  return total;
}

// The weights of all logits whose ordered number is at least `from`.
__device__ double WeightFrom(const Row& row, uint32_t from) {
  double own = 0;
  for (int64_t j = threadIdx.x; j < row.cols; j += kThreads) {
    const float x = row.logits[j];
    if (Ordered(x) >= from) own += row.Weight(x);
  }
  return SumOfBlock(own);
}

// The tokens kept: all above `edge`, and the first `equals` of those at it.
struct Kept {
  uint32_t edge = 0;
  int64_t equals = INT64_MAX;
};

__device__ Kept KeepTop(const Row& row, double top_p) {
  const double enough = top_p * WeightFrom(row, 0);
  Kept kept;
  // Whatever the sums' rounding: at least the likeliest.
  const uint32_t highest = Ordered(row.max);
  for (uint32_t bit = 0x80000000u; bit > 0; bit /= 2) {
    const uint32_t edge = kept.edge | bit;
    if (edge <= highest && WeightFrom(row, edge) >= enough) kept.edge = edge;
  }
  const double above = kept.edge == UINT32_MAX ? 0 : WeightFrom(row, kept.edge + 1);
  const uint32_t bits = kept.edge & 0x80000000u ? kept.edge ^ 0x80000000u : ~kept.edge;
  const double each = row.Weight(__uint_as_float(bits));
  kept.equals = each > 0 ? max(int64_t{1}, static_cast<int64_t>(ceil((enough - above) / each))) : 1;
  return kept;
}

__global__ void __launch_bounds__(kThreads)
    SampleKernel(Tensor x, const SamplingRule* rules, int32_t* ids) {
  __shared__ Candidate candidates[kThreads / 32];
  __shared__ double before[kThreads + 1];   // weights kept in the parts of earlier threads
  __shared__ int64_t equals[kThreads + 1];  // tokens at the edge in them
  __shared__ int chooser;
  LetNextKernelStart();
  WaitForEarlierKernels();
  Row row{F32Row(x, blockIdx.x), x.cols, 0, 0};
  const SamplingRule rule = rules[blockIdx.x];

  // Beyond the last column: what loses against every number.
  Candidate best{-INFINITY, INT32_MAX};
  for (int64_t j = threadIdx.x; j < x.cols; j += kThreads) {
    best = Better(best, {row.logits[j], static_cast<int32_t>(j)});
  }
  best = BetterOfWarp(best);
  if (threadIdx.x % 32 == 0) candidates[threadIdx.x / 32] = best;
  __syncthreads();
  best = BetterOfWarp(candidates[threadIdx.x % 32]);
  if (isnan(best.value) || rule.temperature <= 0 || best.value == -INFINITY) {
    if (threadIdx.x == 0) ids[blockIdx.x] = isnan(best.value) ? -1 : best.column;
    return;
  }
  row.max = best.value;
  row.inverse_temperature = static_cast<float>(1 / rule.temperature);

  Kept kept;
  if (rule.top_p < 1) kept = KeepTop(row, rule.top_p);

  // Each thread a run of columns, so that sums go in the order of ids.
  const int64_t part = (row.cols + kThreads - 1) / kThreads;
  const int64_t begin = min(row.cols, threadIdx.x * part), end = min(row.cols, begin + part);
  int64_t own_equals = 0;
  for (int64_t j = begin; j < end; ++j) own_equals += Ordered(row.logits[j]) == kept.edge;
  equals[threadIdx.x + 1] = own_equals;
  __syncthreads();
  if (threadIdx.x == 0) {
    equals[0] = 0;
    for (int t = 1; t <= kThreads; ++t) equals[t] += equals[t - 1];
  }
  __syncthreads();
  int64_t rank = equals[threadIdx.x];
  const auto weight = [&](int64_t j) {
    const uint32_t number = Ordered(row.logits[j]);
    const bool in = number > kept.edge || (number == kept.edge && rank++ < kept.equals);
    return in ? static_cast<double>(row.Weight(row.logits[j])) : 0.0;
  };
  double own = 0;
  for (int64_t j = begin; j < end; ++j) own += weight(j);
  before[threadIdx.x + 1] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int t = 1; t <= kThreads; ++t) before[t] += before[t - 1];
    const double target = rule.draw * before[kThreads];
    chooser = 0;  // the first part in which the sum passes the target
    while (chooser + 1 < kThreads && before[chooser + 1] <= target) ++chooser;
  }
  __syncthreads();
  if (threadIdx.x != chooser) return;
  rank = equals[threadIdx.x];
  double rest = rule.draw * before[kThreads] - before[threadIdx.x];
  int64_t chosen = best.column;
  for (int64_t j = begin; j < end; ++j) {
    const double w = weight(j);
    if (w == 0) continue;
    chosen = j;
    rest -= w;
    if (rest < 0) break;
  }
  ids[blockIdx.x] = static_cast<int32_t>(chosen);
}

}  // namespace

void LaunchSample(cudaStream_t stream, Tensor x, const SamplingRule* rules, int32_t* ids) {
  LaunchBehind(stream, dim3(static_cast<unsigned>(x.rows)), kThreads, 0, "launch of Sample",
               SampleKernel, x, rules, ids);
}

}  // namespace passel::gpu::cuda
