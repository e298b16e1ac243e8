#include "runtime/engine/job.h"

#include <algorithm>

namespace passel::engine {

std::vector<RankId> Job::RanksOf(cluster::Role role) const {
  std::vector<RankId> out;
  for (const cluster::RankInfo& r : ranks) {
    if (r.role == role) out.push_back(r.rank);
  }
  return out;
}

cluster::WireShape Job::wire_shape() const {
  cluster::WireShape shape;
  shape.layers = static_cast<uint32_t>(model.layers);
  shape.kv_heads = static_cast<uint32_t>(model.kv_heads);
  shape.group = group();
  shape.head_dim = static_cast<uint32_t>(model.head_dim);
  shape.l = lsh() ? config.attention().l() : 0;
  shape.max_tokens = static_cast<uint64_t>(model.context_length);
  return shape;
}

host::Options Job::host_options(uint64_t memory_bytes) const {
  const config::Attention& a = config.attention();
  host::Options o;
  switch (a.estimator()) {
    case config::FULL:
      o.estimator = host::Estimator::kFull;
      break;
    case config::TOPK:
      o.estimator = host::Estimator::kTopK;
      break;
    case config::ORACLE_SAMPLE:
      o.estimator = host::Estimator::kOracleSample;
      break;
    default:
      o.estimator = host::Estimator::kLsh;
  }
  o.head_dim = static_cast<uint32_t>(model.head_dim);
  o.group = group();
  o.k = a.k();
  o.l = a.l();
  o.kv_type = a.kv_type() == config::INT8 ? host::KvType::kInt8 : host::KvType::kBf16;
  o.block_tokens = config.host().block_tokens();
  o.memory_bytes = memory_bytes;
  o.threads = host_threads > 0 ? host_threads : config.host().threads();
  o.deterministic = deterministic();
  o.seed = a.seed();
  o.spin = spin;
  return o;
}

std::vector<Job::LayerKind> Job::layer_kinds() const {
  const bool resident = hosts() == 0 || sliding();
  std::vector<LayerKind> kinds(static_cast<size_t>(model.layers),
                               resident ? LayerKind::kResident : LayerKind::kSampled);
  if (resident) return kinds;
  const bool on_hosts = config.attention().dense_kv() == config::HOST;
  for (const uint32_t layer :
       cluster::DenseLayers(config.attention(), static_cast<uint32_t>(model.layers))) {
    kinds[layer] = on_hosts ? LayerKind::kDenseOnHosts : LayerKind::kResident;
  }
  return kinds;
}

uint64_t Job::Offloaded(uint64_t tokens) const {
  if (sliding()) return 0;
  const uint64_t kept = config.attention().sinks() + config.attention().window();
  return tokens > kept ? tokens - kept : 0;
}

std::vector<host::SegmentSpec> Job::Segments(uint64_t prompt_tokens, uint64_t max_tokens) const {
  // One token more than can be attended travels: it leaves behind the last query.
  const uint64_t prompt = Offloaded(prompt_tokens);
  const uint64_t all = Offloaded(prompt_tokens + max_tokens + 1);
  return host::PlanSegments(prompt, all - prompt, config.host().block_tokens());
}

host::OpenSpec OpenSpecFor(const Job& job, RequestId request, uint32_t host,
                           const cluster::RequestPlacement& placement,
                           const std::vector<host::SegmentSpec>& segments) {
  host::OpenSpec spec;
  spec.request = request;
  spec.layers = static_cast<uint32_t>(job.model.layers);
  const auto kinds = job.layer_kinds();
  for (uint32_t layer = 0; layer < kinds.size(); ++layer) {
    if (kinds[layer] != Job::LayerKind::kResident) spec.layer_list.push_back(layer);
  }
  for (uint32_t head = 0; head < placement.kv_heads; ++head) {
    for (uint32_t s = 0; s < segments.size(); ++s) {
      if (placement.Owner(head, s) == host) spec.parts.push_back({head, s, segments[s]});
    }
  }
  return spec;
}

}  // namespace passel::engine
