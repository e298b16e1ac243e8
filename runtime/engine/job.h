#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cluster/config.h"
#include "cluster/launch.h"
#include "cluster/messages.h"
#include "cluster/shard_map.h"
#include "configs/config.pb.h"
#include "host_attention/host_attention.h"
#include "runtime/model/model_file.h"

namespace passel::engine {

// What every rank knows of the job after start: the config, the model's architecture and the ranks.
struct Job {
  config::Config config;
  model::ModelConfig model;
  std::vector<cluster::RankInfo> ranks;  // by world rank
  RankId self;
  uint32_t host_threads = 0;           // of this host rank's attention; 0: as host.threads has it
  std::chrono::microseconds spin{20};  // for which this rank's idle threads poll before they sleep

  const cluster::RankInfo& info() const { return ranks[static_cast<size_t>(self.value)]; }
  std::vector<RankId> RanksOf(cluster::Role role) const;
  uint32_t hosts() const { return static_cast<uint32_t>(RanksOf(cluster::Role::kHost).size()); }

  bool lsh() const { return config.attention().estimator() == config::LSH; }
  bool deterministic() const { return config.engine().deterministic(); }
  // Query heads of a KV head.
  uint32_t group() const { return static_cast<uint32_t>(model.heads / model.kv_heads); }
  // Shapes on the wire. Codes travel for LSH alone.
  cluster::WireShape wire_shape() const;
  host::Options host_options(uint64_t memory_bytes) const;

  // Whether the model attends a sliding window, which then is all that is kept of a sequence: on
  // the model rank, exact; host ranks hold nothing.
  bool sliding() const {
    return model.sliding_window > 0 && model.sliding_window < model.context_length;
  }
  // How a layer is attended.
  enum class LayerKind : uint8_t { kResident, kDenseOnHosts, kSampled };
  std::vector<LayerKind> layer_kinds() const;

  // Offloaded tokens of a sequence of `tokens` tokens: all but sinks and window; none where the
  // model slides.
  uint64_t Offloaded(uint64_t tokens) const;
  // Segments of a request, as every rank computes them.
  std::vector<host::SegmentSpec> Segments(uint64_t prompt_tokens, uint64_t max_tokens) const;
};

// The segments that host `host` holds of a request, and its layers, as HostAttention opens them.
host::OpenSpec OpenSpecFor(const Job& job, RequestId request, uint32_t host,
                           const cluster::RequestPlacement& placement,
                           const std::vector<host::SegmentSpec>& segments);

}  // namespace passel::engine
