#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/random.h"
#include "runtime/model/model_file.h"

namespace passel::model {

// A model of random weights, of any shape, that is no file: element (row, column) of a weight is a
// function of its name and place. With a float64 forward pass to compare against.
class RandomModel final : public ModelFile {
 public:
  RandomModel(ModelConfig config, uint64_t seed) : config_(std::move(config)), seed_(seed) {}

  const ModelConfig& config() const override { return config_; }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bf16* out) const override {
    for (int64_t i = 0; i < rows * cols; ++i) {
      out[i] = ToBf16(Weight(id, row + i / cols, col + i % cols));
    }
  }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            float* out) const override {
    for (int64_t i = 0; i < rows * cols; ++i) {
      out[i] = Weight(id, row + i / cols, col + i % cols);
    }
  }
  const TokenizerData& tokenizer() const override { return tokenizer_; }
  uint64_t weight_bytes() const override { return 0; }

  // Logits of the last position, all in float64.
  std::vector<double> Forward(std::span<const int32_t> ids) const {
    const int64_t hidden = config_.hidden, dim = config_.head_dim;
    const auto inv_freq = RopeInverseFrequencies(config_);
    std::vector<std::vector<double>> x;
    for (const int32_t id : ids) x.push_back(Row({WeightKind::kTokenEmbedding}, id, hidden));
    for (int32_t l = 0; l < config_.layers; ++l) {
      std::vector<std::vector<double>> q, k, v;
      for (size_t i = 0; i < x.size(); ++i) {
        const auto normed = Norm(x[i], {WeightKind::kAttnNorm, l});
        auto query = Apply({WeightKind::kQ, l}, config_.heads * dim, normed);
        auto key = Apply({WeightKind::kK, l}, config_.kv_heads * dim, normed);
        v.push_back(Apply({WeightKind::kV, l}, config_.kv_heads * dim, normed));
        if (config_.qkv_bias) {
          for (const auto& [values, kind] :
               {std::pair(&query, WeightKind::kQBias), std::pair(&key, WeightKind::kKBias),
                std::pair(&v.back(), WeightKind::kVBias)}) {
            Add(*values, Row({kind, l}, 0, static_cast<int64_t>(values->size())));
          }
        }
        if (config_.qk_norm) {
          query = HeadNorm(query, {WeightKind::kQNorm, l});
          key = HeadNorm(key, {WeightKind::kKNorm, l});
        }
        q.push_back(Rotate(query, i, inv_freq));
        k.push_back(Rotate(key, i, inv_freq));
      }
      for (size_t i = 0; i < x.size(); ++i) {
        Add(x[i], Apply({WeightKind::kO, l}, hidden, Attend(q[i], k, v, i)));
        const auto normed = Norm(x[i], {WeightKind::kFfnNorm, l});
        auto gate = Apply({WeightKind::kGate, l}, config_.ffn, normed);
        const auto up = Apply({WeightKind::kUp, l}, config_.ffn, normed);
        for (size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1 + std::exp(-gate[j]));
        Add(x[i], Apply({WeightKind::kDown, l}, hidden, gate));
      }
    }
    const auto last = Norm(x.back(), {WeightKind::kOutputNorm});
    return Apply({WeightKind::kOutput}, config_.vocab, last);
  }

 private:
  using Vector = std::vector<double>;

  // What bf16 holds, so that storing loses nothing.
  float Weight(WeightId id, int64_t row, int64_t col) const {
    if (id.kind == WeightKind::kOutput && config_.tied_embeddings) {
      id.kind = WeightKind::kTokenEmbedding;
    }
    const uint64_t name[] = {static_cast<uint64_t>(id.kind), static_cast<uint64_t>(id.layer),
                             static_cast<uint64_t>(row), static_cast<uint64_t>(col)};
    Random random(HashBytes(name, sizeof(name), seed_));
    const double uniform = 2 * random.Uniform() - 1;
    const bool norm = id.kind == WeightKind::kAttnNorm || id.kind == WeightKind::kFfnNorm ||
                      id.kind == WeightKind::kOutputNorm || id.kind == WeightKind::kQNorm ||
                      id.kind == WeightKind::kKNorm;
    const double value =
        norm ? 1 + 0.3 * uniform : uniform * (id.kind == WeightKind::kTokenEmbedding ? 1.5 : 0.2);
    return ToFloat(ToBf16(static_cast<float>(value)));
  }

  Vector Row(WeightId id, int64_t row, int64_t cols) const {
    Vector values;
    for (int64_t j = 0; j < cols; ++j) values.push_back(static_cast<double>(Weight(id, row, j)));
    return values;
  }

  Vector Apply(WeightId id, int64_t rows, const Vector& x) const {
    Vector y;
    for (int64_t i = 0; i < rows; ++i) {
      double sum = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        sum += x[j] * static_cast<double>(Weight(id, i, static_cast<int64_t>(j)));
      }
      y.push_back(sum);
    }
    return y;
  }

  Vector Norm(const Vector& x, WeightId id) const {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) +
                                       static_cast<double>(config_.norm_eps));
    Vector y = Row(id, 0, static_cast<int64_t>(x.size()));
    for (size_t j = 0; j < y.size(); ++j) y[j] *= x[j] * scale;
    return y;
  }

  Vector HeadNorm(const Vector& x, WeightId id) const {
    Vector y;
    for (auto head = x.begin(); head != x.end(); head += config_.head_dim) {
      const Vector normed = Norm(Vector(head, head + config_.head_dim), id);
      y.insert(y.end(), normed.begin(), normed.end());
    }
    return y;
  }

  Vector Rotate(const Vector& x, size_t position, const std::vector<float>& inv_freq) const {
    const auto dim = static_cast<size_t>(config_.head_dim), half = dim / 2;
    Vector y = x;
    for (size_t c = 0; c < x.size(); ++c) {
      const size_t j = c % dim;
      const double angle = static_cast<double>(position) * static_cast<double>(inv_freq[j % half]);
      const double other = j < half ? -x[c + half] : x[c - half];
      y[c] = x[c] * std::cos(angle) + other * std::sin(angle);
    }
    return y;
  }

  Vector Attend(const Vector& q, const std::vector<Vector>& k, const std::vector<Vector>& v,
                size_t last) const {
    const auto dim = static_cast<size_t>(config_.head_dim);
    Vector out(q.size());
    for (size_t h = 0; h < static_cast<size_t>(config_.heads); ++h) {
      const size_t kv = h / static_cast<size_t>(config_.heads / config_.kv_heads);
      double den = 0;
      Vector num(dim);
      for (size_t t = 0; t <= last; ++t) {
        double dot = 0;
        for (size_t j = 0; j < dim; ++j) dot += q[h * dim + j] * k[t][kv * dim + j];
        const double w = std::exp(dot / std::sqrt(static_cast<double>(dim)));
        den += w;
        for (size_t j = 0; j < dim; ++j) num[j] += w * v[t][kv * dim + j];
      }
      for (size_t j = 0; j < dim; ++j) out[h * dim + j] = num[j] / den;
    }
    return out;
  }

  static void Add(Vector& x, const Vector& y) {
    for (size_t j = 0; j < x.size(); ++j) x[j] += y[j];
  }

  ModelConfig config_;
  uint64_t seed_;
  TokenizerData tokenizer_;
};

}  // namespace passel::model
