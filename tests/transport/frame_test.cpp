#include "transport/frame.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <string>

#include "runtime/base/random.h"
#include "transport/frame_gate.h"

namespace passel::transport {
namespace {

using HeaderBytes = std::array<std::byte, kFrameHeaderBytes>;

HeaderBytes BytesOf(const FrameHeader& header) {
  HeaderBytes bytes;
  std::memcpy(bytes.data(), &header, bytes.size());
  return bytes;
}

FrameHeader Valid() {
  FrameHeader h;
  h.type = FrameType::kQuery;
  h.nonce = 77;
  h.epoch = 3;
  h.source = 1;
  h.layer = 12;
  h.micro_batch = 2;
  h.count = 5;
  h.step = 1234567890123;
  h.payload_bytes = 640;
  h.sequence = 9;
  SealFrameHeader(h);
  return h;
}

FrameGate Gate() {
  FrameGate gate(RankId(0));
  gate.set_nonce(77);
  gate.set_epoch(3);
  gate.AddPeer(RankId(1));
  return gate;
}

TEST(Frame, RoundTrip) {
  std::string_view reason;
  const auto parsed = ParseFrameHeader(BytesOf(Valid()), &reason);
  ASSERT_TRUE(parsed) << reason;
  EXPECT_EQ(BytesOf(*parsed), BytesOf(Valid()));
}

TEST(Frame, FieldsHaveTheirPlacesOnTheWire) {
  const auto bytes = BytesOf(Valid());
  EXPECT_EQ(std::memcmp(bytes.data(), "PSSL", 4), 0);
  EXPECT_EQ(bytes[8], std::byte{77});   // nonce
  EXPECT_EQ(bytes[16], std::byte{3});   // epoch
  EXPECT_EQ(bytes[24], std::byte{12});  // layer
}

TEST(Frame, EveryChangeOfOneByteIsFound) {
  const auto valid = BytesOf(Valid());
  for (size_t i = 0; i < valid.size(); ++i) {
    for (int x = 1; x < 256; ++x) {
      auto bad = valid;
      bad[i] ^= std::byte(static_cast<uint8_t>(x));
      ASSERT_FALSE(ParseFrameHeader(bad, nullptr)) << "byte " << i << " xor " << x;
    }
  }
}

TEST(Frame, WrongSizesAreRefused) {
  std::array<std::byte, 128> bytes{};
  std::memcpy(bytes.data(), BytesOf(Valid()).data(), kFrameHeaderBytes);
  for (size_t n = 0; n <= bytes.size(); ++n) {
    EXPECT_EQ(ParseFrameHeader(std::span(bytes).first(n), nullptr).has_value(),
              n == kFrameHeaderBytes);
  }
}

TEST(Frame, SealedButWrongFieldsAreRefusedByName) {
  const struct {
    std::function<void(FrameHeader&)> spoil;
    std::string_view reason;
  } cases[] = {
      {[](FrameHeader& h) { h.magic = 1; }, "wrong magic"},
      {[](FrameHeader& h) { h.version = 2; }, "wrong protocol version"},
      {[](FrameHeader& h) { h.type = FrameType{0}; }, "unknown frame type"},
      {[](FrameHeader& h) { h.type = FrameType{9}; }, "unknown frame type"},
      {[](FrameHeader& h) {
         h.type = FrameType::kKv;
         h.part = 1;
       },
       "a part of what has no parts"},
  };
  for (const auto& c : cases) {
    FrameHeader h = Valid();
    c.spoil(h);
    SealFrameHeader(h);
    std::string_view reason;
    EXPECT_FALSE(ParseFrameHeader(BytesOf(h), &reason));
    EXPECT_EQ(reason, c.reason);
  }
}

TEST(FrameGate, CountsWhyAFrameIsDropped) {
  const struct {
    std::function<void(FrameHeader&)> spoil;
    uint64_t payload;
    uint64_t malformed, nonce, epoch;
  } cases[] = {
      {[](FrameHeader&) {}, 640, 0, 0, 0},
      {[](FrameHeader& h) { h.nonce = 78; }, 640, 0, 1, 0},
      {[](FrameHeader& h) { h.epoch = 2; }, 640, 0, 0, 1},
      {[](FrameHeader& h) { h.epoch = 2, h.type = FrameType::kControl; }, 640, 0, 0, 0},
      {[](FrameHeader& h) { h.source = 2; }, 640, 1, 0, 0},
      {[](FrameHeader& h) { h.source = 0; }, 640, 1, 0, 0},
      {[](FrameHeader& h) { h.source = -1; }, 640, 1, 0, 0},
      {[](FrameHeader&) {}, 639, 1, 0, 0},
      {[](FrameHeader& h) { h.payload_bytes = (16u << 20) + 1; }, (16u << 20) + 1, 1, 0, 0},
      {[](FrameHeader& h) { h.payload_bytes = 16u << 20; }, 16u << 20, 0, 0, 0},
      {[](FrameHeader& h) { h.type = FrameType::kControl, h.payload_bytes = (1u << 20) + 1; },
       (1u << 20) + 1, 1, 0, 0},
      {[](FrameHeader& h) { h.type = FrameType::kHeartbeat; }, 640, 1, 0, 0},
      {[](FrameHeader& h) { h.type = FrameType::kHeartbeat, h.payload_bytes = 0; }, 0, 0, 0, 0},
      {[](FrameHeader& h) { h.payload_bytes = ~uint64_t{0}; }, ~uint64_t{0}, 1, 0, 0},
  };
  for (size_t i = 0; i < std::size(cases); ++i) {
    FrameGate gate = Gate();
    FrameHeader h = Valid();
    cases[i].spoil(h);
    SealFrameHeader(h);
    const bool good = cases[i].malformed + cases[i].nonce + cases[i].epoch == 0;
    EXPECT_EQ(gate.Admit(BytesOf(h), cases[i].payload).has_value(), good) << "case " << i;
    EXPECT_EQ(gate.stats().dropped_malformed, cases[i].malformed) << "case " << i;
    EXPECT_EQ(gate.stats().dropped_nonce, cases[i].nonce) << "case " << i;
    EXPECT_EQ(gate.stats().dropped_epoch, cases[i].epoch) << "case " << i;
  }
}

TEST(FrameGate, StampedFramesAreAdmittedByThePeerAndSequencesRise) {
  FrameGate sender(RankId(1));
  sender.set_nonce(77);
  sender.set_epoch(3);
  FrameGate receiver = Gate();
  uint64_t last = 0;
  for (int i = 0; i < 10; ++i) {
    FrameHeader h;
    h.type = FrameType::kPartial;
    h.part = 5;
    sender.Stamp(h, 100);
    const auto admitted = receiver.Admit(BytesOf(h), 100);
    ASSERT_TRUE(admitted);
    EXPECT_EQ(admitted->source, 1);
    EXPECT_EQ(admitted->part, 5u);
    EXPECT_GT(admitted->sequence, last);
    last = admitted->sequence;
  }
}

// Random damage, half of it sealed again as a hostile sender would: whatever is admitted is exactly
// a frame that the gate may admit.
TEST(FrameGate, HostileHeadersAreNeverAdmittedMalformed) {
  Random random(42);
  FrameGate gate = Gate();
  int admitted_count = 0;
  constexpr int kRounds = 100000;
  for (int round = 0; round < kRounds; ++round) {
    auto bytes = BytesOf(Valid());
    const uint64_t edits = 1 + random.Next() % 4;
    for (uint64_t e = 0; e < edits; ++e) {
      bytes[random.Next() % bytes.size()] = std::byte(static_cast<uint8_t>(random.Next()));
    }
    const bool reseal = random.Next() % 2 == 0;
    if (reseal) {
      FrameHeader h;
      std::memcpy(&h, bytes.data(), sizeof(h));
      SealFrameHeader(h);
      bytes = BytesOf(h);
    }
    uint64_t payload = 640;
    if (random.Next() % 4 == 0) payload = random.Next() >> (random.Next() % 64);
    const auto h = gate.Admit(bytes, payload);
    if (!h) continue;
    ++admitted_count;
    ASSERT_TRUE(reseal || bytes == BytesOf(Valid())) << "round " << round;
    ASSERT_EQ(h->magic, kFrameMagic);
    ASSERT_EQ(h->version, kProtocolVersion);
    ASSERT_EQ(h->nonce, 77u);
    ASSERT_EQ(h->source, 1);
    const bool has_parts = h->type == FrameType::kQuery || h->type == FrameType::kPartial ||
                           h->type == FrameType::kReadKv || h->type == FrameType::kKvRows;
    ASSERT_TRUE(h->part == 0 || has_parts);
    ASSERT_EQ(h->payload_bytes, payload);
    ASSERT_LE(payload, MaxPayloadBytes(h->type));
    ASSERT_GE(static_cast<int>(h->type), 1);
    ASSERT_LE(static_cast<int>(h->type), 8);
    const bool free_of_epoch = h->type == FrameType::kControl || h->type == FrameType::kHeartbeat;
    ASSERT_TRUE(h->epoch == 3 || free_of_epoch);
  }
  const ChannelStats& s = gate.stats();
  EXPECT_EQ(s.dropped_malformed + s.dropped_nonce + s.dropped_epoch +
                static_cast<uint64_t>(admitted_count),
            uint64_t{kRounds});
  EXPECT_GT(admitted_count, kRounds / 20);  // edits of fields that may have any value
  EXPECT_GT(s.dropped_nonce, 1000u);
  EXPECT_GT(s.dropped_epoch, 1000u);
}

}  // namespace
}  // namespace passel::transport
