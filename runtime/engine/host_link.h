#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cluster/control.pb.h"
#include "cluster/health.h"
#include "cluster/messages.h"
#include "cluster/shard_map.h"
#include "runtime/engine/job.h"
#include "runtime/engine/kv_reader.h"
#include "runtime/engine/query_plan.h"
#include "runtime/model/transformer.h"
#include "transport/channel.h"
#include "transport/payload_pool.h"

namespace passel::engine {

// One (row, KV head, segment)'s partial, out of a reply.
struct ReceivedPartial {
  PartialKey key;
  uint64_t sampled_tokens;
  // In ReplyBox::values: max [group], den [group], num [group, head_dim] in bf16, two a float.
  size_t at;
};

// The replies that a micro-batch waits for, one a frame of `plan`.
struct ReplyBox {
  // The asker's, of ReplyFloats(plan): replies are unpacked into it. From memory that the device
  // reads, they need not be copied once more.
  std::span<float> values;

  uint64_t step = 0;
  int32_t layer = -1;
  const std::vector<QueryFrame>* plan = nullptr;
  std::vector<bool> answered;             // by frame
  size_t open = 0;                        // frames not answered yet
  std::vector<ReceivedPartial> partials;  // once complete: by key, rising, whoever answered first

  bool complete() const { return open == 0; }
};

// Tokens [first_token, first_token + count) of a request, in rows [row, row + count) of what
// SendKv is given.
struct KvRun {
  const HostedRequest* hosted;
  uint64_t first_token, count;
  uint64_t row;
};

// A model rank's end of the wire to the host ranks. Never blocks. One thread.
class HostLink {
 public:
  // `on_control(from, message)`: control messages, on the thread that calls Pump.
  HostLink(const Job& job, transport::Channel& channel, const model::TensorSlice& slice,
           std::function<void(RankId, const cluster::proto::Control&)> on_control);

  // Advances communication; waits up to `wait` where nothing happens. Throws Error{kCluster} once a
  // host rank is lost or hangs.
  void Pump(std::chrono::milliseconds wait);

  // The frames that ask for `rows`, for SendQuery of every layer of a step.
  std::vector<QueryFrame> Plan(std::span<const QueryRow> rows) const;
  // Floats of one partial, and of all that `plan` asks for.
  size_t PartialFloats() const {
    return size_t{shape_.group} * (2 + shape_.head_dim * sizeof(bf16) / sizeof(float));
  }
  size_t ReplyFloats(const std::vector<QueryFrame>& plan) const;
  // Staging memory for what SendQuery and SendKv send: hosts on this machine read it where it lies,
  // where the transport and the device can do that.
  std::unique_ptr<gpu::Buffer> AllocateStaging(gpu::Device& device, size_t bytes);
  // Asks every host of `plan`; the answers collect in `box`, which must stay where it is, as its
  // memory and the plan, until complete. all_exact: whatever the rows say. q: [rows,
  // heads·head_dim], codes: [rows, heads·l] (null where all_exact), indexed by row: sent from where
  // they lie, so they stay as they are until complete; `memory` is held until they are sent.
  void SendQuery(uint16_t micro_batch, int32_t layer, uint64_t step,
                 const std::vector<QueryFrame>& plan, bool all_exact, const bf16* q,
                 const uint16_t* codes, const std::shared_ptr<const void>& memory, ReplyBox* box);
  // `runs` of one layer, all KV heads of this rank. kv: [kv_heads, rows, 2, head_dim]; codes:
  // [kv_heads, rows, l] or null: sent from where they lie, in `memory`, which is held until hosts
  // have them.
  void SendKv(int32_t layer, std::span<const KvRun> runs, uint64_t rows, const bf16* kv,
              const uint16_t* codes, const std::shared_ptr<const void>& memory);
  // Reads tokens [first_token, first_token + count) of one layer back, for all KV heads of this
  // rank: kv: [kv_heads, count, 2, head_dim], in host memory, filled by Pump until `box`, which
  // must be complete before, is complete. Hosts wait for tokens that have not come. Several boxes
  // may be open at once. Forget them before the request is released; a host that cannot read ends
  // the job (Pump throws).
  void ReadKv(int32_t layer, const HostedRequest& hosted, uint64_t first_token, uint64_t count,
              bf16* kv, KvBox* box) {
    reader_.Read(layer, hosted, first_token, count, kv, box);
  }
  // μ of one request and layer. mean: [kv_heads·head_dim].
  void SendKeyMean(const HostedRequest& hosted, int32_t layer, const float* mean);
  void SendControl(uint32_t host, const cluster::proto::Control& message);
  void SendControlToAll(const cluster::proto::Control& message);

  uint32_t hosts() const { return static_cast<uint32_t>(host_ranks_.size()); }
  RankId host_rank(uint32_t host) const { return host_ranks_[host]; }
  // Replies that matched no question (late, twice or hostile).
  uint64_t dropped() const { return dropped_; }

 private:
  void OnFrame(const transport::FrameHeader& header, transport::IncomingPayload& payload);
  void OnPartial(const transport::FrameHeader& header, cluster::PayloadPieces payload);
  void Drop(const transport::FrameHeader& header, const std::string& why);
  void Send(uint32_t host, transport::FrameHeader header, std::vector<std::byte> payload);
  static uint64_t Ticket(uint64_t step, int32_t layer, uint16_t micro_batch, uint32_t part);

  const Job& job_;
  transport::Channel& channel_;
  model::TensorSlice slice_;
  std::function<void(RankId, const cluster::proto::Control&)> on_control_;
  cluster::WireShape shape_;
  std::vector<RankId> host_ranks_;
  cluster::HealthTracker health_;
  transport::PayloadPool payloads_;  // of the entries of what is sent from elsewhere
  std::vector<ReplyBox*> boxes_;     // by micro-batch
  KvReader reader_;
  std::string lost_;
  uint64_t dropped_ = 0;
};

}  // namespace passel::engine
