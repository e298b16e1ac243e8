// After many generated tokens nothing of them is lost to attention.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <iostream>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

constexpr int kTokens = 800;
// Bound on the error of a log-probability; contexts here are ten times those of tokens_test.
constexpr double kError = 0.15;

TEST(LongGeneration, FullOnHostsFollowsTheModelRankAlone) {
  if (!TestModel()) GTEST_SKIP() << "the test model is absent";
  const TempDirectory directory;
  Job job;
  job.timeout = std::chrono::seconds(600);
  // A fork at a close call ends a comparison: of several requests one must come to its end.
  for (int seed = 3; seed < 5; ++seed) {
    job.requests.push_back(Greedy(Numbered("r", seed), Prose(14, seed), kTokens));
  }
  job.name = "alone";
  const JobResult alone = RunJobOk(directory, job);

  job.name = "hosts";
  job.hosts = 2;
  job.settings = AllThroughHosts("FULL");
  const JobResult hosts = RunJobOk(directory, job);
  EXPECT_THAT(hosts.process.err, testing::ContainsRegex("tokens/s, ETA [0-9]+ s"));
  int longest = 0;
  for (const json& request : job.requests) {
    const std::string id = request["custom_id"];
    SCOPED_TRACE(id);
    EXPECT_EQ(alone.Choice(id)["token_ids"].size(), static_cast<size_t>(kTokens));
    EXPECT_EQ(hosts.Choice(id)["token_ids"].size(), static_cast<size_t>(kTokens));
    const Agreement a = ExpectSameTokens(alone.Choice(id), hosts.Choice(id), kError);
    longest = std::max(longest, a.compared);
    std::cout << id << ": " << a.compared << " of " << kTokens
              << " generated tokens compared, largest error of a log-probability "
              << a.largest_error << "\n";
  }
  EXPECT_EQ(longest, kTokens);
}

}  // namespace
}  // namespace passel::e2e
