#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cluster/control.pb.h"
#include "host_attention/host_attention.h"
#include "runtime/engine/job.h"
#include "runtime/engine/kv_read_server.h"
#include "runtime/engine/reply_memory.h"
#include "transport/channel.h"
#include "transport/payload_pool.h"

namespace passel::engine {

// The loop of a host rank: takes K, V and codes in, answers queries, until it is told to stop or
// the model ranks are gone. One thread; attention runs on HostAttention's own threads.
class HostRank {
 public:
  HostRank(const Job& job, transport::Channel& channel, uint64_t memory_bytes);

  // Returns the exit code that model rank 0 gave. Throws Error{kCluster} where it fell silent.
  int Run();

 private:
  // A query frame that waits for its tokens, or whose answer is being computed.
  struct Query {
    transport::FrameHeader header;
    std::vector<cluster::QueryView> views;
    std::shared_ptr<const void> memory;        // where these lie; until the answer is computed
    std::vector<cluster::PartialEntry> asked;  // the answers' entries, by item of the batch

    uint64_t bytes() const {
      uint64_t bytes = sizeof(Query) + views.capacity() * sizeof(cluster::QueryView) +
                       asked.capacity() * sizeof(cluster::PartialEntry);
      for (const auto& v : views) bytes += v.q.size_bytes() + v.codes.size_bytes();
      return bytes;
    }
  };

  // K and V that came before those of the tokens in front of them: a small frame may overtake a
  // large one.
  struct EarlyKv {
    transport::FrameHeader header;
    cluster::KvEntry entry;
    std::vector<bf16> rows;
    std::vector<uint16_t> codes;
  };

  void OnFrame(const transport::FrameHeader& header, transport::IncomingPayload& payload);
  void OnKv(const transport::FrameHeader& header, transport::IncomingPayload& payload);
  std::shared_ptr<const void> Hold(transport::IncomingPayload& payload, uint64_t bytes);
  // False where tokens in front are missing; appending again what is there does nothing. memory: of
  // its arrays, where others may write to it.
  bool TakeKv(const transport::FrameHeader& header, const cluster::KvView& kv,
              const std::shared_ptr<const void>& memory);
  // Whether attention's threads still use memory of the transport's.
  bool busy() const { return in_flight_ > 0 || held_bytes_ > 0 || reads_.busy(); }
  void OnKeyMean(const transport::FrameHeader& header, std::span<const std::byte> payload);
  void OnQuery(const transport::FrameHeader& header, transport::IncomingPayload& payload);
  void OnControl(const transport::FrameHeader& header, std::span<const std::byte> payload);
  void Open(const cluster::proto::OpenRequest& open);
  void Drop(const transport::FrameHeader& header, const std::string& why);
  bool Ready(const Query& query) const;
  static void MoveToOwnMemory(Query& query);
  // False where the query must wait for its tokens.
  bool Start(const std::shared_ptr<Query>& query);
  void Reply(const Query& query, std::vector<host::PartialItem> items);
  void RetryEarly();
  void RetryWaiting();
  void SendControl(RankId to, const cluster::proto::Control& message);

  const Job& job_;
  transport::Channel& channel_;
  cluster::WireShape shape_;
  transport::PayloadPool payloads_;  // of replies' entries
  ReplyMemory replies_;
  KvReadServer reads_;
  std::atomic<uint64_t> held_bytes_ = 0;  // of K, V frames
  host::HostAttention attention_;
  std::deque<std::shared_ptr<Query>> waiting_;
  uint64_t waiting_bytes_ = 0;
  std::list<EarlyKv> early_;
  uint64_t early_bytes_ = 0;
  std::atomic<int> in_flight_ = 0;
  std::atomic<uint64_t> dropped_ = 0;
  uint64_t peak_kv_ = 0, peak_tables_ = 0;
  std::chrono::steady_clock::time_point heard_;
  std::chrono::steady_clock::time_point beat_;
  bool stop_ = false;
  int exit_code_ = 0;
};

}  // namespace passel::engine
