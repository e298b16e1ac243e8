#include <cmath>
#include <numbers>

#include "runtime/model/model_file.h"

namespace passel::model {
namespace {

// Llama 3.1's scaling: wavelengths short against the original context stay, long ones are
// stretched by `factor`, and in between the two are blended linearly in original_context / λ.
double Llama3Frequency(const RopeScaling& s, double frequency) {
  const double turns = static_cast<double>(s.original_context) * frequency / (2 * std::numbers::pi);
  if (turns > s.high_freq_factor) return frequency;
  if (turns < s.low_freq_factor) return frequency / s.factor;
  const double smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * frequency / s.factor + smooth * frequency;
}

}  // namespace

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  std::vector<float> out(static_cast<size_t>(config.head_dim / 2));
  for (size_t i = 0; i < out.size(); ++i) {
    double frequency = std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / config.head_dim);
    if (config.rope_scaling) {
      const RopeScaling& s = *config.rope_scaling;
      frequency = s.type == "llama3" ? Llama3Frequency(s, frequency) : frequency / s.factor;
    }
    if (!config.rope_factors.empty()) frequency /= static_cast<double>(config.rope_factors[i]);
    out[i] = static_cast<float>(frequency);
  }
  return out;
}

}  // namespace passel::model
