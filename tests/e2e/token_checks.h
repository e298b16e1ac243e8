#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/e2e/run_passel.h"

namespace passel::e2e {

// Settings under which every layer's offloaded tokens go through the host ranks, and none is
// attended exactly for being few.
std::vector<std::string> AllThroughHosts(const std::string& estimator);

// `base` and `more` in one list.
std::vector<std::string> With(std::vector<std::string> base, const std::vector<std::string>& more);

// `prefix` followed by the number.
std::string Numbered(std::string prefix, int number);

// English prose of `sentences` sentences, about 14 tokens each; another text for each seed.
std::string Prose(int sentences, int seed);

// A greedy completion that returns token ids and the two best log-probabilities.
nlohmann::json Greedy(const std::string& id, const std::string& prompt, int max_tokens);

struct Agreement {
  int compared = 0;          // positions whose contexts were the same
  double largest_error = 0;  // of a log-probability, over them
};

// Holds `other` to `baseline` (choices of the same request with logprobs): at each position where
// all tokens before agree, the chosen token's log-probability differs by at most `error`, and the
// token may differ only where the baseline's two best are closer than 2·error. Positions behind
// such a fork are not compared: their contexts differ.
Agreement ExpectSameTokens(const nlohmann::json& baseline, const nlohmann::json& other,
                           double error);

}  // namespace passel::e2e
