#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/engine/request_io.h"
#include "tests/engine/test_tokenizer.h"

namespace passel::engine {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Done = std::unordered_set<std::string>;

class JsonlFiles : public testing::Test {
 protected:
  JsonlFiles() {
    std::string name = (fs::temp_directory_path() / "passel-jsonl-XXXXXX").string();
    if (mkdtemp(name.data()) != nullptr) directory_ = name;
  }
  ~JsonlFiles() override { fs::remove_all(directory_); }

  std::string File(const std::string& name) const { return directory_ + "/" + name; }
  std::string Write(const std::string& name, const std::string& content) const {
    std::ofstream(File(name), std::ios::binary) << content;
    return File(name);
  }
  static std::string Read(const std::string& path) {
    std::ostringstream out;
    out << std::ifstream(path, std::ios::binary).rdbuf();
    return out.str();
  }
  JsonlSource Source(const std::string& content, Done done = {}) const {
    return {Write("in.jsonl", content), *tokenizer_, {1, 1000}, std::move(done)};
  }
  static std::vector<Request> All(JsonlSource& source) {
    std::vector<Request> out;
    while (auto r = source.Next()) out.push_back(std::move(*r));
    return out;
  }
  static Request Named(const std::string& id) {
    Request r;
    r.custom_id = id;
    r.prompt = {'p'};
    return r;
  }
  // Runs what must throw Error{kIo} naming `part`.
  static void ExpectIoError(const std::function<void()>& action, const std::string& part) {
    try {
      action();
      ADD_FAILURE() << "no error; expected one naming " << part;
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kIo) << e.what();
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }

  const std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
  std::string directory_;
};

TEST_F(JsonlFiles, SourceCountsSkipsBlanksAndKeepsGoingAfterBadLines) {
  JsonlSource source = Source(
      "{\"prompt\": \"a\"}\n\n  \t\r\n{oops\n{\"custom_id\": \"x\", \"prompt\": \"b\"}\r\n"
      "{\"prompt\": \"last, without a newline\"}");
  EXPECT_EQ(source.remaining(), 4u);
  EXPECT_FALSE(source.exhausted());
  const auto all = All(source);
  EXPECT_TRUE(source.exhausted());
  EXPECT_EQ(source.remaining(), 0u);
  ASSERT_EQ(all.size(), 4u);
  EXPECT_EQ(all[0].custom_id, "line-1");
  EXPECT_FALSE(all[0].error);
  EXPECT_EQ(all[1].custom_id, "line-4");
  ASSERT_TRUE(all[1].error);
  EXPECT_EQ(all[1].error->rfind("line 4: ", 0), 0u) << *all[1].error;
  EXPECT_EQ(all[2].custom_id, "x");
  EXPECT_FALSE(all[2].error);
  EXPECT_EQ(all[3].custom_id, "line-6");
  EXPECT_FALSE(source.Next());
}

TEST_F(JsonlFiles, ADuplicateIsTheLaterRequestsError) {
  JsonlSource source = Source(
      "{\"custom_id\": \"a\", \"prompt\": \"1\"}\n{\"custom_id\": \"line-3\", \"prompt\": \"2\"}\n"
      "{\"prompt\": \"3\"}\n{\"custom_id\": \"a\", \"prompt\": \"4\"}\n");
  const auto all = All(source);
  ASSERT_EQ(all.size(), 4u);
  EXPECT_FALSE(all[0].error);
  EXPECT_FALSE(all[1].error);
  ASSERT_TRUE(all[2].error);  // its default name is taken
  ASSERT_TRUE(all[3].error);
  EXPECT_EQ(*all[3].error, DuplicateError(4, "a"));
  EXPECT_NE(all[3].error->find("\"a\" was used before"), std::string::npos);
}

TEST_F(JsonlFiles, SourceLeavesOutWhatIsDone) {
  const std::string text =
      "{\"custom_id\": \"a\", \"prompt\": \"1\"}\n{\"prompt\": \"2\"}\n"
      "{\"custom_id\": \"a\", \"prompt\": \"3\"}\n";
  JsonlSource source = Source(text, {"a"});
  auto all = All(source);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].custom_id, "line-2");
  EXPECT_TRUE(all[1].error);
  JsonlSource rest = Source(text, {"line-2", DuplicateError(3, "a")});
  all = All(rest);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].custom_id, "a");
  EXPECT_FALSE(all[0].error);
}

TEST_F(JsonlFiles, SourceThatCannotBeRead) {
  ExpectIoError([&] { JsonlSource(File("none.jsonl"), *tokenizer_, {}, {}); }, "none.jsonl");
  ExpectIoError([&] { JsonlSource(directory_, *tokenizer_, {}, {}); }, directory_);
}

TEST_F(JsonlFiles, SinkAppendsEachResultAtOnce) {
  Done done;
  JsonlSink sink(File("out.jsonl"), false, *tokenizer_, &done);
  sink.Done(Named("a"), {});
  const std::string first = Read(File("out.jsonl"));
  EXPECT_EQ(std::count(first.begin(), first.end(), '\n'), 1);
  EXPECT_EQ(json::parse(first)["custom_id"], "a");
  sink.Failed(Named("b"), 400, "no");
  const std::string both = Read(File("out.jsonl"));
  EXPECT_EQ(both.rfind(first, 0), 0u);
  EXPECT_EQ(json::parse(both.substr(first.size()))["error"]["message"], "no");
  EXPECT_TRUE(done.empty());
}

TEST_F(JsonlFiles, SinkRefusesResultsWithoutResumeAndLeavesThemAlone) {
  const std::string content = "{\"custom_id\": \"a\"}\n{\"custom_id\": \"torn";
  const std::string path = Write("out.jsonl", content);
  Done done;
  ExpectIoError([&] { JsonlSink(path, false, *tokenizer_, &done); }, "--resume");
  EXPECT_EQ(Read(path), content);
  // An empty file has no results to lose.
  JsonlSink(Write("empty.jsonl", ""), false, *tokenizer_, &done);
}

TEST_F(JsonlFiles, ResumeCutsATornLineAndLearnsWhatIsDone) {
  const std::string whole =
      "{\"custom_id\": \"a\", \"error\": null}\n"
      "{\"custom_id\": \"b\", \"error\": {\"code\": 507, \"message\": \"too large\"}}\n";
  for (const std::string torn : {"", "{\"custom_id\": \"c\"}", "{", "\xff\xff"}) {
    const std::string path = Write("out.jsonl", whole + torn);
    Done done;
    JsonlSink sink(path, true, *tokenizer_, &done);
    EXPECT_EQ(done, (Done{"a", "b"}));
    EXPECT_EQ(Read(path), whole) << torn;
    sink.Done(Named("c"), {});
    const std::string after = Read(path);
    EXPECT_EQ(after.rfind(whole, 0), 0u);
    EXPECT_EQ(json::parse(after.substr(whole.size()))["custom_id"], "c");
  }
}

// The error of a duplicate may be on disk before the request that had the name first is done.
TEST_F(JsonlFiles, ResumeAfterADuplicatesErrorStillRunsTheFirst) {
  const std::string input =
      "{\"custom_id\": \"a\", \"prompt\": \"1\"}\n{\"custom_id\": \"a\", \"prompt\": \"2\"}\n";
  Done done;
  {
    JsonlSource source = Source(input);
    JsonlSink sink(File("out.jsonl"), false, *tokenizer_, &done);
    const auto all = All(source);
    sink.Failed(all[1], 400, *all[1].error);
  }
  JsonlSink sink(File("out.jsonl"), true, *tokenizer_, &done);
  JsonlSource source = Source(input, done);
  const auto all = All(source);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_FALSE(all[0].error);
  EXPECT_EQ(all[0].prompt, std::vector<int32_t>{'1'});
}

TEST_F(JsonlFiles, ResumeRefusesAForeignFileAndNamesTheLine) {
  for (const std::string second : {"not json", "[]", "{\"x\": 1}", "{\"custom_id\": 3}"}) {
    const std::string content = "{\"custom_id\": \"a\"}\n" + second + "\n{\"custom_id\": \"b\"}\n";
    const std::string path = Write("out.jsonl", content);
    Done done;
    ExpectIoError([&] { JsonlSink(path, true, *tokenizer_, &done); }, "out.jsonl:2: ");
    EXPECT_EQ(Read(path), content);
  }
}

TEST_F(JsonlFiles, PathsThatCannotBeWritten) {
  Done done;
  ExpectIoError([&] { JsonlSink("/nonexistent/x", false, *tokenizer_, &done); }, "/nonexistent/x");
  ExpectIoError([&] { JsonlSink(directory_, false, *tokenizer_, &done); }, directory_);
  const std::string fifo = File("fifo");
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  ExpectIoError([&] { JsonlSink(fifo, false, *tokenizer_, &done); }, "expected a regular file");
}

TEST_F(JsonlFiles, AnOutputMadeForAJobThatNeverStartedGoes) {
  Done done;
  { JsonlSink sink(File("new.jsonl"), false, *tokenizer_, &done); }
  EXPECT_FALSE(fs::exists(File("new.jsonl")));
  const std::string empty = Write("empty.jsonl", "");
  { JsonlSink sink(empty, false, *tokenizer_, &done); }
  EXPECT_TRUE(fs::exists(empty)) << "it was the user's";
  {
    JsonlSink sink(File("none.jsonl"), false, *tokenizer_, &done);
    sink.Started();
  }
  EXPECT_TRUE(fs::exists(File("none.jsonl"))) << "a job without requests has an empty result";
}

TEST_F(JsonlFiles, InputAndOutputMustDiffer) {
  const std::string in = Write("in.jsonl", "{}\n");
  fs::create_symlink(in, File("link.jsonl"));
  fs::create_hard_link(in, File("hard.jsonl"));
  for (const std::string& same :
       {in, directory_ + "/./in.jsonl", File("link.jsonl"), File("hard.jsonl")}) {
    ExpectIoError([&] { CheckDistinct(in, same); }, same);
  }
  CheckDistinct(in, File("other.jsonl"));
  CheckDistinct(in, Write("copy.jsonl", "{}\n"));
}

}  // namespace
}  // namespace passel::engine
