// What host ranks answer leads to the tokens that the model rank alone finds.
#include <gtest/gtest.h>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

// Bound on the error of a log-probability between two orders of summation over bf16 caches and
// matmuls.
constexpr double kError = 0.1;
constexpr int kTokens = 48;

class Tokens : public testing::Test {
 protected:
  void SetUp() override {
    if (!TestModel()) GTEST_SKIP() << "the test model is absent";
    for (int i = 0; i < 4; ++i) {
      requests_.push_back(Greedy(Numbered("r", i), Prose(22 + 7 * i, i), kTokens));
    }
  }

  JobResult ModelRankAlone() {
    Job job;
    job.requests = requests_;
    job.name = "alone";
    return RunJobOk(directory_, job);
  }

  // Holds every request of `result` to `baseline` and asks for enough common positions.
  void ExpectSame(const JobResult& baseline, const JobResult& result) {
    int compared = 0, tokens = 0;
    double error = 0;
    for (const json& request : requests_) {
      const std::string id = request["custom_id"];
      SCOPED_TRACE(id);
      const Agreement a = ExpectSameTokens(baseline.Choice(id), result.Choice(id), kError);
      compared += a.compared;
      tokens += request["body"]["max_tokens"].get<int>();
      error = std::max(error, a.largest_error);
    }
    // Forks at close calls are rare; behind one nothing can be compared.
    EXPECT_GE(compared, tokens / 2);
    RecordProperty("compared", compared);
    RecordProperty("largest_error", std::to_string(error));
  }

  void ExpectSampled(const JobResult& result) {
    for (const json& request : requests_) {
      const std::string id = request["custom_id"];
      EXPECT_EQ(result.Choice(id)["token_ids"].size(), static_cast<size_t>(kTokens));
      EXPECT_FALSE(result.Choice(id)["text"].get<std::string>().empty());
      const double fraction = result.Usage(id)["sampled_fraction"];
      EXPECT_GT(fraction, 0.0);
      EXPECT_LT(fraction, 0.5);
    }
    EXPECT_GT(result.summary["sampled_fraction"], 0.0);
    EXPECT_LT(result.summary["sampled_fraction"], 0.5);
    EXPECT_GT(result.summary["tokens_per_second"], 0.0);
    ASSERT_EQ(result.summary["hosts"].size(), 2u);
    for (const json& host : result.summary["hosts"]) {
      EXPECT_GT(host["kv_bytes"], 0);
      EXPECT_GT(host["table_bytes"], 0);
    }
  }

  TempDirectory directory_;
  std::vector<json> requests_;
};

TEST_F(Tokens, FullOnHostsGivesThoseOfTheModelRankAlone) {
  const JobResult alone = ModelRankAlone();
  Job job;
  job.requests = requests_;
  job.hosts = 2;
  job.settings = AllThroughHosts("FULL");
  ExpectSame(alone, RunJobOk(directory_, job));

  // Dense layers (0 and 16 of 30) on the hosts, exact like the others.
  job.name = "dense_on_hosts";
  job.settings = {"attention.estimator=FULL", "attention.exact_below=0", "attention.dense_kv=HOST",
                  "host.block_tokens=256"};
  ExpectSame(alone, RunJobOk(directory_, job));

  // Dense layers on the model rank, the others on hosts.
  job.name = "dense_on_model_rank";
  job.settings = {"attention.estimator=FULL", "attention.exact_below=0", "host.block_tokens=256"};
  ExpectSame(alone, RunJobOk(directory_, job));
}

TEST_F(Tokens, RolesByNameGiveThoseOfTheModelRankAlone) {
  const JobResult alone = ModelRankAlone();
  Job job;
  job.requests = requests_;
  job.hosts = 2;
  job.mpmd = true;
  job.settings = AllThroughHosts("FULL");
  const JobResult result = RunJobOk(directory_, job);
  ExpectSame(alone, result);
  const json ranks = json::parse(ReadFile(directory_.File("run/ranks.json")));
  ASSERT_EQ(ranks.size(), 3U);
  EXPECT_EQ(ranks[0]["role"], "model");
  EXPECT_EQ(ranks[1]["role"], "host");
  EXPECT_EQ(ranks[2]["role"], "host");
}

// Three KV heads of three query heads each: two ranks share them unevenly, three have one each, and
// of four two hold the same one and share its query heads.
TEST_F(Tokens, TwoThreeAndFourModelRanksGiveThoseOfOne) {
  requests_ = {Greedy("r0", Prose(6, 0), 10), Greedy("r1", Prose(8, 1), 10)};
  const JobResult alone = ModelRankAlone();
  constexpr struct { int model_ranks, hosts; } kJobs[] = {{2, 0}, {3, 0}, {4, 0}, {2, 2}};
  for (const auto& [model_ranks, hosts] : kJobs) {
    SCOPED_TRACE(testing::Message() << model_ranks << " model ranks, " << hosts << " host ranks");
    Job job;
    job.requests = requests_;
    job.model_ranks = model_ranks;
    job.hosts = hosts;
    job.settings = With(AllThroughHosts("FULL"), {"gpu.threads=1"});
    job.name = Numbered(Numbered("ranks_", model_ranks).append("_"), hosts);
    ExpectSame(alone, RunJobOk(directory_, job));
    const json ranks = json::parse(ReadFile(directory_.File(job.name + "/ranks.json")));
    ASSERT_EQ(ranks.size(), static_cast<size_t>(model_ranks + hosts));
    EXPECT_EQ(ranks[static_cast<size_t>(model_ranks - 1)]["role"], "model");
  }
}

// Parts read K and V of those before them back from hosts, and from the device what is kept there.
TEST_F(Tokens, PromptsInPartsGiveThoseOfWholeOnes) {
  const JobResult alone = ModelRankAlone();
  const std::vector<std::string> parts = {"engine.prefill_chunk=48", "engine.prefill_part=130"};
  const std::vector<std::string> some_dense = {"attention.estimator=FULL",
                                               "attention.exact_below=0", "host.block_tokens=256"};
  const struct {
    const char* name;
    int model_ranks, hosts;
    std::vector<std::string> settings;
  } jobs[] = {{"alone_in_parts", 1, 0, {}},
              {"hosts", 1, 2, AllThroughHosts("FULL")},
              {"some_dense", 1, 2, some_dense},
              {"two_model_ranks", 2, 2, With(some_dense, {"cluster.placement=SEQUENCE"})}};
  for (const auto& [name, model_ranks, hosts, settings] : jobs) {
    SCOPED_TRACE(name);
    Job job;
    job.requests = requests_;
    job.name = name;
    job.model_ranks = model_ranks;
    job.hosts = hosts;
    job.settings = With(settings, parts);
    const JobResult result = RunJobOk(directory_, job);
    ExpectSame(alone, result);
    EXPECT_NE(result.process.err.find("in parts of 130 tokens"), std::string::npos)
        << result.process.err;
  }
}

TEST_F(Tokens, LshSamplesAFewTokensAndGenerates) {
  Job job;
  job.requests = requests_;
  job.hosts = 2;
  job.settings = AllThroughHosts("LSH");
  ExpectSampled(RunJobOk(directory_, job));
  // The mean of the keys is the first part's.
  job.name = "parts";
  job.settings = With(job.settings, {"engine.prefill_chunk=48", "engine.prefill_part=130"});
  ExpectSampled(RunJobOk(directory_, job));
}

}  // namespace
}  // namespace passel::e2e
