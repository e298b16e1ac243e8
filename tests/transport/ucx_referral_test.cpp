// What one end of shared memory tells the other, against data that no honest end would send.

#include <gtest/gtest.h>
#include <ucp/api/ucp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/forked_ranks.h"
#include "tests/transport/ucx_ways.h"
#include "transport/frame_gate.h"
#include "transport/ucx_handles.h"
#include "transport/ucx_sharing.h"

namespace passel::transport {
namespace {

using Bytes = std::vector<std::byte>;
using Span = std::span<const std::byte>;

// A context and a worker of their own.
struct End {
  std::shared_ptr<ucp_context> context{MakeUcxContext()};
  UcxWorker worker{MakeUcxWorker(context.get())};

  ucp_ep_h Connect(const End& to) const {
    ucp_address_t* address = nullptr;
    size_t bytes = 0;
    CheckUcx(ucp_worker_get_address(to.worker.get(), &address, &bytes), "ucp_worker_get_address");
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = address;
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = [](void*, ucp_ep_h, ucs_status_t) {};
    ucp_ep_h endpoint = nullptr;
    CheckUcx(ucp_ep_create(worker.get(), &params, &endpoint), "ucp_ep_create");
    ucp_worker_release_address(to.worker.get(), address);
    return endpoint;
  }
};

// An end that shares memory, as a channel does.
struct Sharer : End {
  Sharer(int32_t self, int32_t other) : gate(RankId(self)) {
    gate.set_nonce(kNonce);
    gate.AddPeer(RankId(other));
  }
  ~Sharer() { sharing.Close(); }

  FrameGate gate;
  UcxSharing sharing{context, worker.get(), &gate};
};

// Rank 0 (`a`) offers memory to rank 1 (`b`). Its offers go through a third end, so that the test
// can change them on their way.
class Pair {
 public:
  struct Region {
    std::shared_ptr<SharedMemory> memory;
    UcxNotice notice;
    Bytes key;
  };

  Pair() {
    SetUcxHandler(tap_.worker.get(), kOffer, &Pair::OnOffer, this);
    to_tap_ = a.Connect(tap_);
    to_b_ = a.Connect(b);
    to_a_ = b.Connect(a);
  }

  Region Allocate(size_t bytes) {
    tapped_ = {};
    Region region = {a.sharing.Allocate(bytes, {{RankId(1), to_tap_}}), {}, {}};
    ForkedRank::Require(region.memory != nullptr, "no shared memory");
    Until([&] { return !tapped_.key.empty(); }, "no offer");
    region.notice = tapped_.notice;
    region.key = tapped_.key;
    return region;
  }
  void Offer(Span header, const Bytes& key) {
    ucp_request_param_t param{};
    const ucs_status_ptr_t request = ucp_am_send_nbx(to_b_, kOffer, header.data(), header.size(),
                                                     key.data(), key.size(), &param);
    if (!UCS_PTR_IS_PTR(request)) return CheckUcx(UCS_PTR_STATUS(request), "ucp_am_send_nbx");
    Until([&] { return ucp_request_check_status(request) != UCS_INPROGRESS; }, "cannot send");
    ucp_request_free(request);
  }
  void Offer(const UcxNotice& notice, const Bytes& key) {
    Offer(std::as_bytes(std::span(&notice, 1)), key);
  }
  // Whether `a` refers `b` to what lies in it.
  bool IsTaken(const Region& region) const {
    OutgoingFrame frame{Header(FrameType::kKv), {}};
    frame.pieces.push_back(region.memory->bytes());
    return !a.sharing.Refer(RankId(1), frame).empty();
  }
  void UntilTaken(const Region& region) {
    Until([&] { return IsTaken(region); }, "an offer was not taken");
  }
  Region AllocateTaken(size_t bytes) {
    Region region = Allocate(bytes);
    Offer(region.notice, region.key);
    UntilTaken(region);
    return region;
  }

  Sharer a{0, 1}, b{1, 0};

 private:
  void Until(const std::function<bool()>& ready, const char* what) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (!ready()) {
      ForkedRank::Require(std::chrono::steady_clock::now() < end, what);
      for (const auto* worker : {&a.worker, &b.worker, &tap_.worker}) {
        ucp_worker_progress(worker->get());
      }
      // Whoever offers: a test of what is known of it comes before.
      b.sharing.TakeOffers([&](RankId) { return to_a_; });
    }
  }
  static ucs_status_t OnOffer(void* arg, const void* header, size_t, void* data, size_t bytes,
                              const ucp_am_recv_param_t*) {
    auto& tapped = static_cast<Pair*>(arg)->tapped_;
    std::memcpy(&tapped.notice, header, sizeof(UcxNotice));
    tapped.key.assign(static_cast<std::byte*>(data), static_cast<std::byte*>(data) + bytes);
    return UCS_OK;
  }

  End tap_;
  Region tapped_;
  ucp_ep_h to_tap_ = nullptr, to_b_ = nullptr, to_a_ = nullptr;
};

// As UcxSharing lays it out.
struct Part {
  uint32_t region, bytes;
  uint64_t offset;
};
constexpr size_t kHead = sizeof(uint64_t);

template <typename T>
void Put(Bytes& data, size_t at, T value) {
  if (at + sizeof value <= data.size()) std::memcpy(data.data() + at, &value, sizeof value);
}

// Where rank 1 sees the region.
Span Seen(const Pair& pair, const Pair::Region& region) {
  Bytes data(kHead + sizeof(Part));
  const auto bytes = static_cast<uint32_t>(region.memory->bytes().size());
  Put(data, 0, uint64_t{1});
  Put(data, kHead, Part{region.notice.region, bytes, 0});
  const auto parts = pair.b.sharing.Resolve(RankId(0), data);
  ForkedRank::Require(parts.size() == 1 && parts[0].size() == bytes, "the region is not read");
  return parts[0];
}

bool IsWithin(Span part, Span whole) {
  const auto at = reinterpret_cast<uintptr_t>(part.data());
  const auto begin = reinterpret_cast<uintptr_t>(whole.data());
  return at >= begin && at - begin <= whole.size() && part.size() <= whole.size() - (at - begin);
}

// Changes of a referral, some that keep it whole.
class Mutator {
 public:
  explicit Mutator(std::vector<uint64_t> sizes) {
    for (const uint64_t size : sizes) {
      for (const uint64_t value : {size - 1, size, size + 1, uint64_t{0} - size}) {
        extremes_.push_back(value);
      }
    }
    for (const int shift : {0, 1, 4, 12, 16, 31, 32, 47, 60, 63}) {
      const uint64_t power = uint64_t{1} << shift;
      for (const uint64_t value : {power - 1, power, uint64_t{0} - power}) {
        extremes_.push_back(value);
      }
    }
  }

  void Change(Bytes& data, size_t parts) {
    const size_t part = kHead + Below(parts) * sizeof(Part);
    const uint64_t extreme = extremes_[Below(extremes_.size())];
    switch (Below(8)) {
      case 0:
        for (uint64_t i = Below(8) + 1; i > 0 && !data.empty(); --i) {
          data[Below(data.size())] ^= static_cast<std::byte>(1u << Below(8));
        }
        break;
      case 1:
        data.resize(Below(data.size() + 1));
        break;
      case 2:
        data.resize(data.size() + 1 + Below(64), static_cast<std::byte>(Below(256)));
        break;
      case 3:
        Put(data, 0, Below(2) == 0 ? extreme : Below(2 * parts));
        break;
      case 4:
        Put(data, part, static_cast<uint32_t>(Below(2) == 0 ? extreme : Below(4)));
        break;
      case 5:
        Put(data, part + 4, static_cast<uint32_t>(extreme));
        break;
      case 6:
        Put(data, part + 8, extreme);
        break;
      case 7:
        Put(data, part,
            Part{static_cast<uint32_t>(Below(4)), static_cast<uint32_t>(Below(100'000)),
                 Below(100'000)});
        break;
    }
  }
  uint64_t Below(uint64_t limit) { return random_() % limit; }

 private:
  std::mt19937_64 random_{20};
  std::vector<uint64_t> extremes_;
};

class UcxReferral : public testing::TestWithParam<Way> {
 protected:
  // In a process of its own, for the environment.
  static std::string Run(const std::function<void()>& body) {
    return RunForked(1, GetParam().environment, [&](ForkedRank&) {
      SetUcxDefaults();
      body();
    });
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, UcxReferral, testing::Values(kMemory, kSysv),
                         [](const auto& way) { return std::string(way.param.name); });

TEST_P(UcxReferral, WhateverItSaysOnlyItsRegionsAndItselfAreRead) {
  const auto body = [] {
    Pair pair;
    const std::vector<Pair::Region> regions{pair.AllocateTaken(100'000), pair.AllocateTaken(8192)};
    std::vector<Span> memory;
    for (const Pair::Region& region : regions) {
      const auto content = Payload(region.notice.region, region.memory->bytes().size());
      memory.push_back(Seen(pair, region));
      std::copy(content.begin(), content.end(), region.memory->bytes().begin());
      ForkedRank::Require(std::equal(content.begin(), content.end(), memory.back().begin()),
                          "another region is read");
    }
    const Bytes ordinary = Payload(9, 450);
    const Span shared = regions[0].memory->bytes();
    const std::vector<Span> pieces{
        Span(ordinary).first(100),      shared.subspan(100, 5000), Span(ordinary).subspan(100, 333),
        regions[1].memory->bytes(),     shared.first(0),           shared.last(777),
        Span(ordinary).subspan(433, 17)};
    const OutgoingFrame frame{
        Header(FrameType::kKv), pieces[0], {}, {pieces.begin() + 1, pieces.end()}};
    const Bytes referral = pair.a.sharing.Refer(RankId(1), frame);
    Bytes expected, is;
    for (const Span piece : pieces) expected.insert(expected.end(), piece.begin(), piece.end());
    const auto resolved = pair.b.sharing.Resolve(RankId(0), referral);
    for (const Span part : resolved) is.insert(is.end(), part.begin(), part.end());
    ForkedRank::Require(!referral.empty() && is == expected, "an honest referral differs");
    ForkedRank::Require(pair.b.sharing.Resolve(RankId(2), referral).empty(), "of nobody");
    ForkedRank::Require(pair.a.sharing.Resolve(RankId(1), referral).empty(), "of one who has none");

    // Pieces that only begin or end in a region, too large to travel with a referral.
    for (const Span piece :
         {Span(shared.data(), shared.size() + 1), Span(shared.data() - 1, shared.size())}) {
      const OutgoingFrame beyond{Header(FrameType::kKv), {}, {}, {shared, piece}};
      ForkedRank::Require(pair.a.sharing.Refer(RankId(1), beyond).empty(), "refers beyond");
    }

    Mutator mutator({referral.size(), memory[0].size(), memory[1].size()});
    constexpr int kMutations = 200'000;
    int read = 0;
    volatile std::byte sink{};
    for (int i = 0; i < kMutations; ++i) {
      Bytes changed = referral;
      for (uint64_t n = mutator.Below(3) + 1; n > 0; --n) mutator.Change(changed, resolved.size());
      const Bytes data(changed.begin(), changed.end());  // of no more memory than it has bytes
      const auto parts = pair.b.sharing.Resolve(RankId(0), data);
      read += !parts.empty();
      size_t travelled = 0;
      for (const Span part : parts) {
        const bool travels = IsWithin(part, data);
        ForkedRank::Require(travels || IsWithin(part, memory[0]) || IsWithin(part, memory[1]),
                            "reads elsewhere in change " + std::to_string(i));
        if (part.empty()) continue;
        if (travels) travelled += part.size();
        sink = part.front();
        sink = part.back();
      }
      ForkedRank::Require(
          parts.empty() || kHead + parts.size() * sizeof(Part) + travelled == data.size(),
          "leaves some of change " + std::to_string(i));
    }
    static_cast<void>(sink);
    ForkedRank::Require(read > kMutations / 50 && read < kMutations / 2,
                        "changes that were read: " + std::to_string(read));
  };
  EXPECT_EQ(Run(body), "");
}

TEST_P(UcxReferral, HostileOffersAreNotTaken) {
  const auto body = [] {
    Pair pair;
    struct Hostile {
      const char* what;
      std::function<void(UcxNotice&)> change;
    };
    const std::vector<Hostile> all{
        {"of another job", [](UcxNotice& n) { ++n.nonce; }},
        {"of an unknown rank", [](UcxNotice& n) { n.source = 7; }},
        {"of the reader itself", [](UcxNotice& n) { n.source = 1; }},
        {"of no rank", [](UcxNotice& n) { n.source = -1; }},
        {"of 1 TiB", [](UcxNotice& n) { n.number += uint64_t{1} << 40; }},
        {"of all memory", [](UcxNotice& n) { n.number = UINT64_MAX; }},
    };
    for (const Hostile& hostile : all) {
      const Pair::Region region = pair.Allocate(kMiB);
      UcxNotice notice = region.notice;
      hostile.change(notice);
      pair.Offer(notice, region.key);
      // An honest one behind it is taken.
      const Pair::Region honest = pair.AllocateTaken(kMiB);
      ForkedRank::Require(!pair.IsTaken(region), hostile.what);
      ForkedRank::Require(Seen(pair, honest).size() == kMiB, "an honest offer was not taken");
    }
    const Pair::Region region = pair.Allocate(kMiB);
    const Span header = std::as_bytes(std::span(&region.notice, 1));
    Bytes longer(header.begin(), header.end());
    longer.resize(longer.size() + 8);
    for (const Span wrong : {header.first(31), header.first(8), Span(longer)}) {
      pair.Offer(wrong, region.key);
      pair.AllocateTaken(kMiB);
      ForkedRank::Require(!pair.IsTaken(region), "a header of a wrong size");
    }
    ForkedRank::Require(pair.b.gate.stats().dropped_malformed == 7, "drops not counted");
  };
  EXPECT_EQ(Run(body), "");
}

// Whatever is mapped behind it.
TEST_P(UcxReferral, OffersOfMoreThanTheRegionHasAreNotTaken) {
  const auto body = [] {
    Pair pair;
    for (const int shift : {12, 16, 20, 24, 32, 40, 62}) {
      const Pair::Region region = pair.Allocate(kMiB);
      UcxNotice notice = region.notice;
      notice.number += uint64_t{1} << shift;
      pair.Offer(notice, region.key);
      pair.AllocateTaken(kMiB);
      ForkedRank::Require(!pair.IsTaken(region), "2^" + std::to_string(shift) + " too many");
    }
  };
  EXPECT_EQ(Run(body), "");
}

TEST_P(UcxReferral, ARegionIsNotReplaced) {
  const auto body = [] {
    Pair pair;
    const Pair::Region first = pair.AllocateTaken(kMiB);
    const Pair::Region second = pair.Allocate(kMiB);
    const Span seen = Seen(pair, first);
    UcxNotice notice = second.notice;
    notice.region = first.notice.region;
    pair.Offer(notice, second.key);
    pair.AllocateTaken(kMiB);
    ForkedRank::Require(Seen(pair, first).data() == seen.data(), "replaced");
    ForkedRank::Require(!pair.IsTaken(second), "taken by another's number");
  };
  EXPECT_EQ(Run(body), "");
}

}  // namespace
}  // namespace passel::transport
