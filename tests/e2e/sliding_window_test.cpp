// A model with a sliding window: decoding past the window, in its ring of slots, gives what a
// prefill of the same tokens gives.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tests/e2e/token_checks.h"

namespace passel::e2e {
namespace {

using nlohmann::json;

constexpr uint32_t kWindow = 96;
// In float32: this model was not trained with a window, and single tokens of what it then writes
// hang on a rounding (bf16 of AMX: log-probabilities 0.5 apart at one position).
constexpr double kError = 0.02;

template <typename T>
void Put(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

// The test model's GGUF with a sliding window among its metadata. What is inserted is a multiple of
// the alignment, so that everything behind stays where the format wants it.
std::string WithWindow(const std::string& gguf) {
  constexpr uint32_t kUint32 = 4, kString = 8;
  std::string added;
  const std::string key = "llama.attention.sliding_window", filler = "x";
  Put<uint64_t>(&added, key.size());
  added += key;
  Put(&added, kUint32);
  Put(&added, kWindow);
  Put<uint64_t>(&added, filler.size());
  added += filler;
  Put(&added, kString);
  const uint64_t text = 96 - added.size() - sizeof(uint64_t);
  Put(&added, text);
  added.append(text, 'x');
  // Magic, version, tensor count, metadata count.
  constexpr size_t kCount = 16, kHeader = 24;
  std::string out = gguf.substr(0, kHeader) + added + gguf.substr(kHeader);
  uint64_t count = 0;
  std::memcpy(&count, &out[kCount], sizeof count);
  count += 2;
  std::memcpy(&out[kCount], &count, sizeof count);
  return out;
}

// A choice from its `first`th token on.
json From(json choice, int first) {
  json& content = choice["logprobs"]["content"];
  content.erase(content.begin(), content.begin() + first);
  return choice;
}

TEST(SlidingWindow, DecodingGivesWhatPrefillGives) {
  if (!TestModel()) GTEST_SKIP() << "the test model is absent";
  setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
  const TempDirectory directory;
  const std::string model = directory.File("window.gguf");
  WriteFile(model, WithWindow(ReadFile(*TestModel())));
  Job job;
  job.settings = {"model.path=" + model, "engine.prefill_chunk=64", "gpu.backend=CPU"};

  constexpr int kTokens = 150;  // the ring is written more than once over
  json prompt = json::array();
  for (int i = 0; i < 40; ++i) prompt.push_back(1000 + 37 * i);
  json request = Greedy("all", "", kTokens);
  request["body"]["prompt"] = prompt;
  job.requests = {request};
  job.name = "all";
  const JobResult all = RunJobOk(directory, job);
  const json choice = all.Choice("all");
  ASSERT_EQ(choice["token_ids"].size(), static_cast<size_t>(kTokens));

  job.requests.clear();
  const int starts[] = {1, 60, 100, 130};
  for (const int start : starts) {
    json longer = prompt;
    for (int i = 0; i < start; ++i) longer.push_back(choice["token_ids"][static_cast<size_t>(i)]);
    json later = Greedy(Numbered("from", start), "", kTokens - start);
    later["body"]["prompt"] = longer;
    job.requests.push_back(later);
  }
  // In parts, which read the window before them from the device.
  job.settings.push_back("engine.prefill_part=70");
  job.name = "later";
  job.hosts = 1;  // has nothing to do
  const JobResult later = RunJobOk(directory, job);
  int compared = 0;
  for (const int start : starts) {
    SCOPED_TRACE(start);
    compared += ExpectSameTokens(From(choice, start), later.Choice(Numbered("from", start)), kError)
                    .compared;
  }
  EXPECT_GE(compared, 100);
  EXPECT_EQ(later.summary["hosts"][0]["kv_bytes"], 0);
  EXPECT_NE(later.process.err.find("in parts of 70 tokens"), std::string::npos);

  // The window decides: the model without it says something else.
  job.settings = {"engine.prefill_chunk=64", "gpu.backend=CPU"};
  job.requests = {request};
  job.name = "no_window";
  job.hosts = 0;
  const json other = RunJobOk(directory, job).Choice("all");
  EXPECT_EQ(other["token_ids"][0], choice["token_ids"][0]) << "within the window they are the same";
  EXPECT_NE(other["token_ids"], choice["token_ids"]);
}

}  // namespace
}  // namespace passel::e2e
