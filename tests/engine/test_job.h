#pragma once

#include <string>

#include "cluster/config.h"
#include "runtime/engine/job.h"

namespace passel::engine {

// A job of one model rank and `hosts` host ranks with a small made-up model.
struct JobSpec {
  uint32_t hosts = 1;
  int32_t kv_heads = 2;
  int32_t group = 2;
  int32_t head_dim = 32;
  int32_t layers = 2;
  int64_t context = 4096;
  std::vector<std::string> settings;  // "attention.l=20", …
};
inline Job MakeJob(const JobSpec& spec) {
  Job job;
  job.config = cluster::LoadConfig("", spec.settings);
  job.model.architecture = "llama";
  job.model.layers = spec.layers;
  job.model.kv_heads = spec.kv_heads;
  job.model.heads = spec.kv_heads * spec.group;
  job.model.head_dim = spec.head_dim;
  job.model.context_length = spec.context;
  for (uint32_t r = 0; r <= spec.hosts; ++r) {
    cluster::RankInfo info;
    info.rank = RankId(static_cast<int32_t>(r));
    info.role = r == 0 ? cluster::Role::kModel : cluster::Role::kHost;
    info.index = r == 0 ? 0 : r - 1;
    info.node = "here";
    info.memory_bytes = uint64_t{64} << 20;
    job.ranks.push_back(info);
  }
  job.self = RankId(0);
  return job;
}

}  // namespace passel::engine
