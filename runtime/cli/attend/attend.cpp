#include "runtime/cli/attend/attend.h"

#include <tbb/parallel_for.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "host_attention/hash.h"
#include "host_attention/isa.h"
#include "runtime/base/bf16.h"
#include "runtime/base/error.h"
#include "runtime/cli/attend/npy.h"

namespace passel::cli {
namespace {

using Clock = std::chrono::steady_clock;

double Milliseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::milli>(Clock::now() - since).count();
}

double Median(std::vector<double> x) {
  const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

void Expect(bool condition, const std::string& what) {
  if (!condition) throw Error(ErrorClass::kIo, what);
}

std::string ShapeOf(const NpyArray& a) {
  std::string s = "[";
  for (const uint64_t n : a.shape) s += (s.size() > 1 ? ", " : "") + std::to_string(n);
  return s + "]";
}

struct Layer {
  NpyArray q, k, v, projections;
  uint64_t heads = 0, kv_heads = 0, n = 0, d = 0, group = 0;
};

Layer Load(const AttendArgs& args) {
  Layer x;
  x.q = ReadNpy(args.q, 2);
  x.k = ReadNpy(args.k, 3);
  x.v = ReadNpy(args.v, 3);
  x.heads = x.q.shape[0];
  x.d = x.q.shape[1];
  x.kv_heads = x.k.shape[0];
  x.n = x.k.shape[1];
  Expect(x.d > 0 && x.d % 16 == 0 && x.d <= 4096,
         args.q + ": is " + ShapeOf(x.q) + "; expected [heads, d] with d a multiple of 16");
  Expect(x.k.shape[2] == x.d && x.kv_heads > 0 && x.n > 0,
         args.k + ": is " + ShapeOf(x.k) + "; expected [kv_heads, n, " + std::to_string(x.d) + "]");
  Expect(x.v.shape == x.k.shape, args.v + ": is " + ShapeOf(x.v) + "; expected " + ShapeOf(x.k));
  Expect(x.heads > 0 && x.heads % x.kv_heads == 0, args.q + ": has " + std::to_string(x.heads) +
                                                       " heads; expected a multiple of the " +
                                                       std::to_string(x.kv_heads) + " KV heads");
  x.group = x.heads / x.kv_heads;
  Expect(x.group <= 1024 && x.kv_heads <= UINT32_MAX, args.q + ": has too many heads");
  if (args.estimator != host::Estimator::kLsh) return x;
  x.projections = ReadNpy(args.projections, 2);
  const std::vector<uint64_t> want = {x.d, uint64_t{args.bits} * args.tables};
  Expect(x.projections.shape == want, args.projections + ": is " + ShapeOf(x.projections) +
                                          "; expected [" + std::to_string(want[0]) + ", " +
                                          std::to_string(want[1]) + "] (d, k·l)");
  return x;
}

// One KV head's rows, mean and codes, as a model rank would send them.
struct HeadData {
  std::vector<bf16> rows;
  std::vector<float> mean;
  std::vector<uint16_t> codes;
};

HeadData Prepare(const Layer& x, uint64_t head, const host::Hasher* hasher, uint32_t l) {
  HeadData data;
  data.rows.resize(x.n * 2 * x.d);
  const float* k = &x.k.data[head * x.n * x.d];
  const float* v = &x.v.data[head * x.n * x.d];
  std::vector<double> sum(x.d);
  for (uint64_t i = 0; i < x.n; ++i) {
    for (uint64_t j = 0; j < x.d; ++j) {
      data.rows[i * 2 * x.d + j] = ToBf16(k[i * x.d + j]);
      data.rows[(i * 2 + 1) * x.d + j] = ToBf16(v[i * x.d + j]);
      sum[j] += static_cast<double>(k[i * x.d + j]);
    }
  }
  for (const double s : sum) data.mean.push_back(static_cast<float>(s / static_cast<double>(x.n)));
  if (hasher == nullptr) return data;
  data.codes.resize(x.n * l);
  constexpr uint64_t kRun = 2048;
  tbb::parallel_for(uint64_t{0}, (x.n + kRun - 1) / kRun, [&](uint64_t run) {
    const uint64_t first = run * kRun;
    hasher->Hash(k + first * x.d, std::min(kRun, x.n - first), data.mean.data(),
                 &data.codes[first * l]);
  });
  return data;
}

void CheckStatus(host::Status status, const char* what) {
  Check(status == host::Status::kOk, what);
}

void Store(const Layer& x, const std::vector<host::SegmentSpec>& plan, const host::Hasher* hasher,
           uint32_t l, host::HostAttention& host) {
  host::OpenSpec open;
  open.request = RequestId(1);
  open.layers = 1;
  open.layer_list = {0};
  for (uint32_t head = 0; head < x.kv_heads; ++head) {
    for (uint32_t s = 0; s < plan.size(); ++s) open.parts.push_back({head, s, plan[s]});
  }
  host.Open(open);
  for (uint32_t head = 0; head < x.kv_heads; ++head) {
    const HeadData data = Prepare(x, head, hasher, l);
    CheckStatus(host.SetMean({RequestId(1), 0, head, data.mean}), "the mean is accepted");
    for (const host::SegmentSpec& s : plan) {
      CheckStatus(
          host.Append({RequestId(1), 0, head, s.first_token, static_cast<uint32_t>(s.capacity),
                       &data.rows[s.first_token * 2 * x.d],
                       hasher == nullptr ? nullptr : &data.codes[s.first_token * l]}),
          "the keys are accepted");
    }
  }
}

// Evicts everything from the caches of the cores that may run us.
class CacheFlusher {
 public:
  explicit CacheFlusher(uint32_t threads) : threads_(std::max(threads, 1u)) {
    const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    const uint64_t size = l3 > 0 ? static_cast<uint64_t>(l3) : uint64_t{64} << 20;
    lines_.resize(std::clamp<uint64_t>(2 * size, uint64_t{64} << 20, uint64_t{1} << 30) / 8);
  }
  void Flush() {
    std::vector<std::jthread> workers;
    for (uint32_t t = 0; t < threads_; ++t) {
      workers.emplace_back([this, t] {
        for (size_t i = t * 8; i < lines_.size(); i += 8 * size_t{threads_}) ++lines_[i];
      });
    }
  }

 private:
  uint32_t threads_;
  std::vector<uint64_t> lines_;
};

std::vector<host::PartialItem> Attend(host::HostAttention& host, const host::AttendBatch& batch) {
  std::promise<std::vector<host::PartialItem>> result;
  CheckStatus(host.Attend(batch,
                          [&result](std::vector<host::PartialItem> partials) {
                            result.set_value(std::move(partials));
                          }),
              "the query is accepted");
  return result.get_future().get();
}

// Writes what was asked for; returns the sampled fraction.
double Write(const AttendArgs& args, const Layer& x,
             const std::vector<host::PartialItem>& partials) {
  std::vector<float> out, lse;
  std::vector<int64_t> ids, offsets = {0};
  double sampled = 0;
  for (const host::PartialItem& p : partials) {
    for (uint64_t h = 0; h < x.group; ++h) {
      for (uint64_t j = 0; j < x.d; ++j) {
        out.push_back(p.den()[h] > 0 ? p.num()[h * x.d + j] / p.den()[h] : 0.0f);
      }
      lse.push_back(p.max()[h] + std::log(p.den()[h]));
      ids.insert(ids.end(), p.ids[h].begin(), p.ids[h].end());
      offsets.push_back(static_cast<int64_t>(ids.size()));
      sampled += static_cast<double>(p.sampled[h]) / static_cast<double>(x.n * x.heads);
    }
  }
  if (!args.out.empty()) WriteNpy(args.out, {x.heads, x.d}, out);
  if (!args.lse.empty()) WriteNpy(args.lse, {x.heads}, lse);
  if (!args.ids.empty()) {
    WriteNpy(args.ids, {ids.size()}, ids);
    WriteNpy(args.ids + ".offsets.npy", {offsets.size()}, offsets);
  }
  return sampled;
}

}  // namespace

int RunAttend(const AttendArgs& args) {
  if (args.bits < 1 || args.bits > 16 || args.tables < 2 || args.tables > 1024) {
    throw Error(ErrorClass::kUsage, "attend: expected attention.k in 1 … 16, l in 2 … 1024");
  }
  if (args.repeat == 0) throw Error(ErrorClass::kUsage, "attend: --repeat must be at least 1");
  const Layer x = Load(args);
  const bool lsh = args.estimator == host::Estimator::kLsh;
  host::Options options;
  options.estimator = args.estimator;
  options.head_dim = static_cast<uint32_t>(x.d);
  options.group = static_cast<uint32_t>(x.group);
  options.k = args.bits;
  options.l = args.tables;
  options.kv_type = args.kv_type;
  options.block_tokens = args.block_tokens;
  options.threads = args.threads;
  options.seed = args.seed;
  options.pin_threads = true;
  const auto plan = host::PlanSegments(x.n, 0, args.block_tokens);
  uint64_t need = 0;
  for (const host::SegmentSpec& s : plan) need += host::SegmentBytes(options, s) * x.kv_heads;
  options.memory_bytes = args.memory_bytes == 0 ? need : args.memory_bytes;

  const Clock::time_point build_start = Clock::now();
  host::HostAttention host(options);
  std::unique_ptr<host::Hasher> hasher;
  std::vector<uint16_t> query_codes(lsh ? x.heads * args.tables : 0);
  if (lsh) {
    hasher = std::make_unique<host::Hasher>(x.projections.data, options.head_dim, args.bits,
                                            args.tables);
    hasher->Hash(x.q.data.data(), x.heads, nullptr, query_codes.data());
  }
  Store(x, plan, hasher.get(), args.tables, host);

  host::AttendBatch batch;
  for (uint32_t head = 0; head < x.kv_heads; ++head) {
    batch.items.push_back({RequestId(1), head, x.n, false, &x.q.data[head * x.group * x.d],
                           lsh ? &query_codes[head * x.group * args.tables] : nullptr});
  }
  batch.collect_ids = true;
  // Untimed: waits for the tables and touches every page.
  const double sampled = Write(args, x, Attend(host, batch));
  const double build_ms = Milliseconds(build_start);
  batch.collect_ids = false;

  const uint32_t threads = args.threads == 0 ? std::thread::hardware_concurrency() : args.threads;
  CacheFlusher flusher(threads);
  std::vector<double> probe, attend, total;
  for (uint32_t r = 0; r < args.repeat; ++r) {
    if (args.cold) flusher.Flush();
    host::AttendBatch::Times times;
    batch.times = &times;
    const Clock::time_point start = Clock::now();
    Attend(host, batch);
    total.push_back(Milliseconds(start));
    probe.push_back(static_cast<double>(times.probe_ns) * 1e-6 / threads);
    attend.push_back(static_cast<double>(times.attend_ns) * 1e-6 / threads);
  }
  const host::MemoryUsage usage = host.usage();
  const nlohmann::json report = {{"probe", Median(probe)},
                                 {"attend", Median(attend)},
                                 {"total", Median(total)},
                                 {"unit", "ms"},
                                 {"sampled_fraction", sampled},
                                 {"n", x.n},
                                 {"heads", x.heads},
                                 {"kv_heads", x.kv_heads},
                                 {"head_dim", x.d},
                                 {"threads", threads},
                                 {"repeat", args.repeat},
                                 {"cold", args.cold},
                                 {"isa", host::IsaName(host::ActiveIsa())},
                                 {"kv_bytes", usage.kv_bytes},
                                 {"table_bytes", usage.table_bytes},
                                 {"build_ms", build_ms}};
  if (args.json) {
    std::printf("%s\n", report.dump().c_str());
  } else {
    std::printf("probe %.3f ms, attend %.3f ms, total %.3f ms, sampled %.3f%% of %llu tokens\n",
                Median(probe), Median(attend), Median(total), 100 * sampled,
                static_cast<unsigned long long>(x.n));
  }
  return 0;
}

}  // namespace passel::cli
