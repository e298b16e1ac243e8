#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#include "runtime/base/error.h"

namespace passel::transport {

// Ends a sleep of the owner thread, from any thread. The system is asked only where the owner
// sleeps or is about to: a call to it costs more than the hand-over that it announces.
class WakeEvent {
 public:
  WakeEvent() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (fd_ < 0) {
      throw Error(ErrorClass::kCluster, std::string("eventfd failed: ") + std::strerror(errno));
    }
  }
  ~WakeEvent() { close(fd_); }
  WakeEvent(const WakeEvent&) = delete;
  WakeEvent& operator=(const WakeEvent&) = delete;

  int fd() const { return fd_; }
  bool is_set() const { return set_.load(std::memory_order_acquire); }
  void Set() {
    // Either this sees that the owner goes to sleep, or the owner sees that it is set.
    if (!set_.exchange(true) && asleep_.load()) eventfd_write(fd_, 1);
  }
  // Returns whether it was set.
  bool Clear() { return is_set() && set_.exchange(false); }
  // The owner is about to sleep on fd(); false, and it must not, where it is set.
  bool FallAsleep() {
    asleep_ = true;
    if (!set_.load()) return true;
    asleep_ = false;
    return false;
  }
  // `written`: fd() was readable. What is written later ends the next sleep, for nothing.
  void Awake(bool written) {
    asleep_ = false;
    eventfd_t ignored;
    if (written) eventfd_read(fd_, &ignored);
  }

 private:
  int fd_;
  std::atomic<bool> set_{false}, asleep_{false};
};

}  // namespace passel::transport
