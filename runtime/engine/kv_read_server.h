#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cluster/messages.h"
#include "host_attention/host_attention.h"
#include "runtime/engine/reply_memory.h"
#include "transport/channel.h"
#include "transport/payload_pool.h"

namespace passel::engine {

// A host rank's side of reading K and V back. A read waits for its tokens and, as replies are
// large, until those under way have left room. Of the channel's thread.
class KvReadServer {
 public:
  // `dropped(header, why)`: a read that cannot be answered; from any thread.
  KvReadServer(transport::Channel& channel, const cluster::WireShape& shape,
               std::vector<RankId> readers, host::HostAttention& attention,
               std::function<void(const transport::FrameHeader&, const std::string&)> dropped);

  // A kReadKv frame. False where it is dropped, with the reason.
  bool Take(const transport::FrameHeader& header, cluster::PayloadPieces payload, std::string* why);
  // Starts what waited for room, as far as there is some.
  void Advance();
  // What waited for tokens may have them now.
  void Retry();
  // Reads of the request that wait are not answered.
  void Forget(RequestId request);
  // Whether attention's threads still copy, or post a reply.
  bool busy() const { return copying_ > 0; }

 private:
  struct Read {
    transport::FrameHeader header;
    std::vector<cluster::ReadKvEntry> entries;

    uint64_t bytes() const { return sizeof(Read) + entries.size() * sizeof(entries[0]); }
    uint64_t tokens() const;
  };
  // False where it must wait for its tokens.
  bool Start(const Read& read);
  // The rows lie one behind the other, in `memory`; none where the status is not kOk. From any
  // thread.
  void Reply(const Read& read, host::Status status, std::shared_ptr<float> memory);
  std::shared_ptr<float> TakeMemory(int32_t reader, uint64_t bytes);
  // Of replies to this rank.
  const std::shared_ptr<std::atomic<uint64_t>>& UnderWay(int32_t reader);

  transport::Channel& channel_;
  const cluster::WireShape shape_;
  host::HostAttention& attention_;
  std::function<void(const transport::FrameHeader&, const std::string&)> dropped_;
  transport::PayloadPool payloads_;  // of replies' entries
  ReplyMemory replies_;
  std::list<Read> queue_;    // wait for room
  std::list<Read> waiting_;  // for tokens
  uint64_t bytes_ = 0;       // of both
  // By asking rank, of replies' rows until they are sent, which may be after this is gone. A rank
  // may be unable to fetch its own until another has had its rows.
  std::map<int32_t, std::shared_ptr<std::atomic<uint64_t>>> under_way_;
  std::atomic<int> copying_ = 0;
};

}  // namespace passel::engine
