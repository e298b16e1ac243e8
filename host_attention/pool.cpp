#include "host_attention/pool.h"

#include <hwloc.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

namespace passel::host {
namespace {

uint32_t MaskThreads() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    return static_cast<uint32_t>(std::max(1, CPU_COUNT(&mask)));
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

// hwloc's view of the cores that this process may use; binds the calling thread to one of them.
class Cores {
 public:
  Cores() {
    if (hwloc_topology_init(&topology_) != 0) {
      topology_ = nullptr;
    } else if (hwloc_topology_load(topology_) != 0) {
      hwloc_topology_destroy(topology_);
      topology_ = nullptr;
    }
    if (topology_ == nullptr) return;
    const hwloc_bitmap_t mask = hwloc_bitmap_alloc();
    if (hwloc_get_cpubind(topology_, mask, HWLOC_CPUBIND_PROCESS) == 0) {
      for (int i = hwloc_bitmap_first(mask); i >= 0; i = hwloc_bitmap_next(mask, i)) {
        units_.push_back(static_cast<unsigned>(i));
      }
    }
    hwloc_bitmap_free(mask);
  }
  ~Cores() {
    if (topology_ != nullptr) hwloc_topology_destroy(topology_);
  }
  Cores(const Cores&) = delete;
  Cores& operator=(const Cores&) = delete;

  // Pinning is a hint: where the system refuses, threads float.
  void Bind(size_t index) const {
    if (units_.empty()) return;
    const hwloc_bitmap_t one = hwloc_bitmap_alloc();
    hwloc_bitmap_only(one, units_[index % units_.size()]);
    hwloc_set_cpubind(topology_, one, HWLOC_CPUBIND_THREAD);
    hwloc_bitmap_free(one);
  }

 private:
  hwloc_topology_t topology_ = nullptr;
  std::vector<unsigned> units_;
};

// Some microseconds, and some hundreds where each thread has a CPU.
int LooksFor(std::chrono::microseconds spin) {
  return spin >= std::chrono::milliseconds(1) ? 4096 : 64;
}

}  // namespace

void BriefMutex::lock() {
  for (int looks = 0;; ++looks) {
    if (!held_.load(std::memory_order_relaxed) &&
        !held_.exchange(true, std::memory_order_acquire)) {
      return;
    }
    if (looks < looks_) {
      __builtin_ia32_pause();
    } else {
      held_.wait(true, std::memory_order_relaxed);
    }
  }
}

void BriefMutex::unlock() {
  held_.store(false, std::memory_order_release);
  held_.notify_one();
}

struct Pool::Loop {
  Lane lane = Lane::kForeground;
  size_t units = 0;
  std::function<void(size_t)> unit;
  std::function<void()> finish;
  std::atomic<size_t> next{0};
  std::atomic<size_t> left{0};

  // All units have begun, if not ended.
  bool begun() const { return next.load(std::memory_order_relaxed) >= units; }
};

Pool::Pool(uint32_t threads, bool pin, std::chrono::microseconds spin)
    : threads_(threads == 0 ? MaskThreads() : threads), spin_(spin), mutex_(LooksFor(spin)) {
  const auto cores = pin ? std::make_shared<const Cores>() : nullptr;
  for (uint32_t i = 0; i < threads_; ++i) {
    workers_.emplace_back([this, cores, i] {
      if (cores != nullptr) cores->Bind(i);
      Work();
    });
  }
}

Pool::~Pool() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return unfinished_ == 0; });
  stopping_ = true;
  ++pushes_;
  pushes_.notify_all();
}

void Pool::Push(Lane lane, Entry entry) {
  const size_t runners = entry.runners;
  {
    const std::lock_guard lock(mutex_);
    unfinished_ += runners;
    if (lane == Lane::kForeground && entry.loop != nullptr) {
      while (!helpable_.empty() && helpable_.front()->begun()) helpable_.pop_front();
      helpable_.push_back(entry.loop);
      any_helpable_ = true;
    }
    (lane == Lane::kForeground ? foreground_ : background_).push_back(std::move(entry));
    ++pushes_;
  }
  if (runners > 1) {
    pushes_.notify_all();
  } else {
    pushes_.notify_one();
  }
}

void Pool::Post(Lane lane, std::function<void()> job) { Push(lane, {std::move(job), nullptr, 1}); }

bool Pool::Take(Entry* entry) {
  if (foreground_.empty() && background_.empty()) return false;
  auto& queue = foreground_.empty() ? background_ : foreground_;
  Entry& front = queue.front();
  if (front.runners > 1) {
    --front.runners;
    entry->loop = front.loop;
    return true;
  }
  *entry = std::move(front);
  queue.pop_front();
  return true;
}

void Pool::AwaitPush(uint32_t seen) {
  if (spin_.count() > 0) {
    const auto asleep = std::chrono::steady_clock::now() + spin_;
    do {
      for (int i = 0; i < 64; ++i) {
        if (pushes_.load(std::memory_order_acquire) != seen) return;
        __builtin_ia32_pause();
      }
    } while (std::chrono::steady_clock::now() < asleep);
  }
  pushes_.wait(seen);
}

void Pool::Work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    Entry entry;
    if (!Take(&entry)) {
      if (stopping_) return;
      const uint32_t seen = pushes_;
      lock.unlock();
      AwaitPush(seen);
      lock.lock();
      continue;
    }
    lock.unlock();
    if (entry.loop != nullptr) {
      RunLoop(entry.loop);
    } else {
      entry.job();
    }
    entry = {};  // what it held goes before the pool counts as idle
    lock.lock();
    if (--unfinished_ == 0) idle_.notify_all();
  }
}

void Pool::ForEach(Lane lane, size_t units, std::function<void(size_t)> unit,
                   std::function<void()> finish) {
  if (units == 0) {
    Post(lane, std::move(finish));
    return;
  }
  auto loop = std::make_shared<Loop>();
  loop->lane = lane;
  loop->units = units;
  loop->unit = std::move(unit);
  loop->finish = std::move(finish);
  loop->left = units;
  Push(lane, {nullptr, std::move(loop), std::min<size_t>(units, threads_)});
}

bool Pool::RunUnit(Loop& loop) {
  const size_t i = loop.next.fetch_add(1);
  if (i >= loop.units) return false;
  loop.unit(i);
  if (loop.left.fetch_sub(1) > 1) return true;
  // What the units held goes before anyone learns that they are done: threads that found none left
  // may keep the loop itself for longer.
  loop.unit = nullptr;
  std::exchange(loop.finish, nullptr)();
  return false;
}

void Pool::RunLoop(const std::shared_ptr<Loop>& loop) {
  while (RunUnit(*loop)) {
    if (loop->lane == Lane::kForeground) continue;
    Push(loop->lane, {nullptr, loop, 1});
    return;
  }
}

bool Pool::Help() {
  if (!any_helpable_.load(std::memory_order_relaxed)) return false;
  std::shared_ptr<Loop> loop;
  {
    const std::lock_guard lock(mutex_);
    while (!helpable_.empty() && helpable_.front()->begun()) helpable_.pop_front();
    any_helpable_ = !helpable_.empty();
    if (helpable_.empty()) return false;
    loop = helpable_.front();
  }
  RunUnit(*loop);
  return true;
}

}  // namespace passel::host
