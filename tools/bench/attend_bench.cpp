// One attention layer on a host rank, caches cold, beside what the machine's memory allows. All
// variants of a benchmark are interleaved: in every round each is timed once, after a flush. The
// time of the benchmark is bf16 LSH's; the counters (docs/performance.md) hold medians.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tools/bench/layer.h"
#include "tools/bench/limits.h"

namespace passel::bench {
namespace {

constexpr int kRounds = 15;

double Median(std::vector<double> x) {
  const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

// The layer of the last benchmark: the next one often has the same.
const Layer& LayerOf(const Shape& shape) {
  static std::unique_ptr<Layer> layer;
  if (layer == nullptr || layer->shape() != shape) {
    layer.reset();
    layer = std::make_unique<Layer>(shape);
  }
  return *layer;
}

// A way to attend, and its times.
struct Variant {
  host::HostAttention* host;
  host::AttendBatch batch;
  uint32_t threads;
  std::vector<double> total, probe, attend;

  double Time(const Layer& layer, bool count) {
    host::AttendBatch::Times times;
    batch.times = &times;
    const double ms = TimeAwake(*host, layer, batch, CallerHelps(threads));
    if (!count) return ms;
    total.push_back(ms);
    probe.push_back(static_cast<double>(times.probe_ns) * 1e-6 / threads);
    attend.push_back(static_cast<double>(times.attend_ns) * 1e-6 / threads);
    return ms;
  }
};

// Host bytes of a token of a KV head, all in.
double BytesPerToken(const host::HostAttention& host, const Layer& layer) {
  return static_cast<double>(host.usage().reserved_bytes) /
         static_cast<double>(layer.shape().n * layer.streams());
}

void LayerBenchmark(benchmark::State& state, const Shape& shape, uint32_t threads) {
  const Layer& layer = LayerOf(shape);
  const auto bf16_host = MakeHost(layer, host::KvType::kBf16, threads);
  const auto int8_host = MakeHost(layer, host::KvType::kInt8, threads);
  Variant lsh{bf16_host.get(), MakeBatch(layer, false), threads, {}, {}, {}};
  Variant int8{int8_host.get(), MakeBatch(layer, false), threads, {}, {}, {}};
  Variant full{bf16_host.get(), MakeBatch(layer, true), threads, {}, {}, {}};

  // Untimed: waits for the tables, touches every page, and tells what is sampled.
  host::AttendBatch first = lsh.batch;
  first.collect_ids = true;
  std::vector<std::vector<uint64_t>> sampled;
  double pairs = 0;
  for (host::PartialItem& p : Attend(*bf16_host, first)) {
    for (std::vector<uint64_t>& ids : p.ids) {
      pairs += static_cast<double>(ids.size());
      sampled.push_back(std::move(ids));
    }
  }
  int8.Time(layer, false);
  full.Time(layer, false);
  Limits limits(layer, sampled);
  Crew crew(threads);
  CacheFlusher flusher;
  std::vector<double> gather, gather8, sequential;
  for (auto _ : state) {
    flusher.Flush();
    state.SetIterationTime(lsh.Time(layer, true) * 1e-3);
    flusher.Flush();
    gather.push_back(limits.Gather(crew, host::KvType::kBf16));
    flusher.Flush();
    int8.Time(layer, true);
    flusher.Flush();
    gather8.push_back(limits.Gather(crew, host::KvType::kInt8));
    flusher.Flush();
    full.Time(layer, true);
    sequential.push_back(limits.Sequential(crew, host::KvType::kBf16, [&] { flusher.Flush(); }));
  }
  const double t = Median(lsh.total), t8 = Median(int8.total), f = Median(full.total);
  const double g = Median(gather), g8 = Median(gather8), s = Median(sequential);
  auto& out = state.counters;
  out["sampled_pct"] = 100 * pairs / static_cast<double>(shape.n * layer.streams() * kGroup);
  out["lsh_ms"] = t;
  out["lsh_probe_ms"] = Median(lsh.probe);
  out["lsh_attend_ms"] = Median(lsh.attend);
  out["lsh_limit_ms"] = g;
  out["lsh_to_limit"] = t / g;
  out["int8_ms"] = t8;
  out["int8_limit_ms"] = g8;
  out["int8_to_limit"] = t8 / g8;
  out["full_ms"] = f;
  // The fastest rounds: what to compare where other processes disturb most of them.
  out["lsh_best_ms"] = *std::min_element(lsh.total.begin(), lsh.total.end());
  out["int8_best_ms"] = *std::min_element(int8.total.begin(), int8.total.end());
  out["full_best_ms"] = *std::min_element(full.total.begin(), full.total.end());
  out["bytes_per_token"] = BytesPerToken(*bf16_host, layer);
  out["int8_bytes_per_token"] = BytesPerToken(*int8_host, layer);
  out["sequential_ms"] = s;
  out["full_of_sequential"] = s / f;
  out["full_to_lsh"] = f / t;
  out["sequential_GBps"] = static_cast<double>(limits.row_bytes(host::KvType::kBf16)) / s * 1e-6;
  out["gather_GBps"] = static_cast<double>(limits.gather_bytes(host::KvType::kBf16)) / g * 1e-6;
}

void Register(const Shape& shape, uint32_t threads) {
  const std::string name =
      "layer/n:" + std::to_string(shape.n) + "/batch:" + std::to_string(shape.batch) +
      "/K:" + std::to_string(shape.k) + "/L:" + std::to_string(shape.l) +
      (shape.clustered ? "/clustered" : "/iid") + "/threads:" + std::to_string(threads);
  benchmark::RegisterBenchmark(
      name.c_str(), [=](benchmark::State& state) { LayerBenchmark(state, shape, threads); })
      ->UseManualTime()
      ->Iterations(kRounds)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace
}  // namespace passel::bench

// Arguments: Google Benchmark's; `large` as the first adds n = 98,304 in batches of 8 and
// n = 1,048,576 (about 20 GiB of memory).
int main(int argc, char** argv) {
  using passel::bench::Shape;
  benchmark::Initialize(&argc, argv);
  std::vector<std::pair<uint64_t, uint32_t>> sizes = {{2048, 1},  {4096, 1},  {8192, 1},
                                                      {16384, 1}, {16384, 8}, {98304, 1}};
  if (argc > 1 && std::string(argv[1]) == "large") {
    sizes.insert(sizes.end(), {{98304, 8}, {1048576, 1}});
  }
  std::vector<Shape> shapes;
  for (const auto& [n, requests] : sizes) {
    for (const bool clustered : {true, false}) {
      for (const auto& [k, l] : {std::pair{10u, 150u}, {10u, 170u}, {11u, 300u}, {8u, 75u}}) {
        shapes.push_back({n, requests, k, l, clustered});
      }
    }
  }
  const uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  for (const Shape& shape : shapes) {
    for (const uint32_t threads : {1u, 2u, 4u, 16u}) {
      if (threads <= cores) passel::bench::Register(shape, threads);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
