// With engine.deterministic a seed gives bit-identical tokens, however the work is spread.
#include <gtest/gtest.h>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

constexpr int kTokens = 24;

struct Spread {
  int hosts;
  const char* placement;
  int host_threads;
  int model_threads;
  int max_batch;
  int micro_batches;
};

class Deterministic : public testing::Test {
 protected:
  void SetUp() override {
    if (!TestModel()) GTEST_SKIP() << "the test model is absent";
    for (int i = 0; i < 4; ++i) {
      // About 300 to 520 tokens: one to two blocks of 256.
      json request = Greedy(Numbered("r", i), Prose(18 + 5 * i, 10 + i), kTokens);
      request["body"]["temperature"] = 0.8;
      request["body"]["seed"] = 7 + i;
      requests_.push_back(std::move(request));
    }
  }

  JobResult Run(const Spread& s) {
    Job job;
    job.requests = requests_;
    job.hosts = s.hosts;
    job.name = Numbered("run", runs_++);
    job.settings =
        With(AllThroughHosts("LSH"),
             {"engine.deterministic=true", std::string("cluster.placement=") + s.placement,
              Numbered("host.threads=", s.host_threads), Numbered("gpu.threads=", s.model_threads),
              Numbered("engine.max_batch=", s.max_batch),
              Numbered("engine.micro_batches=", s.micro_batches)});
    return RunJobOk(directory_, job);
  }

  // Tokens and log-probabilities are those of the first run, to the bit: the output holds the
  // shortest decimal text that gives back each float.
  void ExpectIdentical(const JobResult& first, const Spread& s) {
    SCOPED_TRACE(testing::Message()
                 << s.hosts << " hosts, " << s.placement << ", host threads " << s.host_threads
                 << ", model threads " << s.model_threads << ", batch " << s.max_batch
                 << ", micro-batches " << s.micro_batches);
    const JobResult result = Run(s);
    for (const json& request : requests_) {
      const std::string id = request["custom_id"];
      SCOPED_TRACE(id);
      const json expected = first.Choice(id);
      const json got = result.Choice(id);
      ASSERT_FALSE(expected.is_null() || got.is_null());
      EXPECT_EQ(expected["token_ids"], got["token_ids"]);
      EXPECT_EQ(expected["logprobs"], got["logprobs"]);
      EXPECT_EQ(first.Usage(id)["sampled_fraction"], result.Usage(id)["sampled_fraction"]);
    }
  }

  TempDirectory directory_;
  std::vector<json> requests_;
  int runs_ = 0;
};

TEST_F(Deterministic, AnySpreadOfTheWorkGivesTheSameBits) {
  const JobResult first = Run({1, "REQUEST", 1, 1, 1, 1});
  for (const json& request : requests_) {
    const std::string id = request["custom_id"];
    EXPECT_EQ(first.Choice(id)["token_ids"].size(), static_cast<size_t>(kTokens));
    const double fraction = first.Usage(id)["sampled_fraction"];
    EXPECT_GT(fraction, 0.0);
    EXPECT_LT(fraction, 0.5);
  }
  // Each value of each field beside each of most others.
  const Spread spreads[] = {
      {1, "HEAD", 2, 1, 4, 1},    {1, "SEQUENCE", 1, 2, 4, 2}, {2, "AUTO", 2, 2, 4, 1},
      {2, "HEAD", 1, 2, 1, 1},    {2, "SEQUENCE", 2, 1, 1, 1}, {2, "SEQUENCE", 1, 1, 4, 2},
      {2, "REQUEST", 1, 2, 4, 1}, {3, "REQUEST", 1, 1, 4, 2},  {3, "AUTO", 2, 1, 1, 1},
      {3, "HEAD", 2, 2, 4, 0},    {3, "SEQUENCE", 2, 2, 4, 1}, {3, "SEQUENCE", 1, 1, 1, 1}};
  for (const Spread& s : spreads) {
    ExpectIdentical(first, s);
    if (HasFailure()) break;  // the first difference says enough
  }
}

// Long enough that generated tokens go through the open end, small blocks and a merge.
TEST_F(Deterministic, SealedAndMergedTokensGiveTheSameBits) {
  requests_.resize(1);
  requests_[0]["body"]["max_tokens"] = 700;
  const JobResult first = Run({1, "REQUEST", 1, 1, 1, 1});
  EXPECT_EQ(first.Choice("r0")["token_ids"].size(), 700u);
  ExpectIdentical(first, {3, "SEQUENCE", 2, 2, 4, 1});
}

}  // namespace
}  // namespace passel::e2e
