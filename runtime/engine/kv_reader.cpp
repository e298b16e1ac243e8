#include "runtime/engine/kv_reader.h"

#include <algorithm>
#include <chrono>

#include "runtime/base/error.h"

namespace passel::engine {
namespace {

// Rows of a reply, about.
constexpr uint64_t kFrameBytes = uint64_t{4} << 20;
// What says where they lie must fit a referral.
constexpr size_t kFrameEntries = 512;
// Frames of a read that a host is asked for at once: while one travels, others are copied. A host
// is heard of with each, however long the whole read takes.
constexpr int kFramesAhead = 4;

uint64_t ReadTicket(uint64_t number) { return KvReader::kTicketBit | number; }

}  // namespace

std::vector<KvReadFrame> PlanKvRead(const cluster::WireShape& shape,
                                    const model::TensorSlice& slice, const HostedRequest& hosted,
                                    uint64_t first_token, uint64_t count, uint32_t hosts) {
  const uint64_t token_bytes = 2 * uint64_t{shape.head_dim} * sizeof(bf16);
  const uint64_t most = std::max<uint64_t>(1, kFrameBytes / token_bytes);  // tokens of a frame
  std::vector<KvReadFrame> frames;
  struct Last {
    size_t frame = 0;
    uint64_t tokens = 0;  // 0: none
  };
  std::vector<Last> last(hosts);
  for (uint64_t done = 0; done < count;) {
    const uint64_t token = first_token + done;
    const uint32_t segment = hosted.SegmentOf(token);
    const host::SegmentSpec& spec = hosted.segments[segment];
    const uint64_t end = spec.first_token + spec.capacity;
    Check(token < end, "a read of tokens behind the last segment");
    const uint64_t n = std::min({count - done, most, end - token});
    for (uint64_t head = 0; head < static_cast<uint64_t>(slice.kv_heads); ++head) {
      const auto kv_head = static_cast<uint32_t>(slice.first_kv_head) + static_cast<uint32_t>(head);
      const uint32_t host = hosted.placement.Owner(kv_head, segment);
      Last& at = last[host];
      if (at.tokens == 0 || at.tokens + n > most ||
          frames[at.frame].entries.size() == kFrameEntries) {
        at = {frames.size(), 0};
        frames.push_back({host, {}, {}});
      }
      frames[at.frame].entries.push_back(
          {hosted.request.value, token, kv_head, static_cast<uint32_t>(n), 0});
      frames[at.frame].rows.push_back(head * count + done);
      at.tokens += n;
    }
    done += n;
  }
  return frames;
}

void KvBox::Forget() {
  if (reader_ != nullptr) reader_->Forget(*this);
}

void KvReader::Forget(KvBox& box) {
  for (size_t i = 0; i < box.frames_.size(); ++i) {
    if (box.states_[i] != KvBox::State::kAsked) continue;
    health_.Answered(hosts_[box.frames_[i].host], ReadTicket(box.number_ + i));
  }
  std::erase(boxes_, &box);
  box.reader_ = nullptr;
  box.open_ = 0;
}

void KvReader::Read(int32_t layer, const HostedRequest& hosted, uint64_t first_token,
                    uint64_t count, bf16* kv, KvBox* box) {
  Check(box->complete(), "a box reads one thing at a time");
  box->layer_ = layer;
  box->kv_ = kv;
  box->frames_ =
      PlanKvRead(shape_, slice_, hosted, first_token, count, static_cast<uint32_t>(hosts_.size()));
  box->states_.assign(box->frames_.size(), KvBox::State::kPlanned);
  box->next_.assign(hosts_.size(), 0);
  box->number_ = next_number_;
  box->open_ = box->frames_.size();
  if (box->complete()) return;
  next_number_ += box->frames_.size();
  box->reader_ = this;
  boxes_.push_back(box);
  for (uint32_t host = 0; host < hosts_.size(); ++host) {
    for (int i = 0; i < kFramesAhead; ++i) AskNext(*box, host);
  }
}

void KvReader::AskNext(KvBox& box, uint32_t host) {
  size_t& at = box.next_[host];
  while (at < box.frames_.size() && box.frames_[at].host != host) ++at;
  if (at == box.frames_.size()) return;
  const size_t part = at++;
  const std::vector<cluster::ReadKvEntry>& entries = box.frames_[part].entries;
  transport::FrameHeader h;
  h.type = transport::FrameType::kReadKv;
  h.layer = static_cast<uint16_t>(box.layer_);
  h.step = box.number_;
  h.part = static_cast<uint32_t>(part);
  h.count = static_cast<uint32_t>(entries.size());
  health_.Asked(hosts_[host], ReadTicket(box.number_ + part), std::chrono::steady_clock::now());
  box.states_[part] = KvBox::State::kAsked;
  channel_.Send(hosts_[host],
                transport::OutgoingFrame::Own(h, cluster::BuildReadKv(shape_, entries)));
}

bool KvReader::OnRows(const transport::FrameHeader& header, cluster::PayloadPieces payload,
                      std::string* why) {
  const auto refuse = [&](const char* reason) {
    *why = reason;
    return false;
  };
  const auto found =
      std::ranges::find_if(boxes_, [&](const KvBox* box) { return box->number_ == header.step; });
  if (found == boxes_.end()) return refuse("not asked for");
  KvBox& box = **found;
  const size_t part = header.part;
  if (box.layer_ != header.layer || part >= box.frames_.size() ||
      box.states_[part] != KvBox::State::kAsked) {
    return refuse("not asked for");
  }
  const KvReadFrame& frame = box.frames_[part];
  if (hosts_[frame.host] != RankId(header.source)) return refuse("not asked for");
  const auto views = cluster::ParseKvRows(shape_, header.count, payload, why);
  if (!views) return false;
  // Exactly those asked for, in their order.
  const auto is_asked = [](const cluster::KvRowsView& v, const cluster::ReadKvEntry& e) {
    return v.entry.request == e.request && v.entry.first_token == e.first_token &&
           v.entry.kv_head == e.kv_head && v.entry.count == e.count;
  };
  if (!std::equal(views->begin(), views->end(), frame.entries.begin(), frame.entries.end(),
                  is_asked)) {
    return refuse("other rows than those asked for");
  }
  const size_t row = 2 * size_t{shape_.head_dim};
  for (size_t i = 0; i < views->size(); ++i) {
    const cluster::KvRowsView& v = (*views)[i];
    if (v.entry.status != 0) {
      throw Error(ErrorClass::kCluster, "host rank " + std::to_string(header.source) +
                                            " cannot give back K and V of request " +
                                            std::to_string(v.entry.request) + ", layer " +
                                            std::to_string(box.layer_) + ", tokens from " +
                                            std::to_string(v.entry.first_token) + " (status " +
                                            std::to_string(v.entry.status) + ")");
    }
    std::copy(v.rows.begin(), v.rows.end(), box.kv_ + frame.rows[i] * row);
  }
  health_.Answered(hosts_[frame.host], ReadTicket(box.number_ + part));
  box.states_[part] = KvBox::State::kAnswered;
  if (--box.open_ == 0) {
    box.reader_ = nullptr;
    boxes_.erase(found);
  } else {
    AskNext(box, frame.host);
  }
  return true;
}

}  // namespace passel::engine
