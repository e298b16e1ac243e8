// Building a sealed block of 49,152 tokens from its codes, as they come with the tokens:
// transposed, then counting-sorted table by table. One thread. `ns_per_id`: time ÷ (tokens ·
// tables).
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "host_attention/kernels.h"
#include "host_attention/tables.h"
#include "runtime/base/random.h"

namespace passel::bench {
namespace {

constexpr uint32_t kTokens = 49152, kSpan = 1024;

void Seal(benchmark::State& state) {
  const auto k = static_cast<uint32_t>(state.range(0)), l = static_cast<uint32_t>(state.range(1));
  Random random(1);
  std::vector<uint16_t> codes(size_t{kTokens} * l);
  for (uint16_t& c : codes) c = static_cast<uint16_t>(random.Next() & ((1u << k) - 1));
  std::vector<uint16_t> ids(host::IdBytes(kTokens, l) / 2), bounds(host::BoundBytes(kTokens, k, l));
  std::vector<uint16_t> scratch(host::kMaxBlockTokens + 1);
  for (auto _ : state) {
    host::TableBlock block(0, kTokens, k, l, ids.data(), bounds.data());
    for (uint32_t at = 0; at < kTokens; at += kSpan) {
      block.PutCodes(at, kSpan, &codes[size_t{at} * l]);
    }
    for (uint32_t t = 0; t < l; ++t) block.SealTable(t, scratch.data());
    benchmark::ClobberMemory();
  }
  state.counters["ids"] = benchmark::Counter(static_cast<double>(kTokens) * l,
                                             benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(Seal)->Args({10, 150})->Args({11, 300})->Args({8, 75})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace passel::bench

BENCHMARK_MAIN();
