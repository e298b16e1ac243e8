// Reads of K and V as a host rank answers them.
#include "runtime/engine/kv_read_server.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/engine/host_rank_fixture.h"

namespace passel::engine {
namespace {

TEST_F(HostRankTest, GivesRowsBackOnceTheyAreThere) {
  const uint64_t half = tokens_ / 2;  // a segment
  const std::vector<cluster::ReadKvEntry> entries = {{1, half, 0, 3, 0}, {1, 7, 0, 100, 0}};
  Send(OpenFrame(1));
  Send(ReadFrame(1, entries));
  Send(ReadFrame(2, {entries[1]}));
  const std::vector<Frame> frames = KvFrames(1);
  Send(frames[0]);
  ExpectRows(2, {entries[1]});
  EXPECT_EQ(Sync(), 0u);
  EXPECT_TRUE(RowsOf(1).empty());
  Send(frames[1]);
  ExpectRows(1, entries);
  EXPECT_EQ(Sync(), 0u);
}

TEST_F(HostRankTest, SaysWhatItCannotRead) {
  Fill(1);
  const cluster::ReadKvEntry there{1, 0, 0, 1, 0};
  const auto across = static_cast<uint32_t>(tokens_);
  const struct {
    cluster::ReadKvEntry entry;
    host::Status status;
  } cases[] = {{{2, 0, 0, 1, 0}, host::Status::kUnknownRequest},
               {{1, 4000, 0, 1, 0}, host::Status::kNotHere},
               {{1, 0, 0, across, 0}, host::Status::kBadArgument}};
  uint64_t step = 0;
  for (const auto& c : cases) {
    Send(ReadFrame(++step, {there, c.entry}));
    ExpectRows(step, {there, c.entry}, c.status);
  }
  Frame other = ReadFrame(9, {there});
  other.header.layer = 500;
  Send(other);
  ExpectRows(9, {there}, host::Status::kNotHere);
  EXPECT_EQ(Sync(), 0u);
}

TEST_F(HostRankTest, ReadsThatWaitAreBoundedAndGoWithTheirRequest) {
  Send(OpenFrame(1));
  Send(OpenFrame(2));
  const cluster::ReadKvEntry missing{1, 0, 0, 1, 0};
  // 2 MiB of entries each: the eighth passes what may wait.
  const std::vector<cluster::ReadKvEntry> many(65536, missing);
  for (uint64_t step = 1; step <= 8; ++step) Send(ReadFrame(step, many));
  EXPECT_EQ(Sync(), 1u);
  cluster::proto::Control release;
  release.mutable_release()->set_request(1);
  Send(ControlFrame(release));
  Send(ReadFrame(20, {{2, 0, 0, 1, 0}}));  // there is room again
  for (const Frame& f : KvFrames(2)) Send(f);
  ExpectRows(20, {{2, 0, 0, 1, 0}});
  EXPECT_EQ(Sync(), 1u);
  for (uint64_t step = 1; step <= 8; ++step) EXPECT_TRUE(RowsOf(step).empty());
}

}  // namespace
}  // namespace passel::engine
