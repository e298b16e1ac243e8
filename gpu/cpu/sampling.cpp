// CpuDevice::Sample.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gpu/cpu/cpu_device.h"
#include "runtime/base/error.h"

namespace passel::gpu::cpu {
namespace {

// −1: a NaN.
int32_t Likeliest(std::span<const float> row) {
  size_t best = 0;
  for (size_t j = 0; j < row.size(); ++j) {
    if (std::isnan(row[j])) return -1;
    if (row[j] > row[best]) best = j;
  }
  return static_cast<int32_t>(best);
}

// Sets the weight of all but the smallest set of likeliest tokens that has top_p of it to 0.
void KeepTop(std::span<const float> row, double top_p, std::vector<double>& weights) {
  std::vector<int32_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = row[static_cast<size_t>(a)], y = row[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  const double enough = top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  double kept = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    double& weight = weights[static_cast<size_t>(order[i])];
    if (i > 0 && kept >= enough) weight = 0;
    kept += weight;
  }
}

int32_t SampleRow(std::span<const float> row, const SamplingRule& rule) {
  const int32_t best = Likeliest(row);
  if (best < 0 || rule.temperature <= 0) return best;
  const double max = row[static_cast<size_t>(best)];
  if (max == -INFINITY) return best;
  std::vector<double> weights;
  weights.reserve(row.size());
  for (const float x : row) weights.push_back(std::exp((x - max) / rule.temperature));
  if (rule.top_p < 1) KeepTop(row, rule.top_p, weights);
  double rest = rule.draw * std::accumulate(weights.begin(), weights.end(), 0.0);
  int32_t chosen = best;
  for (size_t j = 0; j < weights.size(); ++j) {
    if (weights[j] == 0) continue;
    chosen = static_cast<int32_t>(j);
    rest -= weights[j];
    if (rest < 0) break;
  }
  return chosen;
}

}  // namespace

void CpuDevice::Sample(Tensor x, std::span<const SamplingRule> rules, std::span<int32_t> ids) {
  Check(x.type == DType::kF32 && x.cols > 0 && static_cast<int64_t>(ids.size()) == x.rows &&
            rules.size() == ids.size(),
        "Sample: shapes disagree");
  ForRows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const std::span row(static_cast<const float*>(x.Rows(i, 1).data),
                          static_cast<size_t>(x.cols));
      ids[static_cast<size_t>(i)] = SampleRow(row, rules[static_cast<size_t>(i)]);
    }
  });
}

}  // namespace passel::gpu::cpu
