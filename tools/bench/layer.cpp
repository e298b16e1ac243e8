#include "tools/bench/layer.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <future>
#include <thread>
#include <utility>

#include "host_attention/hash.h"
#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::bench {
namespace {

constexpr uint64_t kRowBytes = 2 * kHeadDim * sizeof(bf16);
constexpr double kClusteredShare = 0.0075;

void ParallelFor(uint64_t count, const std::function<void(uint64_t)>& body) {
  std::atomic<uint64_t> next{0};
  std::vector<std::jthread> workers;
  for (uint32_t t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    workers.emplace_back([&] {
      for (uint64_t i = next++; i < count; i = next++) body(i);
    });
  }
}

// x ← a vector of x's length at this cosine to q.
void Turn(std::vector<double>& x, const float* q, double cosine) {
  double xx = 0, qq = 0, xq = 0;
  for (uint32_t j = 0; j < kHeadDim; ++j) {
    xx += x[j] * x[j];
    qq += static_cast<double>(q[j]) * static_cast<double>(q[j]);
    xq += x[j] * static_cast<double>(q[j]);
  }
  const double along = cosine * std::sqrt(xx / qq);
  const double across = std::sqrt((1 - cosine * cosine) * xx / (xx - xq * xq / qq));
  for (uint32_t j = 0; j < kHeadDim; ++j) {
    const double qj = static_cast<double>(q[j]);
    x[j] = along * qj + across * (x[j] - xq / qq * qj);
  }
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Check(p != MAP_FAILED, "there is memory for the benchmark's data");
  madvise(p, bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(p);
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Layer::Layer(const Shape& shape)
    : shape_(shape),
      rows_(streams()),
      codes_(streams()),
      q_(size_t{streams()} * kGroup * kHeadDim),
      query_codes_(size_t{streams()} * kGroup * shape.l),
      means_(streams()) {
  Random random(17);
  for (float& x : q_) x = ToFloat(ToBf16(static_cast<float>(random.Normal())));
  ParallelFor(streams(), [this](uint64_t s) { Generate(static_cast<uint32_t>(s)); });
  const host::Hasher hasher(RandomProjections(23, kHeadDim, shape.k, shape.l), kHeadDim, shape.k,
                            shape.l);
  hasher.Hash(q_.data(), size_t{streams()} * kGroup, nullptr, query_codes_.data());
  constexpr uint64_t kRun = 1024;
  const uint64_t runs = (shape.n + kRun - 1) / kRun;
  ParallelFor(streams() * runs, [&](uint64_t i) {
    const auto stream = static_cast<uint32_t>(i / runs);
    const uint64_t first = i % runs * kRun, count = std::min(kRun, shape.n - first);
    std::vector<float> keys(count * kHeadDim);
    for (uint64_t r = 0; r < count; ++r) {
      const bf16* row = rows(stream) + (first + r) * 2 * kHeadDim;
      for (uint32_t j = 0; j < kHeadDim; ++j) keys[r * kHeadDim + j] = ToFloat(row[j]);
    }
    hasher.Hash(keys.data(), count, means_[stream].data(), &codes_[stream][first * shape.l]);
  });
}

void Layer::Generate(uint32_t stream) {
  Random random(1000 + stream);
  rows_[stream] = Buffer(shape_.n * kRowBytes);
  codes_[stream].resize(shape_.n * shape_.l);
  auto* out = reinterpret_cast<bf16*>(rows_[stream].data());
  std::vector<double> x(kHeadDim), sum(kHeadDim);
  // Values come from a pool: only that they differ from row to row matters.
  std::vector<bf16> pool(1 << 16);
  for (bf16& v : pool) v = ToBf16(static_cast<float>(random.Normal()));
  for (uint64_t i = 0; i < shape_.n; ++i) {
    for (double& v : x) v = random.Normal();
    if (shape_.clustered && random.Uniform() < kClusteredShare) {
      Turn(x, q(stream) + random.Next() % kGroup * kHeadDim, 0.3 + 0.5 * random.Uniform());
    }
    bf16* row = out + i * 2 * kHeadDim;
    for (uint32_t j = 0; j < kHeadDim; ++j) {
      row[j] = ToBf16(static_cast<float>(x[j]));
      sum[j] += static_cast<double>(ToFloat(row[j]));
    }
    std::copy_n(&pool[random.Next() % (pool.size() - kHeadDim)], kHeadDim, row + kHeadDim);
  }
  for (const double s : sum) {
    means_[stream].push_back(static_cast<float>(s / static_cast<double>(shape_.n)));
  }
}

const float* Layer::q(uint32_t stream) const { return &q_[size_t{stream} * kGroup * kHeadDim]; }

const uint16_t* Layer::query_codes(uint32_t stream) const {
  return &query_codes_[size_t{stream} * kGroup * shape_.l];
}

bool CallerHelps(uint32_t threads) {
  return threads > 1 && threads >= std::thread::hardware_concurrency();
}

std::unique_ptr<host::HostAttention> MakeHost(const Layer& layer, host::KvType type,
                                              uint32_t threads) {
  const Shape& shape = layer.shape();
  host::Options options;
  options.head_dim = kHeadDim;
  options.group = kGroup;
  options.k = shape.k;
  options.l = shape.l;
  options.kv_type = type;
  options.threads = CallerHelps(threads) ? threads - 1 : threads;
  options.pin_threads = true;
  options.spin = std::chrono::milliseconds(2);
  const auto plan = host::PlanSegments(shape.n, 0, options.block_tokens);
  for (const host::SegmentSpec& s : plan) {
    options.memory_bytes += host::SegmentBytes(options, s) * layer.streams();
  }
  auto host = std::make_unique<host::HostAttention>(options);
  for (uint32_t r = 0; r < shape.batch; ++r) {
    host::OpenSpec open{.request = RequestId(r + 1), .layers = 1, .layer_list = {0}, .parts = {}};
    for (uint32_t head = 0; head < kKvHeads; ++head) {
      for (uint32_t s = 0; s < plan.size(); ++s) open.parts.push_back({head, s, plan[s]});
    }
    host->Open(open);
  }
  for (uint32_t stream = 0; stream < layer.streams(); ++stream) {
    const RequestId request(stream / kKvHeads + 1);
    const uint32_t head = stream % kKvHeads;
    bool ok = host->SetMean({request, 0, head, layer.mean(stream)}) == host::Status::kOk;
    for (const host::SegmentSpec& s : plan) {
      ok &= host->Append({request, 0, head, s.first_token, static_cast<uint32_t>(s.capacity),
                          layer.rows(stream) + s.first_token * 2 * kHeadDim,
                          layer.codes(stream) + s.first_token * shape.l}) == host::Status::kOk;
    }
    Check(ok, "the layer is accepted");
  }
  return host;
}

host::AttendBatch MakeBatch(const Layer& layer, bool exact) {
  host::AttendBatch batch;
  for (uint32_t stream = 0; stream < layer.streams(); ++stream) {
    batch.items.push_back({RequestId(stream / kKvHeads + 1), stream % kKvHeads, layer.shape().n,
                           exact, layer.q(stream), layer.query_codes(stream)});
  }
  return batch;
}

std::vector<host::PartialItem> Attend(host::HostAttention& host, const host::AttendBatch& batch,
                                      bool help, double* ms) {
  using Clock = std::chrono::steady_clock;
  std::promise<std::pair<Clock::time_point, std::vector<host::PartialItem>>> result;
  const auto start = Clock::now();
  const host::Status status = host.Attend(batch, [&](std::vector<host::PartialItem> partials) {
    result.set_value({Clock::now(), std::move(partials)});
  });
  Check(status == host::Status::kOk, "the query is accepted");
  auto future = result.get_future();
  while (help && future.wait_for(std::chrono::seconds(0)) != std::future_status::ready) host.Help();
  auto [end, partials] = future.get();
  if (ms != nullptr) *ms = std::chrono::duration<double, std::milli>(end - start).count();
  return std::move(partials);
}

double TimeAwake(host::HostAttention& host, const Layer& layer, const host::AttendBatch& batch,
                 bool help) {
  host::AttendBatch wake = MakeBatch(layer, true);
  for (host::QueryItem& item : wake.items) item.offloaded_tokens = 1;
  const std::vector<host::QueryItem> once = wake.items;
  while (wake.items.size() < 256) wake.items.insert(wake.items.end(), once.begin(), once.end());
  Attend(host, wake, help);
  std::this_thread::sleep_for(std::chrono::microseconds(200));
  double ms = 0;
  Attend(host, batch, help, &ms);
  return ms;
}

}  // namespace passel::bench
