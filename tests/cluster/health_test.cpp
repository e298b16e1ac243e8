#include "cluster/health.h"

#include <gtest/gtest.h>

#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Ranks = std::vector<RankId>;

class HealthTest : public testing::Test {
 protected:
  static constexpr HealthTracker::Time At(int64_t ms) {
    return HealthTracker::Time(milliseconds(1'000'000 + ms));
  }
  const Ranks peers_{RankId(3), RankId(1), RankId(2)};
  HealthTracker tracker_{peers_, seconds(10), At(0)};
};

TEST_F(HealthTest, SilenceIsNoticedAtTheTimeoutNotBefore) {
  tracker_.Heard(RankId(1), At(4000));
  EXPECT_TRUE(tracker_.Overdue(At(9999)).empty());
  auto failures = tracker_.Overdue(At(10'000));
  ASSERT_EQ(failures.size(), 2u);
  EXPECT_EQ(failures[0].peer, RankId(2));
  EXPECT_EQ(failures[1].peer, RankId(3));
  EXPECT_EQ(failures[0].reason, HealthTracker::Reason::kSilent);
  EXPECT_EQ(failures[0].since, seconds(10));
  EXPECT_EQ(tracker_.Overdue(At(13'999)).size(), 2u);
  EXPECT_EQ(tracker_.Overdue(At(14'000)).size(), 3u);
}

TEST_F(HealthTest, ABeatingHeartDoesNotExcuseAnOpenQuestion) {
  tracker_.Asked(RankId(1), 7, At(1000));
  tracker_.Asked(RankId(1), 8, At(2000));
  tracker_.Asked(RankId(2), 7, At(1000));
  for (int64_t t = 0; t <= 12'000; t += 1000) {
    for (const RankId peer : peers_) tracker_.Heard(peer, At(t));
  }
  tracker_.Answered(RankId(2), 7);
  EXPECT_TRUE(tracker_.Overdue(At(10'999)).empty());
  auto failures = tracker_.Overdue(At(11'000));
  ASSERT_EQ(failures.size(), 1u);
  EXPECT_EQ(failures[0].peer, RankId(1));
  EXPECT_EQ(failures[0].reason, HealthTracker::Reason::kHung);
  tracker_.Answered(RankId(1), 7);
  tracker_.Answered(RankId(1), 7);  // twice is harmless
  EXPECT_TRUE(tracker_.Overdue(At(11'999)).empty());
  EXPECT_EQ(tracker_.Overdue(At(12'000)).size(), 1u);  // the later question
}

TEST_F(HealthTest, HeartbeatsAreDueWhereNothingElseWasSent) {
  EXPECT_EQ(tracker_.heartbeat_interval(), seconds(2));
  EXPECT_TRUE(tracker_.HeartbeatsDue(At(1999)).empty());
  tracker_.Sent(RankId(2), At(1500));
  EXPECT_EQ(tracker_.HeartbeatsDue(At(2000)), (Ranks{RankId(1), RankId(3)}));
  tracker_.Sent(RankId(1), At(2000));
  tracker_.Sent(RankId(3), At(2000));
  EXPECT_EQ(tracker_.HeartbeatsDue(At(3500)), (Ranks{RankId(2)}));
}

TEST_F(HealthTest, TheNextDeadlineIsTheFirstThatMatters) {
  EXPECT_EQ(tracker_.NextDeadline(), At(2000));
  for (const RankId peer : peers_) tracker_.Sent(peer, At(9500));
  EXPECT_EQ(tracker_.NextDeadline(), At(10'000));  // silence
  for (const RankId peer : peers_) tracker_.Heard(peer, At(9500));
  EXPECT_EQ(tracker_.NextDeadline(), At(11'500));
  tracker_.Asked(RankId(1), 1, At(500));
  EXPECT_EQ(tracker_.NextDeadline(), At(10'500));
  for (const RankId peer : peers_) tracker_.Remove(peer);
  EXPECT_EQ(tracker_.NextDeadline(), HealthTracker::Time::max());
}

TEST_F(HealthTest, RemovedAndUnknownPeersAreIgnored) {
  tracker_.Remove(RankId(1));
  tracker_.Heard(RankId(1), At(1));
  tracker_.Asked(RankId(9), 1, At(1));
  tracker_.Sent(RankId(9), At(1));
  tracker_.Answered(RankId(9), 1);
  const auto failures = tracker_.Overdue(At(20'000));
  ASSERT_EQ(failures.size(), 2u);
  EXPECT_EQ(failures[0].peer, RankId(2));
  EXPECT_EQ(failures[1].peer, RankId(3));
}

TEST_F(HealthTest, NewsOutOfOrderDoesNotTurnTimeBack) {
  tracker_.Heard(RankId(1), At(5000));
  tracker_.Heard(RankId(1), At(3000));
  for (const auto& failure : tracker_.Overdue(At(14'000))) EXPECT_NE(failure.peer, RankId(1));
}

TEST_F(HealthTest, MisuseIsABug) {
  tracker_.Asked(RankId(1), 7, At(0));
  EXPECT_THROW(tracker_.Asked(RankId(1), 7, At(1)), Error);
  EXPECT_THROW(HealthTracker(peers_, seconds(0), At(0)), Error);
}

}  // namespace
}  // namespace passel::cluster
