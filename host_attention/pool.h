#pragma once

#include <atomic>
#include <chrono>
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

// A mutex that no one holds for long, but that many threads want at once: a thread looks whether it
// is free, so many times, before it sleeps, and writes only where it is.
class BriefMutex {
 public:
  explicit BriefMutex(int looks) : looks_(looks) {}
  void lock();
  void unlock();

 private:
  const int looks_;
  std::atomic<bool> held_{false};
};

// The worker threads of one host rank, with two queues. Foreground jobs (queries) go before
// background ones (copying, sealing, merging), which are cut into short slices, so that a query
// waits for one slice a thread at most. (A TBB arena has no such order between its tasks.)
class Pool {
 public:
  // threads: 0 means the affinity mask's; pin: one core each (hwloc); spin: for which a thread
  // without work looks for some before it sleeps.
  Pool(uint32_t threads, bool pin, std::chrono::microseconds spin = {});
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
  // Runs one unit of the oldest foreground loop that has one left, on the calling thread, which
  // need be none of the pool's (and runs finish() if that was the last); false if there is none.
  bool Help();

 private:
  struct Loop;
  // A job, or a loop that so many more threads may join.
  struct Entry {
    std::function<void()> job;
    std::shared_ptr<Loop> loop;
    size_t runners = 1;
  };
  void Work();
  // Until pushes_ is no longer `seen`.
  void AwaitPush(uint32_t seen);
  void Push(Lane lane, Entry entry);
  // The next job, without what stays in the queue of its entry; false if there is none. Under the
  // mutex.
  bool Take(Entry* entry);
  void RunLoop(const std::shared_ptr<Loop>& loop);
  // Runs the next unit and, where it was the last to end, finish(); false where none is left to run
  // or all are done.
  static bool RunUnit(Loop& loop);

  uint32_t threads_;
  std::chrono::microseconds spin_;
  BriefMutex mutex_;
  // Changes, under the mutex, with every push. Threads without work sleep on it, not on a condition
  // variable: all that a loop needs are woken by one call, and none has to wait for the mutex to be
  // handed on before it runs.
  std::atomic<uint32_t> pushes_{0};
  std::condition_variable_any idle_;
  std::deque<Entry> foreground_, background_;
  std::deque<std::shared_ptr<Loop>> helpable_;  // foreground loops, until all units have begun
  std::atomic<bool> any_helpable_{false};       // there may be some; changes under the mutex
  size_t unfinished_ = 0;                       // jobs queued or running
  bool stopping_ = false;
  std::vector<std::jthread> workers_;
};

}  // namespace passel::host
