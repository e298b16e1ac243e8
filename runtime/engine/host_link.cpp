#include "runtime/engine/host_link.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::engine {
namespace {

using Clock = std::chrono::steady_clock;
// Data of a K, V frame, about: large enough to stream, small enough to stay below
// kMaxPayloadBytes.
constexpr uint64_t kKvFrameBytes = uint64_t{4} << 20;
// And its entries: what says where their data lie must fit a referral.
constexpr size_t kKvFrameEntries = 512;

cluster::HealthTracker Watch(const Job& job, std::span<const RankId> hosts) {
  const std::chrono::duration<double> timeout(job.config.cluster().failure_timeout_s());
  return {hosts, std::chrono::duration_cast<Clock::duration>(timeout), Clock::now()};
}

}  // namespace

HostLink::HostLink(const Job& job, transport::Channel& channel, const model::TensorSlice& slice,
                   std::function<void(RankId, const cluster::proto::Control&)> on_control)
    : job_(job),
      channel_(channel),
      slice_(slice),
      on_control_(std::move(on_control)),
      shape_(job.wire_shape()),
      host_ranks_(job.RanksOf(cluster::Role::kHost)),
      health_(Watch(job, host_ranks_)),
      reader_(channel_, shape_, slice_, host_ranks_, health_) {
  channel_.SetFrameHandler([this](const transport::FrameHeader& h, transport::IncomingPayload& p) {
    try {
      OnFrame(h, p);
    } catch (const std::exception& e) {  // nothing may cross the transport's C callback
      if (lost_.empty()) lost_ = e.what();
    }
  });
  channel_.SetPeerLostHandler([this](RankId peer, const std::string& reason) {
    const cluster::RankInfo& info = job_.ranks[static_cast<size_t>(peer.value)];
    if (info.role == cluster::Role::kHost && lost_.empty()) {
      lost_ =
          "host rank " + std::to_string(peer.value) + " on " + info.node + " is lost: " + reason;
    }
  });
}

void HostLink::Pump(std::chrono::milliseconds wait) {
  if (!channel_.Progress() && wait.count() > 0) channel_.Wait(wait);
  const auto now = Clock::now();
  // Heartbeats are rank 0's: the others hear from hosts only when they ask them.
  if (job_.self.value == 0) {
    for (const RankId host : health_.HeartbeatsDue(now)) {
      transport::FrameHeader h;
      h.type = transport::FrameType::kHeartbeat;
      channel_.Send(host, transport::OutgoingFrame::Own(h, {}));
      health_.Sent(host, now);
    }
  }
  for (const auto& failure : health_.Overdue(now)) {
    const bool hung = failure.reason == cluster::HealthTracker::Reason::kHung;
    if (job_.self.value != 0 && !hung) continue;
    const auto& info = job_.ranks[static_cast<size_t>(failure.peer.value)];
    const auto seconds = std::chrono::duration<double>(failure.since).count();
    throw Error(ErrorClass::kCluster,
                "host rank " + std::to_string(failure.peer.value) + " on " + info.node +
                    (hung ? " left a query unanswered for " : " has been silent for ") +
                    std::to_string(static_cast<int>(seconds)) + " s");
  }
  if (!lost_.empty()) throw Error(ErrorClass::kCluster, lost_);
}

std::unique_ptr<gpu::Buffer> HostLink::AllocateStaging(gpu::Device& device, size_t bytes) {
  class SharedStaging final : public gpu::Buffer {
   public:
    SharedStaging(std::shared_ptr<transport::SharedMemory> memory,
                  std::unique_ptr<gpu::Buffer> pinned)
        : memory_(std::move(memory)), pinned_(std::move(pinned)) {}
    void* data() const override { return pinned_->data(); }
    size_t bytes() const override { return pinned_->bytes(); }

   private:
    std::shared_ptr<transport::SharedMemory> memory_;
    std::unique_ptr<gpu::Buffer> pinned_;  // goes first
  };
  if (auto memory = channel_.ShareMemory(bytes, host_ranks_)) {
    try {
      auto pinned = device.PinStaging(memory->bytes());
      return std::make_unique<SharedStaging>(std::move(memory), std::move(pinned));
    } catch (const Error& e) {
      spdlog::info("what leaves is copied, not read by hosts where it lies: {}", e.what());
    }
  }
  return device.AllocateStaging(bytes);
}

uint64_t HostLink::Ticket(uint64_t step, int32_t layer, uint16_t micro_batch, uint32_t part) {
  const uint64_t ticket = HashBytes(&step, sizeof step) ^ (uint64_t{part} << 32) ^
                          (static_cast<uint64_t>(layer) << 16) ^ micro_batch;
  return ticket & ~KvReader::kTicketBit;
}

void HostLink::Send(uint32_t host, transport::FrameHeader header, std::vector<std::byte> payload) {
  Check(payload.size() <= cluster::kMaxPayloadBytes, "a frame's payload is too large");
  channel_.Send(host_ranks_[host], transport::OutgoingFrame::Own(header, std::move(payload)));
}

std::vector<QueryFrame> HostLink::Plan(std::span<const QueryRow> rows) const {
  return PlanQueries(shape_, slice_, rows, hosts(), job_.deterministic());
}

size_t HostLink::ReplyFloats(const std::vector<QueryFrame>& plan) const {
  size_t partials = 0;
  for (const QueryFrame& frame : plan) partials += frame.partials.size();
  return partials * PartialFloats();
}

void HostLink::SendQuery(uint16_t micro_batch, int32_t layer, uint64_t step,
                         const std::vector<QueryFrame>& plan, bool all_exact, const bf16* q,
                         const uint16_t* codes, const std::shared_ptr<const void>& memory,
                         ReplyBox* box) {
  const auto first = static_cast<uint32_t>(slice_.first_kv_head);
  const auto heads = static_cast<size_t>(slice_.kv_heads);
  box->step = step;
  box->layer = layer;
  box->plan = &plan;
  box->answered.assign(plan.size(), false);
  box->open = plan.size();
  const size_t floats = ReplyFloats(plan);
  Check(box->values.size() >= floats, "no memory for the replies");
  box->partials.assign(floats / PartialFloats(), {});
  if (boxes_.size() <= micro_batch) boxes_.resize(micro_batch + size_t{1});
  boxes_[micro_batch] = box;

  const size_t head_q = size_t{shape_.group} * shape_.head_dim;
  const size_t head_codes = size_t{shape_.group} * shape_.l;
  std::vector<cluster::QueryEntry> exact;
  std::vector<cluster::QuerySource> sources;
  for (const QueryFrame& frame : plan) {
    std::span<const cluster::QueryEntry> entries = frame.entries;
    if (all_exact) {
      exact = frame.entries;
      for (cluster::QueryEntry& e : exact) e.exact = 1;
      entries = exact;
    }
    sources.clear();
    sources.reserve(entries.size());
    for (const cluster::QueryEntry& e : entries) {
      const size_t at = e.row * heads + (e.first_kv_head - first);
      sources.push_back({q + at * head_q, codes == nullptr ? nullptr : codes + at * head_codes});
    }
    cluster::Pieces pieces;
    auto payload = cluster::BuildQuery(shape_, entries, sources, &pieces, payloads_.Take());
    transport::FrameHeader h;
    h.type = transport::FrameType::kQuery;
    h.layer = static_cast<uint16_t>(layer);
    h.micro_batch = micro_batch;
    h.step = step;
    h.part = frame.part;
    h.count = static_cast<uint32_t>(entries.size());
    const uint64_t ticket = Ticket(step, layer, micro_batch, frame.part);
    health_.Asked(host_ranks_[frame.host], ticket, Clock::now());
    channel_.Send(host_ranks_[frame.host],
                  payloads_.Frame(h, std::move(payload), std::move(pieces), memory));
  }
}

void HostLink::SendKv(int32_t layer, std::span<const KvRun> runs, uint64_t rows, const bf16* kv,
                      const uint16_t* codes, const std::shared_ptr<const void>& memory) {
  const size_t row_size = 2 * size_t{shape_.head_dim}, l = codes ? shape_.l : 0;
  const uint64_t token_bytes = row_size * sizeof(bf16) + l * sizeof(uint16_t);
  struct Frame {
    std::vector<cluster::KvEntry> entries;
    std::vector<cluster::KvSource> sources;
    uint64_t tokens = 0;
  };
  std::vector<Frame> frames(hosts());
  const uint64_t most = std::max<uint64_t>(1, kKvFrameBytes / token_bytes);  // tokens of a frame
  const auto send = [&](uint32_t host) {
    Frame frame = std::exchange(frames[host], {});
    cluster::Pieces pieces;
    auto payload =
        cluster::BuildKv(shape_, frame.entries, frame.sources, &pieces, payloads_.Take());
    transport::FrameHeader h;
    h.type = transport::FrameType::kKv;
    h.layer = static_cast<uint16_t>(layer);
    h.count = static_cast<uint32_t>(frame.entries.size());
    channel_.Send(host_ranks_[host],
                  payloads_.Frame(h, std::move(payload), std::move(pieces), memory));
  };
  for (const KvRun& run : runs) {
    for (uint64_t done = 0; done < run.count;) {
      const uint64_t token = run.first_token + done;
      const uint32_t segment = run.hosted->SegmentOf(token);
      const host::SegmentSpec& spec = run.hosted->segments[segment];
      const uint64_t n =
          std::min({run.count - done, most, spec.first_token + spec.capacity - token});
      for (uint64_t head = 0; head < static_cast<uint64_t>(slice_.kv_heads); ++head) {
        const auto kv_head =
            static_cast<uint32_t>(slice_.first_kv_head) + static_cast<uint32_t>(head);
        const uint32_t host = run.hosted->placement.Owner(kv_head, segment);
        Frame& frame = frames[host];
        if (frame.tokens + n > most || frame.entries.size() == kKvFrameEntries) send(host);
        const uint64_t at = head * rows + run.row + done;
        frame.entries.push_back({run.hosted->request.value, token, kv_head,
                                 static_cast<uint32_t>(n), codes ? 1u : 0u, 0});
        frame.sources.push_back({kv + at * row_size, codes ? codes + at * l : nullptr});
        frame.tokens += n;
      }
      done += n;
    }
  }
  for (uint32_t host = 0; host < hosts(); ++host) {
    if (frames[host].tokens > 0) send(host);
  }
}

void HostLink::SendKeyMean(const HostedRequest& hosted, int32_t layer, const float* mean) {
  const auto heads = static_cast<size_t>(slice_.kv_heads);
  for (size_t head = 0; head < heads; ++head) {
    const auto kv_head = static_cast<uint32_t>(slice_.first_kv_head + static_cast<int>(head));
    const cluster::KeyMeanEntry entry{hosted.request.value, kv_head, 0};
    for (const uint32_t host :
         hosted.placement.HostsFor(kv_head, 1, static_cast<uint32_t>(hosted.segments.size()))) {
      std::vector<std::span<float>> spaces;
      auto payload = cluster::BuildKeyMean(shape_, {&entry, 1}, &spaces);
      std::copy_n(mean + head * shape_.head_dim, shape_.head_dim, spaces[0].begin());
      transport::FrameHeader h;
      h.type = transport::FrameType::kKeyMean;
      h.layer = static_cast<uint16_t>(layer);
      h.count = 1;
      Send(host, h, std::move(payload));
    }
  }
}

void HostLink::SendControl(uint32_t host, const cluster::proto::Control& message) {
  transport::FrameHeader h;
  h.type = transport::FrameType::kControl;
  h.count = 1;
  std::vector<std::byte> payload(message.ByteSizeLong());
  message.SerializeToArray(payload.data(), static_cast<int>(payload.size()));
  Send(host, h, std::move(payload));
}

void HostLink::SendControlToAll(const cluster::proto::Control& message) {
  for (uint32_t host = 0; host < hosts(); ++host) SendControl(host, message);
}

void HostLink::OnFrame(const transport::FrameHeader& header, transport::IncomingPayload& payload) {
  const RankId from(header.source);
  if (std::find(host_ranks_.begin(), host_ranks_.end(), from) == host_ranks_.end()) {
    ++dropped_;
    return;
  }
  health_.Heard(from, Clock::now());
  if (header.type == transport::FrameType::kPartial) return OnPartial(header, payload.pieces());
  if (header.type == transport::FrameType::kKvRows) {
    std::string why;
    if (!reader_.OnRows(header, payload.pieces(), &why)) Drop(header, why);
    return;
  }
  if (header.type == transport::FrameType::kControl) {
    const std::span<const std::byte> bytes = payload.whole();
    cluster::proto::Control message;
    if (message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
      return on_control_(from, message);
    }
  }
  if (header.type != transport::FrameType::kHeartbeat) ++dropped_;
}

void HostLink::Drop(const transport::FrameHeader& header, const std::string& why) {
  spdlog::debug("a reply of rank {} dropped: {}", header.source, why);
  ++dropped_;
}

void HostLink::OnPartial(const transport::FrameHeader& header, cluster::PayloadPieces payload) {
  const auto drop = [&](const std::string& why) { Drop(header, why); };
  const RankId from(header.source);
  ReplyBox* box = header.micro_batch < boxes_.size() ? boxes_[header.micro_batch] : nullptr;
  if (!box || box->step != header.step || box->layer != header.layer || box->complete()) {
    return drop("not asked for");
  }
  const auto& plan = *box->plan;
  const auto frame = std::find_if(plan.begin(), plan.end(), [&](const QueryFrame& f) {
    return host_ranks_[f.host] == from && f.part == header.part;
  });
  const auto number = static_cast<size_t>(frame - plan.begin());
  if (frame == plan.end() || box->answered[number]) return drop("not asked for");
  std::string why;
  const auto views = cluster::ParsePartial(shape_, header.count, payload, &why);
  if (!views) return drop(why);
  // Exactly those asked for, in their order.
  const auto is_asked = [](const cluster::PartialView& v, const PartialKey& key) {
    return PartialKey{v.entry.row, v.entry.kv_head, v.entry.segment} == key;
  };
  if (!std::equal(views->begin(), views->end(), frame->partials.begin(), frame->partials.end(),
                  is_asked)) {
    return drop("other partials than those asked for");
  }
  for (size_t i = 0; i < views->size(); ++i) {
    const cluster::PartialView& v = (*views)[i];
    const uint32_t place = frame->places[i];
    const size_t at = place * PartialFloats();
    box->partials[place] = {frame->partials[i], v.entry.sampled_tokens, at};
    auto to = box->values.begin() + static_cast<std::ptrdiff_t>(at);
    for (const auto part : {v.max, v.den}) to = std::copy(part.begin(), part.end(), to);
    std::memcpy(&*to, v.num.data(), v.num.size_bytes());
  }
  health_.Answered(from, Ticket(header.step, header.layer, header.micro_batch, header.part));
  box->answered[number] = true;
  --box->open;
}

}  // namespace passel::engine
