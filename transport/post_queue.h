#pragma once

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/base/ids.h"
#include "transport/channel.h"

namespace passel::transport {

// Frames that other threads hand to a channel's owner. Any thread may push.
class PostQueue {
 public:
  struct Item {
    RankId to;
    OutgoingFrame frame;
  };

  void Push(RankId to, OutgoingFrame frame) {
    const std::lock_guard lock(mutex_);
    items_.push_back({to, std::move(frame)});
    filled_.store(true, std::memory_order_release);
  }
  // Everything pushed so far, in order. Without a lock where there is nothing.
  std::vector<Item> TakeAll() {
    std::vector<Item> out;
    if (filled_.load(std::memory_order_acquire)) {
      const std::lock_guard lock(mutex_);
      out.swap(items_);
      filled_.store(false, std::memory_order_release);
    }
    return out;
  }
  bool empty() const { return !filled_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::vector<Item> items_;
  std::atomic<bool> filled_{false};
};

}  // namespace passel::transport
