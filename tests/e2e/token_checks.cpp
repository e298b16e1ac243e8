#include "tests/e2e/token_checks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

namespace passel::e2e {

using nlohmann::json;

std::vector<std::string> With(std::vector<std::string> base, const std::vector<std::string>& more) {
  base.insert(base.end(), more.begin(), more.end());
  return base;
}

std::vector<std::string> AllThroughHosts(const std::string& estimator) {
  return {"attention.estimator=" + estimator, "attention.exact_below=0", "attention.window=64",
          "attention.no_dense_layers=true", "host.block_tokens=256"};
}

std::string Numbered(std::string prefix, int number) {
  return prefix.append(std::to_string(number));
}

std::string Prose(int sentences, int seed) {
  static constexpr std::array<const char*, 8> kWho = {
      "The old lighthouse keeper", "A young botanist",     "My grandmother",
      "The ship's engineer",       "An unknown composer",  "The village doctor",
      "A travelling merchant",     "The railway inspector"};
  static constexpr std::array<const char*, 8> kDid = {"wrote a long letter about",
                                                      "spent eleven years studying",
                                                      "finally understood",
                                                      "refused to speak of",
                                                      "sold three paintings of",
                                                      "dreamt every night of",
                                                      "measured, with patience and care,",
                                                      "told the children about"};
  static constexpr std::array<const char*, 8> kWhat = {
      "the northern harbour",      "a clock without hands", "the flood of 1874",
      "the migration of swallows", "an abandoned mine",     "the bridge over the river Arne",
      "a garden behind the walls", "the price of salt"};
  static constexpr std::array<const char*, 8> kWhen = {
      "before the winter came",   "while the others slept",  "in the spring of that year",
      "although nobody asked",    "after the market closed", "when the rain had stopped",
      "on the last day of March", "and never returned"};
  std::mt19937 random(static_cast<unsigned>(seed));
  auto pick = [&](const auto& from) { return std::string(from[random() % from.size()]); };
  std::string text;
  for (int i = 0; i < sentences; ++i) {
    text += pick(kWho) + " " + pick(kDid) + " " + pick(kWhat) + " " + pick(kWhen) + ". ";
  }
  return text + "In short,";
}

json Greedy(const std::string& id, const std::string& prompt, int max_tokens) {
  return {{"custom_id", id},
          {"method", "POST"},
          {"url", "/v1/completions"},
          {"body",
           {{"prompt", prompt},
            {"max_tokens", max_tokens},
            {"temperature", 0},
            {"ignore_eos", true},
            {"logprobs", 2},
            {"return_token_ids", true}}}};
}

Agreement ExpectSameTokens(const json& baseline, const json& other, double error) {
  Agreement agreement;
  if (baseline.is_null() || other.is_null()) {
    ADD_FAILURE() << "nothing to compare";
    return agreement;
  }
  const json& expected = baseline["logprobs"]["content"];
  const json& got = other["logprobs"]["content"];
  EXPECT_EQ(expected.size(), got.size());
  for (size_t i = 0; i < std::min(expected.size(), got.size()); ++i) {
    const json& best = expected[i]["top_logprobs"];
    const double gap = best[0]["logprob"].get<double>() - best[1]["logprob"].get<double>();
    ++agreement.compared;
    if (expected[i]["id"] != got[i]["id"]) {
      EXPECT_LT(gap, 2 * error) << "position " << i << ": expected " << expected[i].dump()
                                << ", got " << got[i].dump();
      break;
    }
    const double off =
        std::abs(expected[i]["logprob"].get<double>() - got[i]["logprob"].get<double>());
    agreement.largest_error = std::max(agreement.largest_error, off);
    EXPECT_LE(off, error) << "position " << i << ", top-2 gap " << gap;
  }
  return agreement;
}

}  // namespace passel::e2e
