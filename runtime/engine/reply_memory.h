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
  // What is kept: `most` blocks, of so many bytes at least and at most.
  struct Limits {
    size_t most, smallest, largest;
  };
  ReplyMemory(transport::Channel& channel, std::vector<RankId> readers, const Limits& limits)
      : channel_(channel), readers_(std::move(readers)), limits_(limits) {}
  // Of the channel's thread; it may go in any.
  std::shared_ptr<float> Take(size_t floats);

 private:
  transport::Channel& channel_;
  std::vector<RankId> readers_;
  const Limits limits_;
  std::vector<std::shared_ptr<transport::SharedMemory>> blocks_;
};

}  // namespace passel::engine
