// Host bytes per token and KV head, all in: what a request reserves.
#include <gtest/gtest.h>

#include "host_attention/host_attention.h"

namespace passel::host {
namespace {

double BytesPerToken(KvType type, uint64_t n) {
  Options options;
  options.head_dim = 128;
  options.group = 4;
  options.kv_type = type;
  options.memory_bytes = uint64_t{1} << 30;
  options.threads = 1;
  HostAttention host(options);
  OpenSpec open;
  open.request = RequestId(1);
  open.layers = 1;
  open.layer_list = {0};
  const auto plan = PlanSegments(n, 0, options.block_tokens);
  for (uint32_t s = 0; s < plan.size(); ++s) open.parts.push_back({0, s, plan[s]});
  host.Open(open);
  return static_cast<double>(host.usage().reserved_bytes) / static_cast<double>(n);
}

TEST(HostAttentionMemory, BytesPerTokenAtTenBitsAnd150Tables) {
  constexpr double kBf16 = 840, kInt8 = 590;
  for (const uint64_t n : {98304u, 196608u, 1048576u}) {
    EXPECT_LE(BytesPerToken(KvType::kBf16, n), kBf16) << n;
    EXPECT_LE(BytesPerToken(KvType::kInt8, n), kInt8) << n;
  }
  EXPECT_LE(BytesPerToken(KvType::kBf16, 2048), 1.5 * kBf16);
  EXPECT_LE(BytesPerToken(KvType::kInt8, 2048), 1.5 * kInt8);
  // Keys, values and ids are in it.
  EXPECT_GE(BytesPerToken(KvType::kBf16, 98304), 2 * 128 * 2 + 150 * 2);
}

}  // namespace
}  // namespace passel::host
