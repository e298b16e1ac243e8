#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "gpu/device.h"

// Products with some tens of rows, one after another in one kernel (product_chain.cu): the weights
// of the next are on their way while the one before is summed up.
namespace passel::gpu::cuda {

struct ChainedProduct {
  const void* w = nullptr;  // [features, k] bf16; for SiLU [2·features, k], gate first
  int64_t features = 0;
  Tensor x;    // [n, k] bf16
  Tensor out;  // [n, features] f32, for SiLU bf16
  enum class Kind : uint8_t { kStore, kAdd, kSilu } kind = Kind::kStore;
  // Of a product that adds: normed = out · norm as bf16, which lacks the factor 1/rms of each row;
  // the next product, whose x this is, supplies it (`eps` ≥ 0).
  const float* norm = nullptr;  // [features]
  Tensor normed = {};           // [n, features] bf16
  float eps = -1;
  // Of a product that adds: every rank adds the sum over the ranks, in their order. 0, 1, 0, 1, …
  // for one such product after another; −1: no sum.
  int sum_turn = -1;
  // Of a product that stores: the first `turned` features are heads of kTurnedHead, turned by RoPE;
  // cosine and sine of every row's angles.
  const float2* turns = nullptr;  // [n, kTurnedHead / 2]
  int64_t turned = 0;
};
// A tile's features: a thread that finishes sums has both elements of its pairs.
inline constexpr int64_t kTurnedHead = 128;

// Where ranks send each other their sums: the inbox of every rank, as this one's kernels write it.
// An inbox has a place for either turn and every sender, so a sum needs no wait but for the others'
// parts: who sends for the next but one has had all of the next, and its senders had read this one.
inline constexpr int kMaxPeers = 8;
struct PeerInboxes {
  int32_t ranks = 0, rank = 0;
  float* of[kMaxPeers] = {};
  const uint32_t* abandoned = nullptr;  // not 0: nothing comes any more. Host memory
};
size_t PeerInboxBytes(int ranks);

inline constexpr int64_t kMaxChainRows = 64;
inline constexpr size_t kMaxChain = 4;
inline constexpr int64_t kMaxSummedFeatures = 16384;

// Whether this GPU runs chains at all.
bool ServesProductChains();
bool FitsProductChain(const ChainedProduct& product);
// Whether one that stores can turn its features as well.
bool CanTurn(const ChainedProduct& product);
// What the chains of a stream work in, one after another, once it is prepared.
size_t ProductChainScratch();
void PrepareProductChainScratch(cudaStream_t stream, void* scratch);
// The same x.rows for all. `turn`: 0, 1, 0, 1, … for one chain after another. `peers`: null where
// no product is summed over ranks.
void LaunchProductChain(cudaStream_t stream, std::span<const ChainedProduct> products,
                        void* scratch, int turn, const PeerInboxes* peers);

}  // namespace passel::gpu::cuda
