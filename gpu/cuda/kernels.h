#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/device.h"

// Launchers of the CUDA kernels. Shapes are checked by CudaDevice; all pointers are device-readable
// unless said otherwise; all work goes to `stream`. A launch that fails throws.
namespace passel::gpu::cuda {

// Of attention and of partial results.
inline constexpr int32_t kMaxHeadDim = 256;

// Copies up to kMaxPutBytes of host memory to device memory (4-byte aligned, rounded up to 4 bytes)
// as an argument of a kernel (elementwise.cu): the host's copy may go at once.
inline constexpr size_t kMaxPutBytes = 32000;  // of 32,764 that arguments may have
void LaunchPut(cudaStream_t stream, void* device, const void* host, size_t bytes);

// What a product may ask memory for when its own weight is under way (compute capability 9).
struct Upcoming {
  const void* data = nullptr;  // 16-byte aligned
  size_t bytes = 0;
};

// out (+)= x Wᵀ for few rows of x (skinny_matmul.cu). w: [features, k] bf16; x: [n, k] bf16; out:
// [n, features] f32. Only where FitsSkinnyMatMul.
inline constexpr int64_t kMaxSkinnyRows = 32;
bool FitsSkinnyMatMul(int64_t k, const Tensor& x);
void LaunchSkinnyMatMul(cudaStream_t stream, const void* w, int64_t features, int64_t k, Tensor x,
                        Tensor out, bool accumulate, const Upcoming& next);

// Elementwise and by row (elementwise.cu). Meanings and shapes as in gpu/device.h.
void LaunchEmbed(cudaStream_t stream, Tensor table, const int32_t* ids, Tensor out);
void LaunchAddRmsNorm(cudaStream_t stream, Tensor residual, Tensor delta, Tensor weight, float eps,
                      Tensor out);
void LaunchHeadRmsNorm(cudaStream_t stream, Tensor x, int32_t head_dim, Tensor weight, float eps);
// table: [n, head_dim/2] pairs (cos, sin) of positions[i]·inv_freq[j], computed in float64: at
// position 2^20 a float32 angle has an error of 0.03.
void LaunchRopeTable(cudaStream_t stream, const int64_t* positions, int64_t n,
                     const float* inv_freq, int64_t half, float2* table);
void LaunchRope(cudaStream_t stream, Tensor x, int32_t head_dim, const float2* table);
void LaunchSiluMul(cudaStream_t stream, Tensor gate_up, Tensor out);
void LaunchAdd(cudaStream_t stream, Tensor into, Tensor delta);
void LaunchConvert(cudaStream_t stream, Tensor in, Tensor out);
// out[j] = Σ_i in[i, j], in the order of i. in: [rows, cols] f32.
void LaunchSumRows(cudaStream_t stream, const float* in, int64_t rows, int64_t cols, float* out);

// Choice of tokens (sampling.cu).
void LaunchSample(cudaStream_t stream, Tensor x, const SamplingRule* rules, int32_t* ids);

// Column means (column_mean.cu). sums: scratch of ColumnMeanScratch(rows, cols) bytes.
size_t ColumnMeanScratch(int64_t rows, int64_t cols);
void LaunchColumnMean(cudaStream_t stream, Tensor x, Tensor mean, double* sums);

// Lists are arguments of the kernels that read them; one of more words must be `uploaded` as well.
inline constexpr size_t kMaxListWords = 8000;  // of the 32,764 bytes that arguments may have

// Partial results (partials.cu). list: where the entries of each row of `into` begin and, last,
// where they end (into.max.rows + 1 numbers); then two numbers an entry: its row in `from` and the
// first of its heads in `into`. The entries of a row are merged in their order.
void LaunchClearPartials(cudaStream_t stream, Partials partials);
void LaunchMergePartials(cudaStream_t stream, Partials into, Partials from,
                         std::span<const int32_t> list, const int32_t* uploaded);
void LaunchNormalizePartials(cudaStream_t stream, Partials partials, Tensor out);

// The KV pool (decode_attention.cu). slots[i]: page · kKvPageTokens + place in the page.
struct PoolView {
  void* data;  // [pages, kKvPageTokens, kv_heads, 2, head_dim] bf16
  AttentionShape shape;
};
void LaunchStoreKv(cudaStream_t stream, PoolView pool, const int64_t* slots, Tensor k, Tensor v);
void LaunchLoadKv(cudaStream_t stream, PoolView pool, const int64_t* slots, Tensor k, Tensor v);
void LaunchPackKv(cudaStream_t stream, Tensor k, Tensor v, Tensor out);
void LaunchUnpackKv(cudaStream_t stream, Tensor in, Tensor k, Tensor v);

// One query row of a decode batch. How it is cut depends on its own length alone, so that bits do
// not depend on the batch.
struct DecodeRow {
  int64_t first_page;  // of its page numbers in `pages`
  int64_t tokens;
  int64_t split_tokens;   // tokens of a split
  int64_t first_partial;  // of its splits in the scratch memory
  int32_t splits;         // ≥ 1
};
// Sets split_tokens and splits from tokens.
void CutDecodeRow(DecodeRow* row);
// scratch: floats for `partials` splits, DecodePartialFloats each; unused where max_splits is 1.
inline int64_t DecodePartialFloats(const AttentionShape& shape) {
  return int64_t{shape.heads} * (shape.head_dim + 2);
}
void LaunchDecodeAttention(cudaStream_t stream, PoolView pool, Tensor q, const int32_t* pages,
                           const DecodeRow* rows, int32_t max_splits, float* scratch, Partials out);
// Rows of up to kMaxShortTokens, where the shape has a kernel for them (decode_short.cu);
// LaunchDecodeAttention then leaves them out. list: two numbers a row of q: its tokens, −1 for one
// that is not short, and where its pages begin in the list, behind these. max_tokens: of these.
inline constexpr int64_t kMaxShortTokens = 128;
bool HasShortRows(const AttentionShape& shape);
void LaunchShortDecodeAttention(cudaStream_t stream, PoolView pool, Tensor q,
                                std::span<const int32_t> list, const int32_t* uploaded,
                                int64_t max_tokens, Partials out);

// Causal attention of a chunk (causal_attention.cu); head_dim ≤ kMaxHeadDim, a multiple of 8.
void LaunchCausalAttention(cudaStream_t stream, const AttentionShape& shape, Tensor q, Tensor k,
                           Tensor v, int64_t start, int64_t window, Tensor out);

// SimHash codes (hashing.cu). projections: [l·HashColumns(k), head_dim] f32, zero-padded, packed by
// PackProjections; head_dim a multiple of 4. mean: one row for all, or one for each. scratch:
// HashScratchBytes(), zeros at first, for what a stream issues one after another.
int32_t HashColumns(int32_t k);
// For each 4 numbers 4 float16 and 4 that hold what those leave, scaled by one power of two.
std::vector<uint16_t> PackProjections(std::span<const float> projections);
size_t HashScratchBytes();
void LaunchHashCodes(cudaStream_t stream, const void* projections, int32_t head_dim, int32_t k,
                     int32_t l, void* scratch, Tensor x, Tensor mean, Tensor codes);

}  // namespace passel::gpu::cuda
