#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "transport/ucx_channel.h"

namespace passel::transport {

// One of the processes that RunForked starts. Require ends it with a message on stderr.
class ForkedRank {
 public:
  ForkedRank(int32_t rank, int32_t size, int socket) : rank_(rank), size_(size), socket_(socket) {}

  int32_t rank() const { return rank_; }
  int32_t size() const { return size_; }

  // Makes a channel, exchanges addresses and connects to all.
  std::unique_ptr<UcxChannel> Start(uint64_t nonce, const UcxOptions& options) const;
  std::unique_ptr<UcxChannel> Start(uint64_t nonce) const {
    return Start(nonce, {.self = RankId(rank_)});
  }
  // What each living rank gives; every living rank must call it. `channel` (may be null) goes on
  // meanwhile.
  std::map<int32_t, std::vector<std::byte>> Exchange(const std::vector<std::byte>& mine,
                                                     Channel* channel) const;
  void Barrier(Channel* channel) const { Exchange({}, channel); }

  static void Require(bool condition, std::string_view what);
  // Progress and Wait until `ready`, at most 20 s.
  static void Until(Channel& channel, const std::function<bool()>& ready, std::string_view what);

 private:
  int32_t rank_, size_;
  int socket_;
};

// Runs `body` in `ranks` processes with these environment variables and waits for all. Returns what
// went wrong, empty where every process returned from `body`, or was killed while named in
// `may_die`. A process that takes over 60 s counts as failed.
std::string RunForked(int32_t ranks, const std::map<std::string, std::string>& environment,
                      const std::function<void(ForkedRank&)>& body,
                      const std::vector<int32_t>& may_die = {});

}  // namespace passel::transport
