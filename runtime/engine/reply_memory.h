#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "transport/channel.h"

namespace passel::engine {

// Memory of a host rank's replies, used again: model ranks on this machine read them where they
// lie.
class ReplyMemory {
 public:
  ReplyMemory(transport::Channel& channel, std::vector<RankId> readers)
      : channel_(channel), readers_(std::move(readers)) {}
  // Of the channel's thread; it may go in any.
  std::shared_ptr<float> Take(size_t floats);

 private:
  // What is kept: 32 MiB.
  static constexpr size_t kMost = 16, kSmallest = size_t{1} << 16, kLargest = size_t{1} << 21;
  transport::Channel& channel_;
  std::vector<RankId> readers_;
  std::vector<std::shared_ptr<transport::SharedMemory>> blocks_;
};

}  // namespace passel::engine
