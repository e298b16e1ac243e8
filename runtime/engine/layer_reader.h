#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gpu/device.h"
#include "runtime/engine/host_link.h"

namespace passel::engine {

// K and V of a sequence's tokens on their way back from the host ranks to the device, a layer at a
// time: piece by piece through staging memory, several pieces under way. One thread.
class LayerReader {
 public:
  // rows: of a piece; cols: kv_heads·head_dim of this rank.
  LayerReader(HostLink& link, gpu::Device& device, const HostedRequest& hosted,
              const gpu::AttentionShape& shape, int64_t rows);

  // Offloaded tokens [0, tokens) of a layer, to as many rows of k and v: [tokens,
  // kv_heads·head_dim] bf16. Those of the layer before are there.
  void Begin(int32_t layer, int64_t tokens, const gpu::Tensor& k, const gpu::Tensor& v);
  // Asks for what comes next and takes what has come; true once all is on the device, as far as
  // work sees that is issued from then on. Throws Error{kCluster} where a host could not answer.
  bool Advance();

 private:
  struct Piece {
    std::byte* memory = nullptr;  // [kv_heads, count, 2, head_dim] bf16
    int64_t first = 0, count = 0;
    std::unique_ptr<KvBox> box;         // null: not asked for
    std::unique_ptr<gpu::Event> taken;  // null or done: the memory is free
  };

  HostLink& link_;
  gpu::Device& device_;
  const HostedRequest& hosted_;
  const gpu::AttentionShape shape_;
  const int64_t rows_;
  std::unique_ptr<gpu::Buffer> memory_;
  std::vector<Piece> pieces_;
  int32_t layer_ = -1;
  int64_t tokens_ = 0, next_ = 0, done_ = 0;
  gpu::Tensor k_, v_;
};

}  // namespace passel::engine
