#include "tools/bench/limits.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "host_attention/kernels.h"
#include "host_attention/tables.h"

#if defined(__x86_64__)
#define PASSEL_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PASSEL_WIDE
#endif

namespace passel::bench {
namespace {

double Now() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::vector<int> AllowedCores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    for (int c = 0; c < CPU_SETSIZE; ++c) {
      if (CPU_ISSET(c, &mask)) cores.push_back(c);
    }
  }
  if (cores.empty()) cores.push_back(0);
  return cores;
}

// A cache line, wherever it begins.
typedef uint64_t Line __attribute__((vector_size(64), aligned(2), may_alias));

// Sums whole cache lines of [p, p + bytes), prefetched into L1 and L2 this far ahead (0: left to
// the hardware).
PASSEL_WIDE uint64_t SumInOrder(const std::byte* p, size_t bytes, size_t ahead, size_t l2_ahead) {
  Line a{}, b{}, c{}, d{};
  for (size_t at = 0; at + 256 <= bytes; at += 256) {
    if (ahead > 0) {
      for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(p + at + ahead + line, 0, 3);
    }
    if (l2_ahead > 0) {
      for (size_t line = 0; line < 256; line += 64) {
        __builtin_prefetch(p + at + l2_ahead + line, 0, 2);
      }
    }
    const auto* lines = reinterpret_cast<const Line*>(p + at);
    a += lines[0];
    b += lines[1];
    c += lines[2];
    d += lines[3];
  }
  a += b + c + d;
  return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

// Sums rows of `bytes`, the last line too where they do not fill it, prefetched 64 rows ahead into
// the L2 cache: faster than any distance into L1, and than 16 rows (docs/performance.md).
PASSEL_WIDE uint64_t SumRows(const std::byte* rows, size_t bytes, const uint32_t* tokens,
                             size_t count) {
  constexpr size_t kAhead = 64;
  Line sum{};
  for (size_t i = 0; i < count; ++i) {
    const std::byte* next = rows + size_t{tokens[i + kAhead < count ? i + kAhead : i]} * bytes;
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at, 0, 2);
    __builtin_prefetch(next + bytes - 1, 0, 2);
    const std::byte* row = rows + size_t{tokens[i]} * bytes;
    for (size_t at = 0; at + 64 <= bytes; at += 64) sum += *reinterpret_cast<const Line*>(row + at);
    if (bytes % 64 != 0) sum += *reinterpret_cast<const Line*>(row + bytes - 64);
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// Sums the cache lines that ids lie in.
PASSEL_WIDE uint64_t SumLines(const uint16_t* ids, size_t count) {
  Line sum{};
  const auto* line =
      reinterpret_cast<const std::byte*>(reinterpret_cast<uintptr_t>(ids) & ~uintptr_t{63});
  const auto* end = reinterpret_cast<const std::byte*>(ids + count);
  for (; line < end; line += 64) sum += *reinterpret_cast<const Line*>(line);
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

}  // namespace

Crew::Crew(uint32_t threads) : started_(threads), ended_(threads) {
  for (uint32_t t = 0; t < threads; ++t) workers_.emplace_back([this, t] { Work(t); });
}

Crew::~Crew() {
  const std::lock_guard lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
}

void Crew::Work(uint32_t thread) {
  const std::vector<int> cores = AllowedCores();
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(cores[thread % cores.size()], &mask);
  sched_setaffinity(0, sizeof(mask), &mask);
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || round_ != seen; });
    if (stopping_) return;
    seen = round_;
    lock.unlock();
    ready_.fetch_add(1);
    while (ready_.load() < threads()) {
    }
    started_[thread] = Now();
    (*body_)(thread);
    ended_[thread] = Now();
    lock.lock();
    if (++done_ == threads()) changed_.notify_all();
  }
}

double Crew::Run(const std::function<void(uint32_t)>& body) {
  std::unique_lock lock(mutex_);
  body_ = &body;
  done_ = 0;
  ready_ = 0;
  ++round_;
  changed_.notify_all();
  changed_.wait(lock, [this] { return done_ == threads(); });
  return *std::max_element(ended_.begin(), ended_.end()) -
         *std::min_element(started_.begin(), started_.end());
}

CacheFlusher::CacheFlusher() : crew_(static_cast<uint32_t>(AllowedCores().size())) {
  const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const uint64_t size = l3 > 0 ? static_cast<uint64_t>(l3) : uint64_t{64} << 20;
  lines_.resize(std::clamp<uint64_t>(2 * size, uint64_t{64} << 20, uint64_t{1} << 30) / 8);
}

void CacheFlusher::Flush() {
  crew_.Run([this](uint32_t t) {
    for (size_t i = t * 8; i < lines_.size(); i += 8 * size_t{crew_.threads()}) ++lines_[i];
  });
}

Limits::Limits(const Layer& layer, const std::vector<std::vector<uint64_t>>& sampled)
    : layer_(layer) {
  const Shape& shape = layer.shape();
  const auto plan = host::PlanSegments(shape.n, 0, host::Options().block_tokens);
  const size_t buckets = size_t{1} << shape.k;
  std::vector<uint16_t> codes, bounds(buckets + 1);
  for (uint32_t stream = 0; stream < layer.streams(); ++stream) {
    for (const host::SegmentSpec& block : plan) {
      const auto tokens = static_cast<uint32_t>(block.capacity);
      const size_t stride = host::TableStride(tokens);
      ids_.emplace_back((stride * shape.l + 64) * sizeof(uint16_t));
      auto* ids = reinterpret_cast<uint16_t*>(ids_.back().data());
      std::vector<Task> tasks(kGroup);
      codes.resize(tokens);
      for (uint32_t t = 0; t < shape.l; ++t) {
        const uint16_t* from = layer.codes(stream) + block.first_token * shape.l + t;
        for (uint32_t i = 0; i < tokens; ++i) codes[i] = from[size_t{i} * shape.l];
        host::SortTable(codes.data(), tokens, shape.k, bounds.data(), ids + t * stride);
        for (uint32_t h = 0; h < kGroup; ++h) {
          const uint16_t c = layer.query_codes(stream)[size_t{h} * shape.l + t];
          tasks[h].buckets.push_back(
              {ids + t * stride + bounds[c], static_cast<uint32_t>(bounds[c + 1] - bounds[c])});
        }
      }
      for (uint32_t h = 0; h < kGroup; ++h) {
        tasks[h].stream = stream;
        for (const uint64_t token : sampled[size_t{stream} * kGroup + h]) {
          if (token - block.first_token < block.capacity) {
            tasks[h].tokens.push_back(static_cast<uint32_t>(token));
          }
        }
        tasks_.push_back(std::move(tasks[h]));
      }
    }
  }
}

uint64_t Limits::row_bytes(host::KvType type) const {
  return layer_.streams() * layer_.shape().n * host::RowStride(type, kHeadDim);
}

uint64_t Limits::gather_bytes(host::KvType type) const {
  uint64_t bytes = 0;
  for (const Task& task : tasks_) {
    bytes += task.tokens.size() * host::RowStride(type, kHeadDim);
    for (const Span& span : task.buckets) bytes += span.count * sizeof(uint16_t);
  }
  return bytes;
}

double Limits::Sequential(Crew& crew, host::KvType type, const std::function<void()>& before_each) {
  const size_t bytes = layer_.shape().n * host::RowStride(type, kHeadDim);
  constexpr size_t kPiece = size_t{2} << 20;
  const size_t pieces = (bytes + kPiece - 1) / kPiece;
  double best = std::numeric_limits<double>::infinity();
  constexpr std::pair<size_t, size_t> kWays[] = {{0, 0}, {4096, 0}, {0, 16384}, {0, 65536}};
  for (const auto& [ahead, l2_ahead] : kWays) {
    before_each();
    std::atomic<size_t> next{0};
    best = std::min(best, crew.Run([&, ahead = ahead, l2_ahead = l2_ahead](uint32_t) {
      for (size_t i = next++; i < pieces * layer_.streams(); i = next++) {
        const auto* rows =
            reinterpret_cast<const std::byte*>(layer_.rows(static_cast<uint32_t>(i / pieces)));
        const size_t at = i % pieces * kPiece;
        sink_ += SumInOrder(rows + at, std::min(kPiece, bytes - at), ahead, l2_ahead);
      }
    }));
  }
  return best;
}

double Limits::Gather(Crew& crew, host::KvType type) {
  constexpr size_t kAhead = 24;
  std::atomic<size_t> next{0};
  return crew.Run([&](uint32_t) {
    for (size_t i = next++; i < tasks_.size(); i = next++) {
      const Task& task = tasks_[i];
      uint64_t sum = 0;
      for (size_t b = 0; b < task.buckets.size(); ++b) {
        const Span& ahead = task.buckets[std::min(b + kAhead, task.buckets.size() - 1)];
        const auto* end = reinterpret_cast<const std::byte*>(ahead.ids + ahead.count);
        const auto* line = reinterpret_cast<const std::byte*>(
            reinterpret_cast<uintptr_t>(ahead.ids) & ~uintptr_t{63});
        for (int j = 0; j < 4 && line < end; ++j, line += 64) __builtin_prefetch(line, 0, 2);
        sum += SumLines(task.buckets[b].ids, task.buckets[b].count);
      }
      sum += SumRows(reinterpret_cast<const std::byte*>(layer_.rows(task.stream)),
                     host::RowStride(type, kHeadDim), task.tokens.data(), task.tokens.size());
      sink_ += sum;
    }
  });
}

}  // namespace passel::bench
