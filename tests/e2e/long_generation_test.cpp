// After thousands of generated tokens nothing of them is lost to attention.
#include <gtest/gtest.h>

#include <iostream>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

constexpr int kTokens = 3000;
// Bound on the error of a log-probability; contexts here are ten times those of tokens_test.
constexpr double kError = 0.15;

TEST(LongGeneration, FullOnHostsFollowsTheModelRankAlone) {
  if (!TestModel()) GTEST_SKIP() << "the test model is absent";
  const TempDirectory directory;
  Job job;
  job.timeout = std::chrono::seconds(600);
  job.requests = {Greedy("r", Prose(14, 3), kTokens)};
  job.name = "alone";
  const JobResult alone = RunJobOk(directory, job);

  job.name = "hosts";
  job.hosts = 2;
  job.settings = AllThroughHosts("FULL");
  const JobResult hosts = RunJobOk(directory, job);
  EXPECT_EQ(alone.Choice("r")["token_ids"].size(), static_cast<size_t>(kTokens));
  EXPECT_EQ(hosts.Choice("r")["token_ids"].size(), static_cast<size_t>(kTokens));
  const Agreement a = ExpectSameTokens(alone.Choice("r"), hosts.Choice("r"), kError);
  // A fork at a close call ends the comparison; it must not end it before the generated tokens
  // are most of the context.
  EXPECT_GE(a.compared, kTokens / 2);
  std::cout << a.compared << " of " << kTokens << " generated tokens compared, largest error of a "
            << "log-probability " << a.largest_error << "\n";
}

}  // namespace
}  // namespace passel::e2e
