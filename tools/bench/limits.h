#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "tools/bench/layer.h"

namespace passel::bench {

// Pinned threads that start together, so that waking them is not timed.
class Crew {
 public:
  explicit Crew(uint32_t threads);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  uint32_t threads() const { return static_cast<uint32_t>(workers_.size()); }
  // body(t) on every thread t at once; milliseconds from the common start to the last one's end.
  double Run(const std::function<void(uint32_t)>& body);

 private:
  void Work(uint32_t thread);

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(uint32_t)>* body_ = nullptr;
  uint64_t round_ = 0;
  uint32_t done_ = 0;
  bool stopping_ = false;
  std::atomic<uint32_t> ready_{0};
  std::vector<double> started_, ended_;
  std::vector<std::jthread> workers_;
};

// Evicts everything from the caches of all cores that this process may use.
class CacheFlusher {
 public:
  CacheFlusher();
  void Flush();

 private:
  Crew crew_;
  std::vector<uint64_t> lines_;
};

// What memory allows, by code that does nothing but read and add.
class Limits {
 public:
  // sampled[stream · kGroup + h]: the tokens that head h of the stream samples, ascending.
  Limits(const Layer& layer, const std::vector<std::vector<uint64_t>>& sampled);

  // Milliseconds to read every K and V row in order: the best of several ways to read.
  double Sequential(Crew& crew, host::KvType type, const std::function<void()>& before_each);
  // Milliseconds to read the sampled rows and the entries of the buckets that the queries look up,
  // prefetched. Bounds of buckets are not read: where to look is known here.
  double Gather(Crew& crew, host::KvType type);
  uint64_t gather_bytes(host::KvType type) const;
  uint64_t row_bytes(host::KvType type) const;

 private:
  struct Span {
    const uint16_t* ids;
    uint32_t count;
  };
  // One query head's share of one block.
  struct Task {
    uint32_t stream;
    std::vector<Span> buckets;
    std::vector<uint32_t> tokens;
  };
  const Layer& layer_;
  std::vector<Buffer> ids_;  // by stream and block: [l][stride]
  std::vector<Task> tasks_;
  std::atomic<uint64_t> sink_{0};  // keeps what was read alive
};

}  // namespace passel::bench
