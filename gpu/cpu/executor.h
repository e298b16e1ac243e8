#pragma once

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <cstdint>

namespace passel::gpu::cpu {

// Keeps oneDNN single-threaded on this thread: its OpenMP would start a team of its own inside each
// of our tasks.
class SingleThreadedOpenMp {
 public:
  SingleThreadedOpenMp();
  ~SingleThreadedOpenMp();
  SingleThreadedOpenMp(const SingleThreadedOpenMp&) = delete;
  SingleThreadedOpenMp& operator=(const SingleThreadedOpenMp&) = delete;

 private:
  int threads_before_;
};

// The device's threads: an arena of its own, in which every task runs oneDNN single-threaded.
// Work is cut the same way whatever their number.
class Executor {
 public:
  explicit Executor(int32_t threads)
      : threads_(threads > 0 ? threads : tbb::info::default_concurrency()), arena_(threads_) {}

  int threads() const { return threads_; }

  // f(begin, end) over parts of [0, n), each of at least about `grain` (≥ 1) items. Runs in the
  // caller where that is all there is. Rethrows what f throws.
  template <typename F>
  void For(int64_t n, int64_t grain, const F& f) {
    if (n <= 0) return;
    const SingleThreadedOpenMp guard;
    if (n <= grain || threads_ == 1) {
      f(int64_t{0}, n);
      return;
    }
    arena_.execute([&] {
      tbb::parallel_for(tbb::blocked_range<int64_t>(0, n, static_cast<size_t>(grain)),
                        [&](const tbb::blocked_range<int64_t>& r) {
                          const SingleThreadedOpenMp in_task;
                          f(r.begin(), r.end());
                        });
    });
  }

 private:
  int threads_;
  tbb::task_arena arena_;
};

}  // namespace passel::gpu::cpu
