#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "runtime/base/bf16.h"

namespace passel {

// Collective operations among the model ranks alone (host ranks take no part). Implemented with
// NCCL in `gpu` and with MPI in `cluster`. Every member calls the same operations in the same
// order. Buffers are memory of the device the implementation serves; operations are ordered after
// the device work issued before them, and later device work sees their results.
class Collectives {
 public:
  virtual ~Collectives() = default;

  // 0 … size()-1: the tensor-parallel rank.
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // What carries them, as users are told: "NCCL", "MPI", …
  virtual std::string_view name() const = 0;

  // Element-wise sum over all ranks, in place, in rank order (the same bits on every rank).
  virtual void AllReduceSum(std::span<float> data) = 0;
  // out = concatenation over ranks of `in`; counts[r] elements from rank r, Σ counts = out.size().
  virtual void AllGather(std::span<const float> in, std::span<const size_t> counts,
                         std::span<float> out) = 0;
  // Host memory, from `root` to all: step plans and sampled tokens.
  virtual void Broadcast(std::span<std::byte> host_data, int root) = 0;
  // Throws Error{kCluster} where an operation issued before has failed since. To be asked before
  // what device work led to is believed: device memory then holds anything.
  virtual void ThrowIfFailed() {}
  // Whether a device may record operations over its memory and issue them again by itself (as
  // gpu::Device::Replay does); it then says so each time, behind them.
  virtual bool recordable() const { return false; }
  virtual void IssuedAgain() {}
};

}  // namespace passel
