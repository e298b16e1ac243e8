#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "runtime/base/ids.h"
#include "transport/channel.h"

namespace passel::transport {

struct UcxOptions {
  RankId self;
  // Large frames (rendezvous) are received into at most this much memory at a time; their senders
  // wait for the rest.
  uint64_t max_receive_bytes = 256u << 20;
};

// A channel over UCX active messages: shared memory, TCP, RDMA, whatever UCX finds. It starts in
// two phases, since addresses must travel first: make it, exchange address() of every rank, then
// Connect. Before that only the Set… calls and Close may be used.
class UcxChannel : public Channel {
 public:
  // Of this rank's worker, for the others' Connect.
  virtual std::vector<std::byte> address() const = 0;
  // Connects to every rank of `addresses` but self. `nonce` is the job's. Throws Error{kCluster}.
  // The ranks need not call it at the same time.
  virtual void Connect(const std::map<RankId, std::vector<std::byte>>& addresses,
                       uint64_t nonce) = 0;
  // How long Wait polls before it sleeps; 20 µs where this is not called.
  virtual void SetSpin(std::chrono::microseconds spin) = 0;
};

// Initialises UCX and makes a worker. Sets UCX's environment variables where the user has not, so
// call it before other threads start. Throws Error{kCluster} naming the UCX call.
std::unique_ptr<UcxChannel> MakeUcxChannel(const UcxOptions& options);

}  // namespace passel::transport
