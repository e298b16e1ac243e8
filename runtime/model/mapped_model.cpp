#include "runtime/model/mapped_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/mapped_file.h"

namespace passel::model {
namespace {

constexpr size_t kKinds = static_cast<size_t>(WeightKind::kKNorm) + 1;

void Convert(const float* in, int64_t count, float* out) {
  std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
}
void Convert(const float* in, int64_t count, bf16* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = ToBf16(in[i]);
}

// The file's row of Hugging Face's row `row`.
int64_t FileRow(const WeightView& view, int64_t row) {
  if (view.interleaved_head_dim == 0) return row;
  const int64_t dim = view.interleaved_head_dim, half = dim / 2;
  const int64_t in_head = row % dim;
  return row - in_head + 2 * (in_head % half) + in_head / half;
}

int64_t RowBytes(const WeightView& view) {
  const ElementLayout& layout = LayoutOf(view.type);
  return view.cols / layout.block * layout.bytes;
}

// Columns [col, col + cols) of one row.
template <typename Out>
void ReadRow(const WeightView& view, const ElementLayout& layout, const uint8_t* row_data,
             int64_t col, int64_t cols, Out* out) {
  if constexpr (std::is_same_v<Out, bf16>) {
    if (view.type == ElementType::kBf16) {
      std::memcpy(out, row_data + 2 * col, static_cast<size_t>(cols) * sizeof(bf16));
      return;
    }
  }
  std::array<float, 4 * kMaxBlock> buffer;
  const int64_t chunk = static_cast<int64_t>(buffer.size()) / layout.block;  // blocks at a time
  const int64_t last_block = (col + cols - 1) / layout.block;
  int64_t done = 0;
  for (int64_t b = col / layout.block; b <= last_block; b += chunk) {
    const int64_t blocks = std::min(chunk, last_block - b + 1);
    Dequantize(view.type, row_data + b * layout.bytes, blocks, buffer.data());
    const int64_t skip = std::max<int64_t>(0, col - b * layout.block);
    const int64_t count = std::min(blocks * layout.block - skip, cols - done);
    Convert(buffer.data() + skip, count, out + done);
    done += count;
  }
}

}  // namespace

std::string WeightName(WeightId id) {
  static constexpr std::array<std::string_view, kKinds> kNames = {"token embedding",
                                                                  "output norm",
                                                                  "output",
                                                                  "attention norm",
                                                                  "q",
                                                                  "k",
                                                                  "v",
                                                                  "o",
                                                                  "ffn norm",
                                                                  "gate",
                                                                  "up",
                                                                  "down",
                                                                  "q bias",
                                                                  "k bias",
                                                                  "v bias",
                                                                  "q norm",
                                                                  "k norm"};
  const auto kind = static_cast<size_t>(id.kind);
  if (id.kind <= WeightKind::kOutput) return std::string(kNames[kind]);
  return fmt::format("layer {} {}", id.layer, kNames[kind]);
}

std::vector<ExpectedWeight> ExpectedWeights(const ModelConfig& c) {
  const int64_t q = int64_t{c.heads} * c.head_dim, kv = int64_t{c.kv_heads} * c.head_dim;
  std::vector<ExpectedWeight> out = {{{WeightKind::kTokenEmbedding, 0}, c.vocab, c.hidden},
                                     {{WeightKind::kOutputNorm, 0}, 1, c.hidden}};
  if (!c.tied_embeddings) out.push_back({{WeightKind::kOutput, 0}, c.vocab, c.hidden});
  for (int32_t l = 0; l < c.layers; ++l) {
    out.push_back({{WeightKind::kAttnNorm, l}, 1, c.hidden});
    out.push_back({{WeightKind::kQ, l}, q, c.hidden});
    out.push_back({{WeightKind::kK, l}, kv, c.hidden});
    out.push_back({{WeightKind::kV, l}, kv, c.hidden});
    out.push_back({{WeightKind::kO, l}, c.hidden, q});
    out.push_back({{WeightKind::kFfnNorm, l}, 1, c.hidden});
    out.push_back({{WeightKind::kGate, l}, c.ffn, c.hidden});
    out.push_back({{WeightKind::kUp, l}, c.ffn, c.hidden});
    out.push_back({{WeightKind::kDown, l}, c.hidden, c.ffn});
    if (c.qkv_bias) {
      out.push_back({{WeightKind::kQBias, l}, 1, q});
      out.push_back({{WeightKind::kKBias, l}, 1, kv});
      out.push_back({{WeightKind::kVBias, l}, 1, kv});
    }
    if (c.qk_norm) {
      out.push_back({{WeightKind::kQNorm, l}, 1, c.head_dim});
      out.push_back({{WeightKind::kKNorm, l}, 1, c.head_dim});
    }
  }
  return out;
}

void ValidateRopeScaling(const ModelConfig& c, const std::string& where) {
  if (!c.rope_scaling) return;
  const RopeScaling& s = *c.rope_scaling;
  auto fail = [&](std::string_view field, const std::string& what) {
    throw Error(ErrorClass::kModel, fmt::format("{}: {}: {}", where, field, what));
  };
  if (s.type != "linear" && s.type != "llama3") {
    fail("RoPE scaling",
         fmt::format("is \"{}\"; expected \"linear\" or \"llama3\"", Printable(s.type)));
  }
  if (!(s.factor > 0 && std::isfinite(s.factor))) {
    fail("RoPE scaling factor", fmt::format("is {}; expected a positive value", s.factor));
  }
  if (s.type == "llama3" && !(s.low_freq_factor > 0 && s.high_freq_factor > s.low_freq_factor &&
                              std::isfinite(s.high_freq_factor) && s.original_context > 0)) {
    fail("RoPE scaling",
         "expected 0 < low_freq_factor < high_freq_factor and a positive "
         "original context");
  }
}

void ValidateConfig(const ModelConfig& c, const std::string& where) {
  auto fail = [&](std::string_view field, const std::string& what) {
    throw Error(ErrorClass::kModel, fmt::format("{}: {}: {}", where, field, what));
  };
  auto in_range = [&](std::string_view field, int64_t value, int64_t most) {
    if (value < 1 || value > most) {
      fail(field, fmt::format("is {}; expected 1 to {}", value, most));
    }
  };
  in_range("layers", c.layers, 1 << 12);
  in_range("hidden size", c.hidden, 1 << 24);
  in_range("attention heads", c.heads, 1 << 16);
  in_range("KV heads", c.kv_heads, 1 << 16);
  in_range("head dimension", c.head_dim, 1 << 12);
  in_range("feed-forward size", c.ffn, 1 << 26);
  in_range("vocabulary", c.vocab, 1 << 26);
  in_range("context length", c.context_length, int64_t{1} << 40);
  if (c.heads % c.kv_heads != 0) {
    fail("attention heads",
         fmt::format("is {}; expected a multiple of the {} KV heads", c.heads, c.kv_heads));
  }
  if (c.head_dim % 16 != 0) {
    fail("head dimension", fmt::format("is {}; expected a multiple of 16", c.head_dim));
  }
  if (!(c.norm_eps > 0 && c.norm_eps < 1)) {
    fail("norm epsilon", fmt::format("is {}; expected a value between 0 and 1", c.norm_eps));
  }
  if (!(c.rope_theta >= 1 && std::isfinite(c.rope_theta))) {
    fail("RoPE base", fmt::format("is {}; expected a finite value of at least 1", c.rope_theta));
  }
  if (c.sliding_window < 0) {
    fail("sliding window", fmt::format("is {}; expected 0 or more", c.sliding_window));
  }
  if (!c.rope_factors.empty() && c.rope_factors.size() != static_cast<size_t>(c.head_dim / 2)) {
    fail("RoPE factors",
         fmt::format("has {} elements; expected {}", c.rope_factors.size(), c.head_dim / 2));
  }
  for (const float factor : c.rope_factors) {
    if (!(factor > 0 && std::isfinite(factor))) fail("RoPE factors", "expected positive values");
  }
  ValidateRopeScaling(c, where);
}

const TokenizerData& MappedModel::tokenizer() const {
  const std::lock_guard lock(mutex_);
  if (!tokenizer_) tokenizer_ = ReadTokenizer();
  return *tokenizer_;
}

size_t MappedModel::IndexOf(WeightId id) const {
  Check(id.layer >= 0 && id.layer < config_.layers, "a weight of a layer that the model lacks");
  return static_cast<size_t>(id.layer) * kKinds + static_cast<size_t>(id.kind);
}

void MappedModel::SetView(WeightId id, const WeightView& view) {
  views_.resize(static_cast<size_t>(config_.layers) * kKinds);
  views_[IndexOf(id)] = view;
}

const WeightView& MappedModel::ViewOf(WeightId id) const {
  if (id.kind == WeightKind::kOutput && config_.tied_embeddings) {
    id.kind = WeightKind::kTokenEmbedding;
  }
  const WeightView& view = views_[IndexOf(id)];
  Check(view.data != nullptr, "a weight that was not loaded");
  return view;
}

template <typename Out>
void MappedModel::ReadAs(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
                         Out* out) const {
  const WeightView& view = ViewOf(id);
  Check(row >= 0 && rows >= 0 && row <= view.rows && rows <= view.rows - row,
        "rows outside a weight");
  Check(col >= 0 && cols >= 0 && col <= view.cols && cols <= view.cols - col,
        "columns outside a weight");
  if (cols == 0) return;
  const ElementLayout& layout = LayoutOf(view.type);
  const int64_t row_bytes = RowBytes(view);
  for (int64_t r = 0; r < rows; ++r) {
    ReadRow(view, layout, view.data + FileRow(view, row + r) * row_bytes, col, cols,
            out + r * cols);
  }
}

void MappedModel::Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       bf16* out) const {
  ReadAs(id, row, rows, col, cols, out);
}
void MappedModel::Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
                       float* out) const {
  ReadAs(id, row, rows, col, cols, out);
}

void MappedModel::Release(WeightId id) const {
  const WeightView& view = ViewOf(id);
  ReleasePages({view.data, static_cast<size_t>(view.rows * RowBytes(view))});
}

}  // namespace passel::model
