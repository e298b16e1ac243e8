#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace passel::host {

// The worker threads of one host rank, with two queues. Foreground jobs (queries) go before
// background ones (sealing, merging), which are cut into short slices, so that a query waits for
// one slice a thread at most. (A TBB arena has no such order between its tasks.)
class Pool {
 public:
  // threads: 0 means the affinity mask's; pin: one core each (hwloc).
  Pool(uint32_t threads, bool pin);
  // Waits for every posted job.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  uint32_t threads() const { return threads_; }
  enum class Lane : uint8_t { kForeground, kBackground };
  // From any thread, also from a job. The job must not throw.
  void Post(Lane lane, std::function<void()> job);
  // Runs unit(i) for i in [0, units), in any order on any threads, then finish() once. A background
  // unit is one slice. With 0 units, finish is posted alone.
  void ForEach(Lane lane, size_t units, std::function<void(size_t)> unit,
               std::function<void()> finish);

 private:
  struct Loop;
  void Work();
  void RunLoop(Lane lane, const std::shared_ptr<Loop>& loop);

  uint32_t threads_;
  std::mutex mutex_;
  std::condition_variable posted_, idle_;
  std::deque<std::function<void()>> foreground_, background_;
  size_t unfinished_ = 0;  // jobs queued or running
  bool stopping_ = false;
  std::vector<std::jthread> workers_;
};

}  // namespace passel::host
