#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "transport/channel.h"

namespace passel::transport {

// Memory of payloads, used again: a rank sends the same frames layer after layer, and memory that
// the system has just given costs more than what is written to it. From any thread; copies are the
// same pool.
class PayloadPool {
 public:
  // Of a former payload, with its content, or empty.
  std::vector<std::byte> Take() {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->free.empty()) return {};
    std::vector<std::byte> out = std::move(shared_->free.back());
    shared_->free.pop_back();
    return out;
  }
  void Give(std::vector<std::byte> payload) { shared_->Give(std::move(payload)); }
  // A frame whose payload comes back once it is sent; until then it holds `owner`, of the pieces
  // behind it.
  OutgoingFrame Frame(FrameHeader header, std::vector<std::byte> payload,
                      std::vector<std::span<const std::byte>> pieces,
                      std::shared_ptr<const void> owner) const {
    struct Loan {
      std::shared_ptr<Shared> shared;
      std::vector<std::byte> payload;
      std::shared_ptr<const void> owner;
    };
    auto loan = std::make_shared<Loan>(Loan{shared_, std::move(payload), std::move(owner)});
    OutgoingFrame frame;
    frame.header = header;
    frame.payload = loan->payload;
    frame.pieces = std::move(pieces);
    frame.done = [loan = std::move(loan)] { loan->shared->Give(std::move(loan->payload)); };
    return frame;
  }

 private:
  // What is kept: 16 MiB.
  static constexpr size_t kMost = 16, kLargest = size_t{1} << 20;
  struct Shared {
    std::mutex mutex;
    std::vector<std::vector<std::byte>> free;
    void Give(std::vector<std::byte> payload) {
      const std::lock_guard lock(mutex);
      if (free.size() < kMost && payload.capacity() <= kLargest) free.push_back(std::move(payload));
    }
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace passel::transport
