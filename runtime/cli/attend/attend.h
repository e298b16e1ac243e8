#pragma once

#include <cstdint>
#include <string>

#include "host_attention/host_attention.h"

namespace passel::cli {

// The flags of `passel attend` (DESIGN 9), after --set has been applied.
struct AttendArgs {
  std::string q, k, v, projections;  // .npy: [heads, d], [kv_heads, n, d] ×2, [d, K·L]
  std::string out, lse, ids;         // .npy to be written; none where empty
  uint32_t threads = 0;              // 0: the affinity mask's
  uint32_t repeat = 1;
  bool cold = false;  // flush the caches before each repetition
  bool json = false;
  // Of the config.
  host::Estimator estimator = host::Estimator::kLsh;
  host::KvType kv_type = host::KvType::kBf16;
  uint32_t bits = 10, tables = 150;  // attention.k, attention.l
  uint64_t block_tokens = 49152;
  uint64_t seed = 1;
  uint64_t memory_bytes = 0;  // 0: what the data needs
};

// Attention of one layer's queries over host memory, alone: all n keys are offloaded, centred by
// their mean and hashed here. Prints medians and returns the exit code; throws Error.
int RunAttend(const AttendArgs& args);

}  // namespace passel::cli
