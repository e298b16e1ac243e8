#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

// The operations of a decoder layer in float64, for tests to compare with.
namespace passel::gpu {

using Doubles = std::vector<double>;

// x Wᵀ of what bf16 holds, in float64.
inline Doubles Product(const Doubles& x, const std::vector<float>& w, int64_t n, int64_t in) {
  const int64_t out = static_cast<int64_t>(w.size()) / in;
  Doubles y(static_cast<size_t>(n * out));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (int64_t j = 0; j < in; ++j) {
        sum += x[static_cast<size_t>(i * in + j)] *
               static_cast<double>(w[static_cast<size_t>(o * in + j)]);
      }
      y[static_cast<size_t>(i * out + o)] = sum;
    }
  }
  return y;
}

inline Doubles Norm(const Doubles& x, const std::vector<float>& weight, double eps) {
  Doubles y(x.size());
  const size_t cols = weight.size();
  for (size_t row = 0; row < x.size(); row += cols) {
    double squares = 0;
    for (size_t j = 0; j < cols; ++j) squares += x[row + j] * x[row + j];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + eps);
    for (size_t j = 0; j < cols; ++j) {
      y[row + j] = x[row + j] * scale * static_cast<double>(weight[j]);
    }
  }
  return y;
}

inline Doubles Silu(const Doubles& gate_up, int64_t ffn) {
  Doubles y;
  for (size_t row = 0; row < gate_up.size(); row += static_cast<size_t>(2 * ffn)) {
    for (size_t j = row; j < row + static_cast<size_t>(ffn); ++j) {
      y.push_back(gate_up[j] / (1 + std::exp(-gate_up[j])) * gate_up[j + static_cast<size_t>(ffn)]);
    }
  }
  return y;
}

// RoPE of the first `turned` of `cols` columns: heads of head_dim, element i with i + head_dim / 2.
inline void Turn(Doubles* x, int64_t cols, int64_t turned, int64_t head_dim,
                 const std::vector<float>& inv_freq, const std::vector<int64_t>& positions) {
  const int64_t half = head_dim / 2;
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int64_t pair = 0; pair < turned / 2; ++pair) {
      const int64_t i = pair % half;
      const double angle = static_cast<double>(positions[row]) *
                           static_cast<double>(inv_freq[static_cast<size_t>(i)]);
      double& a =
          (*x)[row * static_cast<size_t>(cols) + static_cast<size_t>(pair / half * head_dim + i)];
      double& b = *(&a + half);
      const double first = a * std::cos(angle) - b * std::sin(angle);
      b = b * std::cos(angle) + a * std::sin(angle);
      a = first;
    }
  }
}

// ‖got − exact‖ / ‖exact‖; NaN where `got` has one.
inline double RelativeError(const std::vector<float>& got, const Doubles& exact) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - exact[i], 2);
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference / size);
}

}  // namespace passel::gpu
