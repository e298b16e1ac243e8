#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "runtime/base/random.h"

namespace passel::engine {
namespace {

int32_t Argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

bool Better(std::span<const float> logits, int32_t a, int32_t b) {
  const float x = logits[static_cast<size_t>(a)];
  const float y = logits[static_cast<size_t>(b)];
  return x != y ? x > y : a < b;
}

}  // namespace

gpu::SamplingRule RuleFor(const SamplingParams& params, uint64_t position) {
  const uint64_t key[2] = {params.seed, position};
  return {params.temperature, params.top_p, Random(HashBytes(key, sizeof key)).Uniform()};
}

PositionLogprobs ComputeLogprobs(std::span<const float> logits, int32_t chosen, int32_t top) {
  const double max = logits[static_cast<size_t>(Argmax(logits))];
  double total = 0;
  for (const float x : logits) total += std::exp(x - max);
  const double log_total = max + std::log(total);
  auto entry = [&](int32_t id) {
    return TokenLogprob{id, static_cast<float>(logits[static_cast<size_t>(id)] - log_total)};
  };
  PositionLogprobs out{entry(chosen)};
  const size_t count = std::min(static_cast<size_t>(std::max(top, 0)), logits.size());
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(count), order.end(),
                    [&](int32_t a, int32_t b) { return Better(logits, a, b); });
  for (size_t i = 0; i < count; ++i) out.push_back(entry(order[i]));
  return out;
}

size_t FindStop(const std::string& text, size_t added, std::span<const std::string> stops) {
  size_t first = std::string::npos;
  for (const std::string& stop : stops) {
    const size_t from = added < stop.size() ? 0 : added - stop.size() + 1;
    first = std::min(first, text.find(stop, from));
  }
  return first;
}

}  // namespace passel::engine
