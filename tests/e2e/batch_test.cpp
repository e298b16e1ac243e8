// Requests of one job start, decode and finish each on its own; a broken-off job is resumed.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

class Batch : public testing::Test {
 protected:
  void SetUp() override {
    if (!TestModel()) GTEST_SKIP() << "the test model is absent";
  }

  TempDirectory directory_;
};

std::vector<std::string> CustomIds(const JobResult& result) {
  std::vector<std::string> ids;
  for (const json& line : result.lines) ids.push_back(line["custom_id"]);
  return ids;
}

TEST_F(Batch, RequestsFinishIndependently) {
  Job job;
  job.hosts = 2;
  job.settings = With(AllThroughHosts("LSH"), {"engine.max_batch=4"});
  // The first to come is the longest in every respect; one asks for what cannot be had.
  job.requests = {Greedy("long", Prose(40, 1), 60), Greedy("short", "The capital of France is", 4),
                  Greedy("middle", Prose(20, 2), 20), Greedy("bad", "Hello", 0),
                  Greedy("stopped", "Count: one, two, three, four,", 60)};
  json& stopped = job.requests.back()["body"];
  stopped["stop"] = {"seven"};
  stopped.erase("ignore_eos");
  const JobResult result = RunJobOk(directory_, job);
  ASSERT_EQ(result.lines.size(), 5U);
  ASSERT_EQ(result.by_id.size(), 5U);

  EXPECT_EQ(result.by_id.at("bad")["response"]["status_code"], 400);
  EXPECT_NE(result.by_id.at("bad")["error"]["message"].get<std::string>().find("max_tokens"),
            std::string::npos);
  EXPECT_EQ(result.summary["requests_ok"], 4);
  EXPECT_EQ(result.summary["requests_failed"], 1);

  const std::pair<const char*, int> lengths[] = {{"long", 60}, {"short", 4}, {"middle", 20}};
  for (const auto& [id, tokens] : lengths) {
    SCOPED_TRACE(id);
    const json choice = result.Choice(id);
    const json usage = result.Usage(id);
    EXPECT_EQ(choice["finish_reason"], "length");
    EXPECT_EQ(choice["token_ids"].size(), static_cast<size_t>(tokens));
    EXPECT_EQ(usage["completion_tokens"], tokens);
    EXPECT_GT(usage["prompt_tokens"], 0);
    EXPECT_EQ(usage["total_tokens"], usage["prompt_tokens"].get<int>() + tokens);
  }
  EXPECT_GT(result.Usage("long")["prompt_tokens"], result.Usage("middle")["prompt_tokens"]);
  // Five tokens never leave the window: nothing of them is offloaded, so nothing sampled.
  EXPECT_EQ(result.Usage("short")["sampled_fraction"], 1.0);
  EXPECT_GT(result.Usage("long")["sampled_fraction"], 0.0);
  EXPECT_LT(result.Usage("long")["sampled_fraction"], 0.5);

  const json stop = result.Choice("stopped");
  EXPECT_EQ(stop["finish_reason"], "stop");
  EXPECT_EQ(stop["text"].get<std::string>().find("seven"), std::string::npos);
  EXPECT_LT(stop["token_ids"].size(), 60U);

  // In the order of completion: the long one was first in the input.
  const std::vector<std::string> ids = CustomIds(result);
  EXPECT_EQ(ids.back(), "long");
  EXPECT_LT(std::find(ids.begin(), ids.end(), "short"),
            std::find(ids.begin(), ids.end(), "middle"));

  // One prefill and one end for each request that ran, in order.
  std::map<uint64_t, std::string> events;
  std::ifstream file(directory_.File("run/events.jsonl"));
  for (std::string line; std::getline(file, line);) {
    const json event = json::parse(line);
    events[event["request"]] += event["event"].get<std::string>() + " ";
  }
  EXPECT_EQ(events.size(), 4U);
  for (const auto& [request, sequence] : events) {
    EXPECT_EQ(sequence, "prefill_start decode_start request_done ") << request;
  }
}

TEST_F(Batch, MoreRequestsThanTheBatchHoldsAreAllAnswered) {
  Job job;
  job.hosts = 1;
  job.settings = With(AllThroughHosts("LSH"), {"engine.max_batch=2", "engine.max_inflight=3"});
  for (int i = 0; i < 9; ++i) {
    job.requests.push_back(Greedy(Numbered("r", i), Prose(8 + i, i), 3 + 2 * (i % 3)));
  }
  const JobResult result = RunJobOk(directory_, job);
  ASSERT_EQ(result.lines.size(), 9U);
  for (int i = 0; i < 9; ++i) {
    EXPECT_EQ(result.Choice(Numbered("r", i))["token_ids"].size(),
              static_cast<size_t>(3 + 2 * (i % 3)));
  }
  EXPECT_GT(result.summary["sampled_fraction"], 0.0);
  EXPECT_LT(result.summary["sampled_fraction"], 0.5);
}

TEST_F(Batch, ResumeAnswersWhatIsMissingOnce) {
  Job job;
  job.hosts = 1;
  job.settings = With(AllThroughHosts("LSH"), {"engine.deterministic=true"});
  for (int i = 0; i < 3; ++i) {
    job.requests.push_back(Greedy(Numbered("r", i), Prose(10 + i, i), 8));
  }
  job.name = "whole";
  const JobResult whole = RunJobOk(directory_, job);
  ASSERT_EQ(whole.by_id.size(), 3U);
  EXPECT_GT(whole.summary["sampled_fraction"], 0.0);
  EXPECT_LT(whole.summary["sampled_fraction"], 0.5);

  // What a job leaves that was killed while it wrote its second result.
  const std::string first = whole.by_id.at("r1").dump();
  const std::string second = whole.by_id.at("r0").dump();
  const std::string path = directory_.File("resumed.jsonl");
  WriteFile(path, first + "\n" + second.substr(0, second.size() / 2));

  // Without --resume nothing is overwritten.
  job.name = "resumed";
  const JobResult refused = RunJob(directory_, job);
  EXPECT_EQ(refused.process.exit_code, 4) << refused.process.err;
  EXPECT_EQ(ReadFile(path), first + "\n" + second.substr(0, second.size() / 2));

  job.extra_args = {"--resume"};
  const JobResult resumed = RunJobOk(directory_, job);
  EXPECT_EQ(ReadFile(path).rfind(first + "\n", 0), 0U) << "the finished result was touched";
  std::vector<std::string> ids = CustomIds(resumed);
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(ids, (std::vector<std::string>{"r0", "r1", "r2"}));
  EXPECT_EQ(resumed.summary["requests_ok"], 2);
  for (const char* id : {"r0", "r2"}) {
    EXPECT_EQ(resumed.Choice(id)["token_ids"], whole.Choice(id)["token_ids"]) << id;
  }

  // Nothing is left to do: the output stays as it is.
  const std::string before = ReadFile(path);
  RunJobOk(directory_, job);
  EXPECT_EQ(ReadFile(path), before);
}

// One line, written over: it is there before the first layer is, and ends with all of them.
TEST_F(Batch, LoadingShowsItsProgressOnATerminal) {
  Job job;
  job.requests = {Greedy("r", "The capital of France is", 2)};
  job.terminal = true;
  const std::string err = RunJobOk(directory_, job).process.err;
  const std::string line = "\r\033[Kloading: ";
  const size_t first = err.find(line + "0 of 30 layers, 0.0 GB in 0 s");
  const size_t last = err.find(line + "30 of 30 layers, 0.3 GB in ");
  ASSERT_NE(first, std::string::npos) << err;
  ASSERT_NE(last, std::string::npos) << err;
  EXPECT_LT(first, last);
  EXPECT_EQ(err.substr(first, last - first).find('\n'), std::string::npos) << err;
  EXPECT_EQ(err.find(line, last + 1), std::string::npos) << err;
}

}  // namespace
}  // namespace passel::e2e
