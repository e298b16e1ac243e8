#include "transport/ucx_sharing.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <new>
#include <set>
#include <string>
#include <utility>

namespace passel::transport {
namespace {

// A peer's regions stay mapped until the channel closes.
constexpr size_t kMostRegions = 64;
// Less than this is copied sooner than it is referred to.
constexpr uint64_t kLeastReferred = 4096;

// Whether a shared mapping of a file begins there and covers it: a region that is shorter than its
// owner says would end this process later.
bool IsWholeMapping(const void* begin, uint64_t bytes) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long first = 0, last = 0;
    char shared = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx %*3c%c", &first, &last, &shared) != 3) continue;
    if (first == reinterpret_cast<uintptr_t>(begin)) return shared == 's' && bytes <= last - first;
  }
  return false;
}

}  // namespace

struct UcxSharing::Region final : public SharedMemory {
  Region(std::shared_ptr<ucp_context> owner, ucp_mem_h mapped, std::span<std::byte> bytes)
      : context(std::move(owner)), handle(mapped), memory(bytes) {}
  ~Region() override { ucp_mem_unmap(context.get(), handle); }
  std::span<std::byte> bytes() const override { return memory; }

  std::shared_ptr<ucp_context> context;
  ucp_mem_h handle;
  std::span<std::byte> memory;
  uint32_t number = 0;
  std::set<RankId> readers;
};

UcxSharing::UcxSharing(std::shared_ptr<ucp_context> context, ucp_worker_h worker, FrameGate* gate)
    : context_(std::move(context)), worker_(worker), gate_(gate) {
  SetUcxHandler(worker_, kOffer, &UcxSharing::OnOffer, this);
  SetUcxHandler(worker_, kTaken, &UcxSharing::OnTaken, this);
}

UcxSharing::~UcxSharing() { Close(); }

void UcxSharing::Close() {
  for (const auto& [peer, regions] : std::exchange(peers_, {})) {
    for (const auto& [number, region] : regions) ucp_rkey_destroy(region.key);
  }
}

std::shared_ptr<SharedMemory> UcxSharing::Allocate(size_t bytes,
                                                   const std::map<RankId, ucp_ep_h>& with) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
  params.length = bytes;
  params.flags = UCP_MEM_MAP_ALLOCATE;
  ucp_mem_h handle = nullptr;
  if (bytes == 0 || ucp_mem_map(context_.get(), &params, &handle) != UCS_OK) return nullptr;
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  CheckUcx(ucp_mem_query(handle, &attributes), "ucp_mem_query");
  auto region = std::make_shared<Region>(
      context_, handle, std::span(static_cast<std::byte*>(attributes.address), bytes));
  void* key = nullptr;
  size_t key_bytes = 0;
  if (ucp_rkey_pack(context_.get(), handle, &key, &key_bytes) != UCS_OK) return nullptr;
  const auto* begin = static_cast<const std::byte*>(key);
  const std::vector<std::byte> packed(begin, begin + key_bytes);
  ucp_rkey_buffer_release(key);

  region->number = ++regions_;
  std::erase_if(own_, [](const auto& old) { return old.expired(); });
  own_.push_back(region);
  const UcxNotice notice{0, 0, region->number, reinterpret_cast<uintptr_t>(region->memory.data()),
                         bytes};
  for (const auto& [peer, endpoint] : with) Send(endpoint, kOffer, notice, packed);
  return region;
}

ucs_status_t UcxSharing::OnOffer(void* arg, const void* header, size_t header_bytes, void* data,
                                 size_t bytes, const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxSharing*>(arg);
  const auto notice = ReadNotice(*self->gate_, header, header_bytes);
  const bool whole = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  if (!notice || !whole || self->offers_.size() >= kMostRegions) {
    self->gate_->CountMalformed();
    return UCS_OK;
  }
  try {
    const auto* begin = static_cast<const std::byte*>(data);
    self->offers_.push_back({*notice, {begin, begin + bytes}});
  } catch (const std::bad_alloc&) {
    self->gate_->CountOverflow();
  }
  return UCS_OK;
}

void UcxSharing::Take(ucp_ep_h endpoint, const Offer& offer) {
  auto& regions = peers_[RankId(offer.notice.source)];
  if (regions.size() >= kMostRegions || regions.contains(offer.notice.region) ||
      offer.notice.region == 0) {
    return;
  }
  ucp_rkey_h key = nullptr;
  if (ucp_ep_rkey_unpack(endpoint, offer.key.data(), &key) != UCS_OK) return;
  void* local = nullptr;
  // Elsewhere than on this machine it cannot be read; frames then travel whole.
  const bool reached = ucp_rkey_ptr(key, offer.notice.address, &local) == UCS_OK;
  if (!reached || !IsWholeMapping(local, offer.notice.number)) {
    ucp_rkey_destroy(key);
    return;
  }
  const std::span memory(static_cast<const std::byte*>(local),
                         static_cast<size_t>(offer.notice.number));
  regions.emplace(offer.notice.region, PeerRegion{key, memory});
  Send(endpoint, kTaken, {0, 0, offer.notice.region, 0, 0}, {});
}

ucs_status_t UcxSharing::OnTaken(void* arg, const void* header, size_t header_bytes, void*, size_t,
                                 const ucp_am_recv_param_t*) {
  auto* self = static_cast<UcxSharing*>(arg);
  const auto notice = ReadNotice(*self->gate_, header, header_bytes);
  if (!notice) {
    self->gate_->CountMalformed();
    return UCS_OK;
  }
  for (const auto& own : self->own_) {
    const auto region = own.lock();
    if (region != nullptr && region->number == notice->region) {
      region->readers.insert(RankId(notice->source));
    }
  }
  return UCS_OK;
}

std::vector<std::byte> UcxSharing::Refer(RankId to, const OutgoingFrame& frame) const {
  if (frame.pieces.empty()) return {};
  std::vector<std::shared_ptr<const Region>> readable;
  for (const auto& own : own_) {
    auto region = own.lock();
    if (region != nullptr && region->readers.contains(to)) readable.push_back(std::move(region));
  }
  if (readable.empty()) return {};
  std::vector<Part> parts;
  parts.reserve(frame.pieces.size() + 1);
  std::vector<std::span<const std::byte>> travelling;
  travelling.reserve(frame.pieces.size() + 1);
  uint64_t referred = 0, bytes = 0;
  const auto add = [&](std::span<const std::byte> piece) {
    if (piece.empty()) return;
    const auto region = std::find_if(readable.begin(), readable.end(), [&](const auto& r) {
      return piece.data() >= r->memory.data() &&
             piece.data() + piece.size() <= r->memory.data() + r->memory.size();
    });
    const auto size = static_cast<uint32_t>(piece.size());
    if (region != readable.end()) {
      const std::byte* begin = (*region)->memory.data();
      parts.push_back({(*region)->number, size, static_cast<uint64_t>(piece.data() - begin)});
      referred += size;
    } else {
      parts.push_back({0, size, 0});
      travelling.push_back(piece);
      bytes += size;
    }
  };
  add(frame.payload);
  for (const auto& piece : frame.pieces) add(piece);
  const uint64_t count = parts.size();
  const uint64_t size = sizeof count + count * sizeof(Part) + bytes;
  if (referred < kLeastReferred || size > kMostReferral) return {};
  std::vector<std::byte> out(size);
  std::memcpy(out.data(), &count, sizeof count);
  std::memcpy(out.data() + sizeof count, parts.data(), count * sizeof(Part));
  std::byte* at = out.data() + sizeof count + count * sizeof(Part);
  for (const auto& piece : travelling) at = std::copy(piece.begin(), piece.end(), at);
  return out;
}

std::vector<std::span<const std::byte>> UcxSharing::Resolve(RankId from,
                                                            std::span<const std::byte> data) const {
  const auto peer = peers_.find(from);
  uint64_t count = 0;
  if (peer == peers_.end() || data.size() < sizeof count) return {};
  std::memcpy(&count, data.data(), sizeof count);
  std::span<const std::byte> rest = data.subspan(sizeof count);
  if (count > rest.size() / sizeof(Part)) return {};
  std::vector<Part> parts(count);
  if (count > 0) std::memcpy(parts.data(), rest.data(), count * sizeof(Part));
  rest = rest.subspan(count * sizeof(Part));
  std::vector<std::span<const std::byte>> out;
  out.reserve(count);
  for (const Part& part : parts) {
    std::span<const std::byte> memory = rest;
    if (part.region != 0) {
      const auto region = peer->second.find(part.region);
      if (region == peer->second.end() || part.offset > region->second.memory.size()) return {};
      memory = region->second.memory.subspan(part.offset);
    }
    if (part.bytes > memory.size()) return {};
    out.push_back(memory.first(part.bytes));
    if (part.region == 0) rest = rest.subspan(part.bytes);
  }
  if (!rest.empty()) return {};
  return out;
}

void UcxSharing::SendFetched(ucp_ep_h to, uint64_t sequence) {
  Send(to, kFetched, {0, 0, 0, 0, sequence}, {});
}

void UcxSharing::Send(ucp_ep_h to, UcxMessage what, UcxNotice notice, std::vector<std::byte> data) {
  struct Message {
    UcxNotice notice;
    std::vector<std::byte> data;
  };
  notice.nonce = gate_->nonce();
  notice.source = gate_->self().value;
  auto message = std::make_unique<Message>(Message{notice, std::move(data)});
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.user_data = message.get();
  param.cb.send = [](void* request, ucs_status_t, void* sent) {
    ucp_request_free(request);
    delete static_cast<Message*>(sent);
  };
  const ucs_status_ptr_t request =
      ucp_am_send_nbx(to, what, &message->notice, sizeof(UcxNotice), message->data.data(),
                      message->data.size(), &param);
  if (UCS_PTR_IS_PTR(request)) static_cast<void>(message.release());  // the callback's
}

std::optional<UcxNotice> ReadNotice(const FrameGate& gate, const void* header,
                                    size_t header_bytes) {
  UcxNotice notice;
  if (header_bytes != sizeof notice) return std::nullopt;
  std::memcpy(&notice, header, sizeof notice);
  if (notice.nonce != gate.nonce() || !gate.Knows(RankId(notice.source))) return std::nullopt;
  return notice;
}

}  // namespace passel::transport
