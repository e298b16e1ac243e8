#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "runtime/base/error.h"

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

int32_t SampleToken(std::span<const float> logits, const SamplingParams& params,
                    uint64_t position) {
  Check(!logits.empty(), "sampling from no logits");
  for (const float x : logits) Check(!std::isnan(x), "a logit is NaN");
  const int32_t best = Argmax(logits);
  if (params.temperature <= 0) return best;

  const double max = logits[static_cast<size_t>(best)];
  std::vector<double> weight(logits.size());
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    weight[i] = std::exp((logits[i] - max) / params.temperature);
    total += weight[i];
  }
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  double kept = total;
  if (params.top_p < 1.0) {
    // The smallest set of most likely tokens whose probability reaches top_p.
    std::sort(order.begin(), order.end(),
              [&](int32_t a, int32_t b) { return Better(logits, a, b); });
    kept = 0;
    size_t count = 0;
    while (count < order.size() && (count == 0 || kept < params.top_p * total)) {
      kept += weight[static_cast<size_t>(order[count++])];
    }
    order.resize(count);
  }
  const uint64_t key[2] = {params.seed, position};
  double target = Random(HashBytes(key, sizeof key)).Uniform() * kept;
  for (const int32_t id : order) {
    target -= weight[static_cast<size_t>(id)];
    if (target < 0) return id;
  }
  return order.back();
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
