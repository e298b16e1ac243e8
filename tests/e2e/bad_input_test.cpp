#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/e2e/run_passel.h"

// What a user sees who gets something wrong: one message, the right exit code, nothing lost.
namespace passel::e2e {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using std::chrono::seconds;
using Strings = std::vector<std::string>;

std::vector<std::string> ErrorLines(const ProcessResult& p) {
  std::vector<std::string> out;
  std::istringstream all(p.out + "\n" + p.err);
  for (std::string line; std::getline(all, line);) {
    if (line.find("passel: error:") != std::string::npos) out.push_back(line);
  }
  return out;
}

// Ended by itself with this exit code and one message that contains all of `parts`.
void ExpectError(const ProcessResult& p, int exit_code, const Strings& parts) {
  EXPECT_FALSE(p.timed_out);
  EXPECT_EQ(p.exit_code, exit_code) << p.err;
  const auto lines = ErrorLines(p);
  ASSERT_EQ(lines.size(), 1u) << p.err;
  for (const std::string& part : parts) {
    EXPECT_NE(lines[0].find(part), std::string::npos) << "expected " << part << " in " << lines[0];
  }
}

class BadInput : public testing::Test {
 protected:
  BadInput() { WriteFile(input_, kInput); }

  // Names of what lies in the directory beside the input.
  std::set<std::string> Left() const {
    std::set<std::string> out;
    for (const auto& entry : fs::directory_iterator(directory_.path())) {
      out.insert(entry.path().filename().string());
    }
    out.erase("input.jsonl");
    return out;
  }
  std::string File(const std::string& name) const { return directory_.File(name); }
  // passel run, with arguments in the place of the usual ones.
  ProcessResult Run(int ranks, const Strings& args) const {
    Strings all = {"run"};
    all.insert(all.end(), args.begin(), args.end());
    return RunProcess(PasselCommand({{ranks, all}}), seconds(120));
  }
  // The same with 3 ranks, an input and an output.
  ProcessResult RunThree(Strings args) const {
    args.insert(args.end(), {"-i", input_, "-o", File("out.jsonl"), "--run-dir", File("rd")});
    return Run(3, args);
  }
  // With the model too. Not where it is missing.
  ProcessResult RunModel(int ranks, const Strings& args) const {
    Strings all = ModelArgs();
    all.insert(all.end(), args.begin(), args.end());
    return Run(ranks, all);
  }
  static Strings ModelArgs() {
    return {"--config", PASSEL_SOURCE_DIR "/configs/local.textproto", "--set",
            "model.path=" + TestModel().value_or("")};
  }
  void ExpectNothingWritten() const {
    EXPECT_EQ(Left(), std::set<std::string>());
    EXPECT_EQ(ReadFile(input_), kInput);
  }

  static constexpr const char* kInput =
      "{\"custom_id\": \"a\", \"prompt\": \"The capital of France is\", \"max_tokens\": 3}\n";
  TempDirectory directory_;
  const std::string input_ = directory_.File("input.jsonl");
};

#define SKIP_WITHOUT_MODEL() \
  if (!TestModel()) GTEST_SKIP() << "no test model: tools/setup.sh fetches it"

TEST_F(BadInput, ConfigFieldsThatAreWrong) {
  struct Case {
    const char* text;
    Strings parts;
  };
  for (const Case& c : std::vector<Case>{
           {"cluster { }\nattention {\n  frob: 3\n}\n", {":3:", "frob", "Expected estimator, k"}},
           {"attention {\n  k: 17\n}\n", {":2:", "attention.k is 17", "expected 1 … 16"}},
           {"attention {\n  estimator: MAGIC\n}\n", {":2:", "MAGIC", "LSH, FULL"}},
           {"attention {\n  k: ten\n}\n", {":2:"}},
           {"attention {\n", {"config.textproto"}},
           {"model { path: \"m\" }\nengine { prefix_sharing: true }\n", {":2:", "only false"}}}) {
    const std::string config = File("config.textproto");
    WriteFile(config, c.text);
    const ProcessResult p = RunThree({"--config", config});
    Strings parts = c.parts;
    parts.push_back("config.textproto");
    ExpectError(p, 2, parts);
    EXPECT_EQ(Left(), (std::set<std::string>{"config.textproto"}));
  }
}

TEST_F(BadInput, OverridesThatAreWrong) {
  struct Case {
    const char* set;
    Strings parts;
  };
  for (const Case& c : std::vector<Case>{
           {"attention.frob=1", {"--set attention.frob=1", "unknown field 'frob'", "expected est"}},
           {"attention.k=0", {"--set attention.k=0", "attention.k is 0", "1 … 16"}},
           {"cluster.placement=ROUND", {"'ROUND'", "AUTO, REQUEST, HEAD or SEQUENCE"}},
           {"attention.k", {"--set attention.k", "expected section.field=value"}},
           {"host.block_tokens=1e3", {"'1e3'", "a whole number"}}}) {
    ExpectError(RunThree({"--set", "model.path=m", "--set", c.set}), 2, c.parts);
    ExpectNothingWritten();
  }
}

TEST_F(BadInput, AMissingConfigFile) {
  ExpectError(RunThree({"--config", File("none.textproto")}), 2, {"none.textproto", "No such"});
  ExpectNothingWritten();
}

TEST_F(BadInput, CommandLinesThatAreWrong) {
  ExpectError(RunThree({"--frob"}), 2, {"--frob"});
  ExpectError(Run(0, {"-i", input_, "-o", File("out.jsonl"), "--frob"}), 2, {"--frob"});
  ExpectError(Run(3, {"-i", input_}), 2, {"--output"});
  ExpectError(RunThree({"--role", "boss"}), 2, {"--role", "model"});
  ExpectError(RunProcess(PasselCommand({{0, {"frob"}}}), seconds(60)), 2, {"frob"});
  ExpectError(RunProcess(PasselCommand({{0, {}}}), seconds(60)), 2, {"subcommand"});
  ExpectError(RunThree({}), 2, {"model.path", "expected a model"});
  ExpectNothingWritten();
}

TEST_F(BadInput, AWrongFlagOnOneRankOnly) {
  SKIP_WITHOUT_MODEL();
  Strings good = {"run", "-i", input_, "-o", File("out.jsonl")};
  for (const std::string& a : ModelArgs()) good.push_back(a);
  Strings bad = good;
  bad.push_back("--frob");
  ExpectError(RunProcess(PasselCommand({{2, good}, {1, bad}}), seconds(60)), 2, {"--frob"});
  ExpectNothingWritten();
}

TEST_F(BadInput, ModelsThatAreNone) {
  const auto run = [&](const std::string& path, const Strings& parts) {
    ExpectError(RunThree({"--set", "model.path=" + path}), 3, parts);
    EXPECT_FALSE(fs::exists(File("out.jsonl")));
    EXPECT_FALSE(fs::exists(File("rd")));
  };
  run(File("none.gguf"), {"none.gguf", "no such file"});
  fs::create_directory(File("empty"));
  run(File("empty"), {File("empty")});
  WriteFile(File("empty.gguf"), "");
  run(File("empty.gguf"), {"empty.gguf"});
  std::string garbage = "GGUF";
  for (int i = 0; i < 100000; ++i) garbage += static_cast<char>(i * 7919 >> 3);
  WriteFile(File("garbage.gguf"), garbage);
  run(File("garbage.gguf"), {"garbage.gguf"});
  WriteFile(File("text.gguf"), "this is not a model, but long enough to be looked at");
  run(File("text.gguf"), {"text.gguf"});
}

TEST_F(BadInput, ATruncatedModel) {
  SKIP_WITHOUT_MODEL();
  std::ifstream model(*TestModel(), std::ios::binary);
  for (const size_t bytes : {size_t{20}, size_t{100000}, size_t{30} << 20}) {
    std::string part(bytes, '\0');
    model.seekg(0);
    ASSERT_TRUE(model.read(part.data(), static_cast<std::streamsize>(bytes)));
    WriteFile(File("part.gguf"), part);
    ExpectError(RunThree({"--set", "model.path=" + File("part.gguf")}), 3, {"part.gguf"});
    EXPECT_EQ(Left(), (std::set<std::string>{"part.gguf"}));
  }
}

TEST_F(BadInput, TooFewRanks) {
  SKIP_WITHOUT_MODEL();
  const Strings files = {"-i", input_, "-o", File("out.jsonl"), "--set", "cluster.model_ranks=3"};
  ExpectError(RunModel(2, files), 5, {"2 ranks", "expected at least 3", "cluster.model_ranks"});
  ExpectError(RunModel(0, files), 5, {"1 rank;", "expected at least 3"});
  ExpectNothingWritten();
}

TEST_F(BadInput, RanksThatDisagree) {
  SKIP_WITHOUT_MODEL();
  Strings first = {"run", "-i", input_, "-o", File("out.jsonl")};
  for (const std::string& a : ModelArgs()) first.push_back(a);
  const auto with = [&](const Strings& more) {
    Strings out = first;
    out.insert(out.end(), more.begin(), more.end());
    return out;
  };
  const auto run = [](const std::vector<Part>& parts) {
    return RunProcess(PasselCommand(parts), seconds(60));
  };
  ExpectError(run({{2, first}, {1, with({"--set", "attention.k=9"})}}), 2,
              {"config of rank 2", "differs from rank 0", "expected the same"});
  ExpectError(run({{1, with({"--role", "model"})}, {2, first}}), 2,
              {"ranks 1 and 2 started without --role"});
  ExpectError(run({{1, with({"--role", "host"})}, {1, with({"--role", "model"})}}), 2,
              {"rank 0 started with --role host", "expected the model ranks first"});
  ExpectNothingWritten();
}

TEST_F(BadInput, SettingsThatTheModelRefuses) {
  SKIP_WITHOUT_MODEL();
  ExpectError(
      RunModel(3, {"-i", input_, "-o", File("out.jsonl"), "--set", "attention.dense_layers=99"}), 2,
      {"attention.dense_layers", "99", "30 layers"});
  ExpectNothingWritten();
}

TEST_F(BadInput, OutputThatIsTheInput) {
  SKIP_WITHOUT_MODEL();
  ExpectError(RunModel(3, {"-i", input_, "-o", input_}), 4, {input_, "is the input file"});
  fs::create_symlink(input_, File("link"));
  ExpectError(RunModel(3, {"-i", input_, "-o", File("link"), "--resume"}), 4, {"is the input"});
  EXPECT_EQ(ReadFile(input_), kInput);
}

TEST_F(BadInput, FilesThatCannotBeOpened) {
  SKIP_WITHOUT_MODEL();
  const auto run = [&](const std::string& in, const std::string& out, const Strings& more = {}) {
    Strings args = {"-i", in, "-o", out};
    args.insert(args.end(), more.begin(), more.end());
    return RunModel(3, args);
  };
  ExpectError(run(input_, "/nonexistent/x"), 4, {"output /nonexistent/x", "No such file"});
  ExpectError(run(input_, directory_.path().string()), 4, {"output", "directory"});
  ExpectError(run(input_, "/dev/null"), 4, {"output /dev/null", "expected a regular file"});
  ExpectError(run(File("none.jsonl"), File("out.jsonl")), 4, {"input", "none.jsonl", "No such"});
  ExpectError(run(directory_.path().string(), File("out.jsonl")), 4, {"input", "directory"});
  ExpectError(run(input_, File("out.jsonl"), {"--run-dir", input_ + "/rd"}), 4,
              {"run directory", "input.jsonl/rd"});
  ExpectNothingWritten();
}

TEST_F(BadInput, ExistingResultsWithoutResume) {
  SKIP_WITHOUT_MODEL();
  const std::string content = "{\"custom_id\": \"old\"}\n{\"custom_id\": \"to";
  WriteFile(File("out.jsonl"), content);
  ExpectError(RunModel(3, {"-i", input_, "-o", File("out.jsonl")}), 4, {"out.jsonl", "--resume"});
  EXPECT_EQ(ReadFile(File("out.jsonl")), content);
}

TEST_F(BadInput, ResumingAForeignFile) {
  SKIP_WITHOUT_MODEL();
  const std::string content = "{\"custom_id\": \"old\"}\nmy diary\n";
  WriteFile(File("out.jsonl"), content);
  ExpectError(RunModel(3, {"-i", input_, "-o", File("out.jsonl"), "--resume"}), 4,
              {"out.jsonl:2:", "not a result of ours"});
  EXPECT_EQ(ReadFile(File("out.jsonl")), content);
}

// Error lines of single requests; the others are answered.
TEST_F(BadInput, RequestsThatAreWrong) {
  SKIP_WITHOUT_MODEL();
  std::string words;
  for (int i = 0; i < 9000; ++i) words += "word ";
  WriteFile(input_, std::string(kInput) + "{oops\n\n[1]\n" +
                        json{{"custom_id", "a"}, {"prompt", "again"}}.dump() + "\n" +
                        json{{"custom_id", "long"}, {"prompt", words}}.dump() + "\n" +
                        json{{"custom_id", "hot"}, {"prompt", "x"}, {"temperature", -1}}.dump() +
                        "\n" + json{{"custom_id", "ids"}, {"prompt", {1, 60000}}}.dump() + "\n" +
                        json{{"custom_id", "none"}}.dump() + "\n" +
                        json{{"custom_id", "last"}, {"prompt", "Hi"}, {"max_tokens", 2}}.dump());
  for (const int hosts : {0, 2}) {
    Job job;
    job.hosts = hosts;
    job.name = "run" + std::to_string(hosts);
    const JobResult result = RunJobOk(directory_, job);
    EXPECT_EQ(ErrorLines(result.process).size(), 0u);
    ASSERT_EQ(result.lines.size(), 9u);
    std::map<std::string, std::string> errors;
    int answered = 0;
    for (const json& line : result.lines) {
      if (line["error"].is_null()) {
        ++answered;
        continue;
      }
      EXPECT_EQ(line["response"]["status_code"], 400);
      errors[line["custom_id"].get<std::string>()] = line["error"]["message"].get<std::string>();
    }
    EXPECT_EQ(answered, 2);
    for (const auto& [id, part] : std::map<std::string, std::string>{
             {"line-2", "line 2: expected one JSON object"},
             {"line-4", "line 4: expected one JSON object"},
             {"a", "line 5: custom_id \"a\" was used before"},
             {"long", "line 6: the prompt has 9"},
             {"hot", "line 7: temperature: expected a number from 0 to 100"},
             {"ids", "line 8: prompt[1]: expected a token id below 49152"},
             {"none", "line 9: body: expected either prompt or messages"}}) {
      EXPECT_NE(errors[id].find(part), std::string::npos) << id << ": " << errors[id];
    }
    EXPECT_EQ(result.Usage("last")["completion_tokens"], 2);
    EXPECT_EQ(result.summary["requests_ok"], 2);
    EXPECT_EQ(result.summary["requests_failed"], 7);
    EXPECT_EQ(result.summary["exit_code"], 0);
  }
}

TEST_F(BadInput, ARequestThatDoesNotFitTheHosts) {
  SKIP_WITHOUT_MODEL();
  std::string words;
  for (int i = 0; i < 3000; ++i) words += "word ";
  Job job;
  job.hosts = 2;
  job.settings = {"host.memory_bytes=1000000"};
  job.requests = {{{"custom_id", "short"}, {"prompt", "Hi"}, {"max_tokens", 3}},
                  {{"custom_id", "large"}, {"prompt", words}, {"max_tokens", 3}},
                  {{"custom_id", "after"}, {"prompt", "Hello"}, {"max_tokens", 3}}};
  const JobResult result = RunJobOk(directory_, job);
  ASSERT_EQ(result.lines.size(), 3u);
  const json& large = result.by_id.at("large");
  EXPECT_EQ(large["response"]["status_code"], 507);
  EXPECT_NE(large["error"]["message"].get<std::string>().find("memory budget"), std::string::npos)
      << large.dump();
  EXPECT_EQ(result.Usage("short")["completion_tokens"], 3);
  EXPECT_EQ(result.Usage("after")["completion_tokens"], 3);
}

TEST_F(BadInput, MemoryThatDoesNotSuffice) {
  SKIP_WITHOUT_MODEL();
  // Too little for the weights, and too little for anything behind them.
  for (const std::string bytes : {"1000000", "275000000"}) {
    ExpectError(RunModel(1, {"-i", input_, "-o", File("out.jsonl"), "--set",
                             "gpu.memory_limit_bytes=" + bytes}),
                6, {"bytes"});
    ExpectNothingWritten();
  }
}

TEST_F(BadInput, ARequestThatDoesNotFitTheModelRank) {
  SKIP_WITHOUT_MODEL();
  Job job;
  job.settings = {"gpu.memory_limit_bytes=400000000", "engine.max_batch=4",
                  "engine.prefill_chunk=64"};
  job.requests = {{{"custom_id", "short"}, {"prompt", "Hi"}, {"max_tokens", 3}},
                  {{"custom_id", "long"}, {"prompt", "Hi"}, {"max_tokens", 8000}}};
  const JobResult result = RunJobOk(directory_, job);
  EXPECT_EQ(result.Usage("short")["completion_tokens"], 3);
  EXPECT_EQ(result.by_id.at("long")["response"]["status_code"], 507);
}

TEST_F(BadInput, ResumeRepairsATornLineAndDoesTheRest) {
  SKIP_WITHOUT_MODEL();
  Job job;
  job.hosts = 2;
  for (const char* id : {"a", "b", "a", "c"}) {
    job.requests.push_back({{"custom_id", id}, {"prompt", "Hi"}, {"max_tokens", 2}});
  }
  const JobResult whole = RunJobOk(directory_, job);
  ASSERT_EQ(whole.lines.size(), 4u);
  // As if killed while the last line was being written.
  const std::string content = ReadFile(File("run.jsonl"));
  const std::string cut = content.substr(0, content.size() - 30);
  const std::string kept = cut.substr(0, cut.rfind('\n') + 1);
  WriteFile(File("run.jsonl"), cut);
  job.extra_args = {"--resume"};
  RunJobOk(directory_, job);
  const std::string resumed = ReadFile(File("run.jsonl"));
  EXPECT_EQ(resumed.rfind(kept, 0), 0u);
  const auto lines = [](const std::string& text) {
    return std::count(text.begin(), text.end(), '\n');
  };
  EXPECT_EQ(lines(resumed), 4);
  std::multiset<std::string> ids;
  std::istringstream all(resumed);
  for (std::string line; std::getline(all, line);) ids.insert(json::parse(line)["custom_id"]);
  EXPECT_EQ(ids, (std::multiset<std::string>{"a", "a", "b", "c"}));
  RunJobOk(directory_, job);  // nothing is left to do
  EXPECT_EQ(ReadFile(File("run.jsonl")), resumed);
}

TEST_F(BadInput, HelpVersionAndDoctorNeedNoMpirun) {
  const auto run = [](const Strings& args) {
    return RunProcess(PasselCommand({{0, args}}), seconds(60));
  };
  for (const Strings& args :
       {Strings{"--help"}, Strings{"run", "--help"}, Strings{"bench", "-h"}}) {
    const ProcessResult p = run(args);
    EXPECT_EQ(p.exit_code, 0) << p.err;
    EXPECT_NE(p.out.find("--"), std::string::npos);
    EXPECT_EQ(p.err, "");
  }
  const ProcessResult version = run({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_EQ(version.out.rfind("passel ", 0), 0u) << version.out;
  const ProcessResult doctor = run({"doctor"});
  EXPECT_EQ(doctor.exit_code, 0) << doctor.err;
  EXPECT_NE(doctor.out.find("MPI"), std::string::npos) << doctor.out;
  EXPECT_EQ(ErrorLines(doctor).size(), 0u);
}

TEST_F(BadInput, ADryRunWritesNothing) {
  SKIP_WITHOUT_MODEL();
  const ProcessResult p =
      RunModel(3, {"-i", input_, "-o", File("out.jsonl"), "--run-dir", File("rd"), "--dry-run"});
  EXPECT_EQ(p.exit_code, 0) << p.err;
  EXPECT_NE(p.out.find("model"), std::string::npos) << p.out;
  EXPECT_NE(p.out.find("host"), std::string::npos);
  EXPECT_NE(p.out.find("block_tokens: 1024"), std::string::npos);
  ExpectNothingWritten();
}

}  // namespace
}  // namespace passel::e2e
