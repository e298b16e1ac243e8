#include "runtime/engine/host_rank.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstring>

#include "runtime/base/error.h"

namespace passel::engine {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t kMaxWaitingBytes = uint64_t{256} << 20;
constexpr uint64_t kMaxEarlyBytes = uint64_t{256} << 20;
// Of K, V frames that attention's threads copy: of one at least, and of all at most.
constexpr uint64_t kLeastHeld = uint64_t{64} << 10, kMostHeld = uint64_t{64} << 20;

// What is kept for partials: 32 MiB.
constexpr ReplyMemory::Limits kReplyMemory{16, size_t{1} << 16, size_t{1} << 21};

std::vector<std::byte> Serialize(const cluster::proto::Control& message) {
  std::vector<std::byte> out(message.ByteSizeLong());
  message.SerializeToArray(out.data(), static_cast<int>(out.size()));
  return out;
}

}  // namespace

HostRank::HostRank(const Job& job, transport::Channel& channel, uint64_t memory_bytes)
    : job_(job),
      channel_(channel),
      shape_(job.wire_shape()),
      replies_(channel, job.RanksOf(cluster::Role::kModel), kReplyMemory),
      reads_(channel, shape_, job.RanksOf(cluster::Role::kModel), attention_,
             [this](const transport::FrameHeader& h, const std::string& why) { Drop(h, why); }),
      attention_(job.host_options(memory_bytes)),
      heard_(Clock::now()),
      beat_(Clock::now()) {
  channel_.SetFrameHandler([this](const transport::FrameHeader& h, transport::IncomingPayload& p) {
    try {
      OnFrame(h, p);
    } catch (const std::exception& e) {  // nothing may cross the transport's C callback
      Drop(h, e.what());
    }
  });
  channel_.SetPeerLostHandler([this](RankId peer, const std::string& reason) {
    if (job_.ranks[static_cast<size_t>(peer.value)].role == cluster::Role::kModel && !stop_) {
      spdlog::debug("model rank {} lost: {}", peer.value, reason);
      heard_ = {};
    }
  });
}

int HostRank::Run() {
  const auto timeout = std::chrono::duration<double>(job_.config.cluster().failure_timeout_s());
  const RankId leader{0};
  heard_ = beat_ = Clock::now();  // the weights' loading does not count
  auto looked = heard_;
  // Where each thread has a CPU (cluster::SpinTime), this one takes a share of the work; elsewhere
  // it would hold a unit while another thread runs in its place.
  const bool helps = job_.spin >= std::chrono::milliseconds(1);
  while (!stop_) {
    const bool any = channel_.Progress();
    reads_.Advance();  // replies that are gone have left room
    const bool helped = helps && attention_.Help();
    if (!any && !helped) channel_.Wait(std::chrono::milliseconds(100));
    const auto now = Clock::now();
    // This process stood still (SIGSTOP, a debugger): nobody could be heard in that time.
    if (now - looked > std::chrono::seconds(1)) heard_ += now - looked;
    looked = now;
    if (now - heard_ > timeout) {
      while (busy()) channel_.Wait(std::chrono::milliseconds(1));
      const std::string what =
          "host rank " + std::to_string(job_.self.value) + ": model rank 0 is gone";
      // Every host rank sees the same; one says so.
      if (job_.info().index > 0) throw cluster::SilentError(ErrorClass::kCluster, what);
      throw Error(ErrorClass::kCluster, what);
    }
    if (now - beat_ > timeout / 4) {
      beat_ = now;
      transport::FrameHeader h;
      h.type = transport::FrameType::kHeartbeat;
      channel_.Send(leader, transport::OutgoingFrame::Own(h, {}));
    }
  }
  while (busy()) {
    if (!channel_.Progress()) channel_.Wait(std::chrono::milliseconds(1));
  }
  return exit_code_;
}

void HostRank::Drop(const transport::FrameHeader& header, const std::string& why) {
  ++dropped_;
  spdlog::warn("host rank {}: dropped a frame of type {} from rank {}: {}", job_.self.value,
               static_cast<int>(header.type), header.source, why);
}

void HostRank::OnFrame(const transport::FrameHeader& header, transport::IncomingPayload& payload) {
  if (header.source < 0 || static_cast<size_t>(header.source) >= job_.ranks.size() ||
      job_.ranks[static_cast<size_t>(header.source)].role != cluster::Role::kModel) {
    return Drop(header, "expected a model rank as the source");
  }
  if (header.source == 0) heard_ = Clock::now();
  switch (header.type) {
    case transport::FrameType::kKv:
      return OnKv(header, payload);
    case transport::FrameType::kKeyMean:
      return OnKeyMean(header, payload);
    case transport::FrameType::kQuery:
      return OnQuery(header, payload);
    case transport::FrameType::kControl:
      return OnControl(header, payload);
    case transport::FrameType::kHeartbeat:
      return;
    case transport::FrameType::kReadKv:
      if (std::string why; !reads_.Take(header, payload.pieces(), &why)) Drop(header, why);
      return;
    case transport::FrameType::kPartial:
    case transport::FrameType::kKvRows:
      return Drop(header, "a frame for model ranks");
  }
  Drop(header, "unknown type");
}

// The memory of a frame until it has been copied.
std::shared_ptr<const void> HostRank::Hold(transport::IncomingPayload& payload, uint64_t bytes) {
  class Held {
   public:
    Held(HostRank& rank, std::shared_ptr<const void> memory, uint64_t bytes)
        : rank_(rank), memory_(std::move(memory)), bytes_(bytes) {
      rank_.held_bytes_ += bytes_;
    }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    ~Held() {
      memory_.reset();
      rank_.channel_.Wake();
      rank_.held_bytes_ -= bytes_;
    }

   private:
    HostRank& rank_;
    std::shared_ptr<const void> memory_;
    const uint64_t bytes_;
  };
  return std::make_shared<const Held>(*this, payload.Keep(), bytes);
}

void HostRank::OnKv(const transport::FrameHeader& header, transport::IncomingPayload& payload) {
  // Attention's threads copy large frames, from where they lie; where they are behind, this one.
  std::shared_ptr<const void> memory;
  std::span<const std::byte> whole;
  if (header.payload_bytes >= kLeastHeld && held_bytes_ < kMostHeld) {
    memory = Hold(payload, header.payload_bytes);
  } else {
    whole = payload.whole();
  }
  std::string why;
  const auto views = cluster::ParseKv(
      shape_, header.count, memory ? payload.pieces() : cluster::PayloadPieces(&whole, 1), &why);
  if (!views) return Drop(header, why);
  for (const cluster::KvView& v : *views) {
    if (TakeKv(header, v, memory)) continue;
    const uint64_t bytes = v.rows.size_bytes() + v.codes.size_bytes();
    if (early_bytes_ + bytes > kMaxEarlyBytes) {
      Drop(header, "too much comes early");
      continue;
    }
    early_bytes_ += bytes;
    early_.push_back(
        {header, v.entry, {v.rows.begin(), v.rows.end()}, {v.codes.begin(), v.codes.end()}});
  }
  RetryEarly();
  RetryWaiting();
}

bool HostRank::TakeKv(const transport::FrameHeader& header, const cluster::KvView& kv,
                      const std::shared_ptr<const void>& memory) {
  const host::AppendSpan span{RequestId(kv.entry.request),
                              header.layer,
                              kv.entry.kv_head,
                              kv.entry.first_token,
                              kv.entry.count,
                              kv.rows.data(),
                              kv.codes.empty() ? nullptr : kv.codes.data()};
  const host::Status status = attention_.Append(span, memory);
  if (status == host::Status::kMissingTokens) return false;
  // A released request's rows may still be under way; they are of no use to anyone.
  if (status != host::Status::kOk && status != host::Status::kUnknownRequest) {
    Drop(header, "K, V not taken (status " + std::to_string(static_cast<int>(status)) + ")");
  }
  return true;
}

// What came early may fit now; all that does may make room for more.
void HostRank::RetryEarly() {
  for (bool again = true; again && !early_.empty();) {
    again = std::erase_if(early_, [&](const EarlyKv& early) {
              const cluster::KvView view{early.entry, early.rows, early.codes};
              if (!TakeKv(early.header, view, nullptr)) return false;
              early_bytes_ -= view.rows.size_bytes() + view.codes.size_bytes();
              return true;
            }) > 0;
  }
}

void HostRank::OnKeyMean(const transport::FrameHeader& header, std::span<const std::byte> payload) {
  std::string why;
  const auto views = cluster::ParseKeyMean(shape_, header.count, payload, &why);
  if (!views) return Drop(header, why);
  for (const cluster::KeyMeanView& v : *views) {
    const host::Status status =
        attention_.SetMean({RequestId(v.entry.request), header.layer, v.entry.kv_head, v.mean});
    if (status != host::Status::kOk) Drop(header, "mean not taken");
  }
  RetryWaiting();
}

void HostRank::OnQuery(const transport::FrameHeader& header, transport::IncomingPayload& payload) {
  const auto query = std::make_shared<Query>();
  query->header = header;
  query->memory = payload.Keep();
  std::string why;
  auto views = cluster::ParseQuery(shape_, header.count, payload.pieces(), &why);
  if (!views) return Drop(header, why);
  query->views = std::move(*views);
  if (Start(query)) return;
  if (waiting_bytes_ + query->bytes() > kMaxWaitingBytes) {
    return Drop(header, "too many queries wait for tokens");
  }
  MoveToOwnMemory(*query);
  waiting_bytes_ += query->bytes();
  waiting_.push_back(query);
}

// A query that waits for tokens leaves the memory of its sender.
void HostRank::MoveToOwnMemory(Query& query) {
  struct Copy {
    std::vector<bf16> q;
    std::vector<uint16_t> codes;
  };
  auto copies = std::make_shared<std::vector<Copy>>();
  copies->reserve(query.views.size());
  for (cluster::QueryView& v : query.views) {
    const Copy& copy =
        copies->emplace_back(Copy{{v.q.begin(), v.q.end()}, {v.codes.begin(), v.codes.end()}});
    v.q = copy.q;
    v.codes = copy.codes;
  }
  query.memory = std::move(copies);
}

bool HostRank::Ready(const Query& query) const {
  for (const cluster::QueryView& v : query.views) {
    const cluster::QueryEntry& e = v.entry;
    for (uint32_t h = 0; h < e.kv_heads; ++h) {
      if (!attention_.Ready(RequestId(e.request), query.header.layer, e.first_kv_head + h,
                            e.offloaded_tokens)) {
        return false;
      }
    }
  }
  return true;
}

void HostRank::RetryWaiting() {
  for (size_t i = waiting_.size(); i > 0; --i) {
    auto query = std::move(waiting_.front());
    waiting_.pop_front();
    waiting_bytes_ -= query->bytes();
    if (Ready(*query) && Start(query)) continue;
    waiting_bytes_ += query->bytes();
    waiting_.push_back(std::move(query));
  }
  reads_.Retry();
}

bool HostRank::Start(const std::shared_ptr<Query>& query) {
  host::AttendBatch batch;
  batch.layer = query->header.layer;
  batch.bf16_num = true;
  batch.memory = [this](size_t floats) { return replies_.Take(floats); };
  query->asked.clear();
  batch.items.reserve(query->views.size());
  for (const cluster::QueryView& v : query->views) {
    const cluster::QueryEntry& e = v.entry;
    const bf16* q = v.q.data();
    const uint16_t* codes = v.codes.data();
    for (uint32_t h = 0; h < e.kv_heads; ++h) {
      const uint32_t kv_head = e.first_kv_head + h;
      const bool exact = e.exact != 0;
      batch.items.push_back({RequestId(e.request), kv_head, e.offloaded_tokens, exact, nullptr,
                             exact ? nullptr : codes, q});
      query->asked.push_back(
          {e.request, 0, e.row, kv_head, -1, static_cast<uint32_t>(host::Status::kOk)});
      q += size_t{shape_.group} * shape_.head_dim;
      if (!exact) codes += size_t{shape_.group} * shape_.l;
    }
  }
  ++in_flight_;
  host::Status status;
  try {
    status =
        attention_.Attend(std::move(batch), [this, query](std::vector<host::PartialItem> items) {
          query->memory.reset();
          try {
            Reply(*query, std::move(items));
          } catch (const std::exception& e) {  // too large for a frame, or no memory for it
            Drop(query->header, e.what());
          }
          --in_flight_;
          channel_.Wake();
        });
  } catch (...) {  // no memory
    --in_flight_;
    throw;
  }
  if (status == host::Status::kOk) return true;
  --in_flight_;
  // Its request may be opened, or its tokens come, later.
  if (status != host::Status::kBadArgument) return false;
  Drop(query->header,
       "query not answered (status " + std::to_string(static_cast<int>(status)) + ")");
  return true;
}

// Runs on a thread of the attention pool, or on this rank's where it helps.
void HostRank::Reply(const Query& query, std::vector<host::PartialItem> items) {
  std::vector<cluster::PartialEntry> entries;
  entries.reserve(items.size());
  std::vector<const void*> values;
  values.reserve(items.size());
  for (const host::PartialItem& item : items) {
    if (item.status != host::Status::kOk) return Drop(query.header, "a code out of range");
    cluster::PartialEntry& entry = entries.emplace_back(query.asked[item.item]);
    entry.segment = item.segment;
    for (const uint64_t s : item.sampled) entry.sampled_tokens += s;
    values.push_back(item.values.data());
  }
  cluster::Pieces pieces;
  auto payload = cluster::BuildPartial(shape_, entries, values, &pieces, payloads_.Take());
  transport::FrameHeader h;
  h.type = transport::FrameType::kPartial;
  h.layer = query.header.layer;
  h.micro_batch = query.header.micro_batch;
  h.step = query.header.step;
  h.part = query.header.part;
  h.count = static_cast<uint32_t>(entries.size());
  channel_.Post(
      RankId(query.header.source),
      payloads_.Frame(h, std::move(payload), std::move(pieces),
                      std::make_shared<const std::vector<host::PartialItem>>(std::move(items))));
}

void HostRank::OnControl(const transport::FrameHeader& header, std::span<const std::byte> payload) {
  cluster::proto::Control message;
  if (!message.ParseFromArray(payload.data(), static_cast<int>(payload.size()))) {
    return Drop(header, "not a control message");
  }
  if (message.has_open()) {
    Open(message.open());
  } else if (message.has_release()) {
    const host::MemoryUsage usage = attention_.usage();
    peak_kv_ = std::max(peak_kv_, usage.kv_bytes);
    peak_tables_ = std::max(peak_tables_, usage.table_bytes);
    const uint64_t request = message.release().request();
    attention_.Release(RequestId(request));
    reads_.Forget(RequestId(request));
    RetryEarly();
    std::erase_if(waiting_, [&](const std::shared_ptr<Query>& query) {
      const bool asks = std::any_of(query->views.begin(), query->views.end(),
                                    [&](const auto& v) { return v.entry.request == request; });
      if (asks) waiting_bytes_ -= query->bytes();
      return asks;
    });
  } else if (message.has_stats_query()) {
    const host::MemoryUsage usage = attention_.usage();
    cluster::proto::Control reply;
    auto& stats = *reply.mutable_stats_reply();
    stats.set_kv_bytes(std::max(peak_kv_, usage.kv_bytes));
    stats.set_table_bytes(std::max(peak_tables_, usage.table_bytes));
    const auto& c = channel_.stats();
    stats.set_dropped_frames(dropped_ + c.dropped_malformed + c.dropped_nonce + c.dropped_epoch);
    SendControl(RankId(header.source), reply);
  } else if (message.has_shutdown()) {
    stop_ = true;
    exit_code_ = static_cast<int>(message.shutdown().exit_code());
  } else {
    Drop(header, "a control message that host ranks do not take");
  }
}

void HostRank::Open(const cluster::proto::OpenRequest& open) {
  cluster::proto::Control reply;
  auto& r = *reply.mutable_open_reply();
  r.set_request(open.request());
  try {
    const auto context = static_cast<uint64_t>(job_.model.context_length);
    if (open.prompt_tokens() > context || open.max_tokens() > context || open.mode() < 1 ||
        open.mode() > 3 || open.first_host() >= job_.hosts()) {
      throw Error(ErrorClass::kCluster, "open: a field is out of range");
    }
    cluster::RequestPlacement placement;
    placement.mode = static_cast<cluster::PlacementMode>(open.mode());
    placement.first_host = open.first_host();
    placement.hosts = job_.hosts();
    placement.kv_heads = shape_.kv_heads;
    attention_.Open(OpenSpecFor(job_, RequestId(open.request()), job_.info().index, placement,
                                job_.Segments(open.prompt_tokens(), open.max_tokens())));
    r.set_accepted(true);
  } catch (const Error& e) {
    r.set_reason(e.what());
  }
  SendControl(RankId{0}, reply);
}

void HostRank::SendControl(RankId to, const cluster::proto::Control& message) {
  transport::FrameHeader h;
  h.type = transport::FrameType::kControl;
  h.count = 1;
  channel_.Send(to, transport::OutgoingFrame::Own(h, Serialize(message)));
}

}  // namespace passel::engine
