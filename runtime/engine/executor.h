#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gpu/device.h"
#include "runtime/engine/host_link.h"
#include "runtime/engine/job.h"
#include "runtime/engine/kv_pages.h"
#include "runtime/engine/layer_reader.h"
#include "runtime/engine/staging_ring.h"
#include "runtime/model/transformer.h"

namespace passel::engine {

// A request as the model ranks run it.
struct Sequence {
  RequestId id;
  std::vector<int32_t> prompt;
  int64_t max_tokens = 0;
  HostedRequest hosted;
  int64_t tokens = 0;                       // in the cache
  std::vector<std::vector<int32_t>> pages;  // by layer: the whole cache, or sinks and window
  std::unique_ptr<gpu::Buffer> means;       // [layers, kv_heads·head_dim] f32: μ
  uint64_t sampled = 0, asked = 0;          // tokens attended, tokens offloaded, in sampled queries
};

// What prefill and decode share on one model rank: the model, the KV pool and the wire.
struct Workspace {
  const Job& job;
  gpu::Device& device;
  const model::Transformer& transformer;
  HostLink* link;  // null without host ranks
  std::vector<Job::LayerKind> kinds;
  std::unique_ptr<StagingRing> pieces;  // of prefill, on their way; null where none leave

  size_t kv_cols() const {
    const auto shape = transformer.attention_shape();
    return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim);
  }
  // Slot of a position in the pages of a layer: the position itself, or its place among sinks and
  // window, where a new token takes the place of the one that left.
  int64_t SlotOf(int32_t layer, int64_t position) const;
  int64_t SlotsOf(int32_t layer, int64_t tokens) const;
  // Of positions [0, end) of a prompt of so many tokens, those that its layer keeps on the device
  // until the next are computed: two runs [begin, end).
  std::array<std::pair<int64_t, int64_t>, 2> Kept(int32_t layer, int64_t end, int64_t prompt) const;
  // Pages of a request on this rank's device.
  int64_t PagesFor(int32_t layer, int64_t tokens) const;
  int64_t PagesFor(int64_t tokens) const;
  gpu::Tensor Means(const Sequence& sequence, int32_t layer) const;
};

// Prefill of one request, layer by layer over the whole prompt or, where it is longer than `part`
// tokens, over a part of it after the other, in chunks. A layer's K, V and codes leave for the host
// ranks, piece by piece, while the next layer computes; those of earlier parts come back while the
// layer before computes.
class PrefillJob {
 public:
  PrefillJob(Workspace& workspace, Sequence& sequence, model::Activations& activations,
             int64_t part);
  // What one takes of the device's memory: bytes for each token of a part, for each of the prompt,
  // and beside them.
  struct Memory {
    uint64_t part_token, prompt_token, fixed;
  };
  static Memory MemoryOf(const Workspace& workspace);
  // For Workspace::pieces; null where prefill sends nothing.
  static std::unique_ptr<StagingRing> MakePieces(const Workspace& workspace);

  // Does one chunk of one layer; true when all is done and the activations hold the logits of the
  // last position. Does nothing while as much is under way to the hosts as may be, or what the
  // layer reads is under way from them: see Blocked.
  bool Step();
  bool Blocked();

 private:
  // K and V of a layer. Layers take turns between two where they leave for hosts.
  struct LayerKv {
    gpu::Tensor k, v;
  };
  // What leaves for the hosts: before the first token the mean of the layer's keys, where it
  // hashes, then tokens [done, tokens).
  struct Offload {
    int32_t layer = -1;
    int64_t tokens = 0, done = 0;
    bool codes = false;
    bool open = false;  // a piece is still to be issued
  };
  // A piece on its way to host memory: the mean, then K, V and codes by head.
  struct Piece {
    int32_t layer = -1;
    int64_t first = 0, rows = 0;
    bool codes = false;
    std::shared_ptr<std::byte> memory;
    std::unique_ptr<gpu::Event> copied;  // null: none is under way
  };

  int64_t tokens() const { return static_cast<int64_t>(sequence_.prompt.size()); }
  bool Resident(int32_t layer) const {
    return w_.kinds[static_cast<size_t>(layer)] == Job::LayerKind::kResident;
  }
  // Of the last layer only the last position is read on.
  bool Attends(int32_t layer) const { return layer + 1 < w_.job.model.layers || end_ == tokens(); }
  // Tokens of [0, position) that hosts have once all of them are computed.
  int64_t OffloadedBefore(int64_t position) const;
  void BeginPart(int64_t begin);
  void BeginLayer();
  void ReadBack(int32_t layer);
  void Chunk(int64_t start, int64_t count);
  void FinishLayer();
  void BeginOffload();
  void NextPiece();
  void IssuePiece();
  void SendPiece();
  LayerKv& Kv(int32_t layer) { return kv_[static_cast<size_t>(layer) % kv_.size()]; }

  Workspace& w_;
  Sequence& sequence_;
  model::Activations& a_;
  const int64_t part_;
  int64_t begin_ = 0, end_ = 0;  // of the part
  int32_t layer_ = 0;
  int64_t next_ = 0;  // first position of the next chunk
  std::unique_ptr<gpu::Buffer> hidden_memory_, kv_memory_, packed_memory_, codes_memory_;
  gpu::Tensor hidden_;          // of the part
  gpu::Tensor packed_, codes_;  // of a piece, by head
  std::vector<LayerKv> kv_;
  Offload offload_;
  Piece piece_;
  std::unique_ptr<LayerReader> reader_;  // of earlier parts; null where none left for hosts
};

// One decode step of a micro-batch: a state machine that never blocks on a host's reply (though
// until a host has fetched what left the window layers ago, where it is that far behind).
class MicroBatch {
 public:
  MicroBatch(Workspace& workspace, uint16_t number, int64_t max_rows);

  // One new token of each sequence, in the cache after the step. Begins the first layer.
  void Start(std::span<Sequence* const> sequences, std::span<const int32_t> tokens, uint64_t step);
  // Goes on as far as it can, to the end of one layer and the beginning of the next at most.
  void Advance();
  // Whether the layer's query is on its way, which it is from this call on where it can be; so is
  // that of a layer that asks nobody.
  bool HandedOver();
  bool done() const { return state_ == State::kDone; }
  bool waits_for_hosts() const { return state_ == State::kHosts; }
  // Layers finished in this step.
  int32_t layer() const { return layer_; }
  const model::Activations& activations() const { return *a_; }
  std::span<Sequence* const> sequences() const { return sequences_; }

 private:
  enum class State : uint8_t { kLayer, kHandOver, kHosts, kDone };

  void Plan();
  void BeginLayer();
  void HandOver();
  void GatherEvicted();
  void SendEvicted();
  void FinishLayer();
  void MergeReplies();
  bool Sampled() const { return w_.kinds[static_cast<size_t>(layer_)] == Job::LayerKind::kSampled; }
  bool SampledRow(uint32_t row) const { return Sampled() && !rows_[row].exact; }

  Workspace& w_;
  uint16_t number_;
  std::unique_ptr<model::Activations> a_;
  std::unique_ptr<gpu::Buffer> partial_memory_, evicted_memory_, reply_memory_;
  // Sent from where they lie: a frame that is still under way holds them.
  struct Queries {
    std::unique_ptr<gpu::Buffer> q, codes;
  };
  const std::shared_ptr<Queries> queries_ = std::make_shared<Queries>();
  std::unique_ptr<gpu::Buffer> means_memory_;
  std::unique_ptr<StagingRing> evicted_ring_;
  std::shared_ptr<std::byte> evicted_host_;  // K, V and codes, by head, of the rows in leaving_
  gpu::Partials partials_;
  gpu::Tensor codes_;  // in queries_->codes
  gpu::Tensor evicted_k_, evicted_v_, evicted_means_;
  std::unique_ptr<gpu::Event> event_, evicted_event_;
  std::vector<size_t> leaving_;  // rows of the micro-batch of which a token leaves the window
  int32_t leaving_layer_ = 0;

  State state_ = State::kDone;
  int32_t layer_ = 0;
  uint64_t step_ = 0;
  std::vector<Sequence*> sequences_;
  std::vector<int64_t> positions_;
  std::vector<QueryRow> rows_;
  std::vector<QueryFrame> plan_;
  ReplyBox box_;
};

}  // namespace passel::engine
