#pragma once

#include <cstdint>
#include <memory>

#include "tests/transport/forked_ranks.h"
#include "tests/transport/ucx_ways.h"

// What tests of shared memory between processes begin with.
namespace passel::transport {

using Memory = std::shared_ptr<SharedMemory>;

// Frames of one piece in `memory` until `to` has fetched one; control frames, which pass whatever
// the epoch.
inline void SendUntilReferred(Channel& channel, RankId to, const Memory& memory) {
  const uint64_t before = channel.stats().frames_referred;
  const auto under_way = std::make_shared<bool>(false);
  const auto referred = [&] {
    if (*under_way) return false;
    if (channel.stats().frames_referred > before) return true;
    *under_way = true;
    channel.Send(to, {Header(FrameType::kControl),
                      {},
                      [under_way] { *under_way = false; },
                      {memory->bytes().first(8192)}});
    return false;
  };
  ForkedRank::Until(channel, referred, "no frame was referred");
}

}  // namespace passel::transport
