#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cluster/health.h"
#include "cluster/messages.h"
#include "runtime/base/bf16.h"
#include "runtime/base/ids.h"
#include "runtime/engine/query_plan.h"
#include "runtime/model/transformer.h"
#include "transport/channel.h"

namespace passel::engine {

// A frame that asks a host for K and V, and where its reply belongs.
struct KvReadFrame {
  uint32_t host;
  std::vector<cluster::ReadKvEntry> entries;
  std::vector<uint64_t> rows;  // of the destination, where each entry's begin
};

// The frames that ask the owners for tokens [first_token, first_token + count) of the KV heads of
// `slice`, in the order of the tokens; the destination is [kv_heads, count] rows. Replies are about
// 4 MiB, and their entries fit a referral.
std::vector<KvReadFrame> PlanKvRead(const cluster::WireShape& shape,
                                    const model::TensorSlice& slice, const HostedRequest& hosted,
                                    uint64_t first_token, uint64_t count, uint32_t hosts);

class KvReader;

// K and V that are being read back. Stays where it is until complete; where it goes before, the
// read is forgotten: its memory is not written to any more. It goes before the link.
class KvBox {
 public:
  KvBox() = default;
  ~KvBox() { Forget(); }
  KvBox(const KvBox&) = delete;
  KvBox& operator=(const KvBox&) = delete;

  size_t open() const { return open_; }  // frames not answered yet
  bool complete() const { return open_ == 0; }
  // As if it had never asked: what still comes is dropped. The request's hosts may then forget it.
  void Forget();

 private:
  friend class KvReader;
  enum class State : uint8_t { kPlanned, kAsked, kAnswered };

  KvReader* reader_ = nullptr;  // while open
  int32_t layer_ = 0;
  uint64_t number_ = 0;  // of the first frame's ticket; the read's on the wire
  bf16* kv_ = nullptr;
  std::vector<KvReadFrame> frames_;
  std::vector<State> states_;  // of the frames
  std::vector<size_t> next_;   // by host: its frames before this one have been asked for
  size_t open_ = 0;
};

// A model rank's side of reading K and V back. One thread, the channel's.
class KvReader {
 public:
  // Set in its tickets; to be clear in those of others.
  static constexpr uint64_t kTicketBit = uint64_t{1} << 63;

  KvReader(transport::Channel& channel, const cluster::WireShape& shape,
           const model::TensorSlice& slice, std::span<const RankId> hosts,
           cluster::HealthTracker& health)
      : channel_(channel), shape_(shape), slice_(slice), hosts_(hosts), health_(health) {}
  KvReader(const KvReader&) = delete;
  KvReader& operator=(const KvReader&) = delete;

  // As HostLink::ReadKv.
  void Read(int32_t layer, const HostedRequest& hosted, uint64_t first_token, uint64_t count,
            bf16* kv, KvBox* box);
  // A kKvRows frame. False where it is not what was asked for, with the reason. Throws
  // Error{kCluster} where a host says that it cannot read.
  bool OnRows(const transport::FrameHeader& header, cluster::PayloadPieces payload,
              std::string* why);

 private:
  friend class KvBox;
  // The next frame to this host, if there is one.
  void AskNext(KvBox& box, uint32_t host);
  void Forget(KvBox& box);

  transport::Channel& channel_;
  const cluster::WireShape& shape_;
  const model::TensorSlice& slice_;
  const std::span<const RankId> hosts_;
  cluster::HealthTracker& health_;
  std::vector<KvBox*> boxes_;  // open ones
  uint64_t next_number_ = 0;
};

}  // namespace passel::engine
