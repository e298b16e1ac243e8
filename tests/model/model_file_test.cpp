#include "runtime/model/model_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "runtime/base/error.h"
#include "tests/model/gguf_writer.h"
#include "tests/model/test_model.h"
#include "tests/model/tiny_model.h"

namespace passel::model {
namespace {

constexpr int kHidden = 32, kHeads = 2, kKvHeads = 1, kDim = 16, kFfn = 48, kVocab = 5;

// Element (r, c) of a test weight; exact in bf16 for the sizes above.
float Value(int64_t r, int64_t c) { return static_cast<float>((r * 3 + c) % 251); }

std::vector<float> Matrix(int64_t rows, int64_t cols) {
  std::vector<float> out;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out.push_back(Value(r, c));
  }
  return out;
}

GgufWriter Llama(const std::string& skip = "") {
  GgufWriter w;
  w.String("general.architecture", "llama");
  const auto number = [&](const std::string& key, uint32_t value) {
    if (key != skip) w.Uint32("llama." + key, value);
  };
  number("block_count", 1);
  number("embedding_length", kHidden);
  number("attention.head_count", kHeads);
  number("attention.head_count_kv", kKvHeads);
  number("feed_forward_length", kFfn);
  number("context_length", 128);
  w.Float("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  w.String("tokenizer.ggml.model", "gpt2");
  w.Strings("tokenizer.ggml.tokens", {"a", "b", "ab", "<|im_end|>", "<e>"});
  w.Ints("tokenizer.ggml.token_type", {1, 1, 1, 3, 3});
  w.Strings("tokenizer.ggml.merges", {"a b"});
  w.Uint32("tokenizer.ggml.eos_token_id", 4);
  const auto add = [&](const std::string& name, int64_t rows, int64_t cols) {
    if (name == skip) return;
    std::vector<uint64_t> dims = {static_cast<uint64_t>(cols)};
    if (rows > 1) dims.push_back(static_cast<uint64_t>(rows));
    w.F32(name, dims, Matrix(rows, cols));
  };
  add("token_embd.weight", kVocab, kHidden);
  add("output_norm.weight", 1, kHidden);
  add("blk.0.attn_norm.weight", 1, kHidden);
  add("blk.0.attn_q.weight", kHeads * kDim, kHidden);
  add("blk.0.attn_k.weight", kKvHeads * kDim, kHidden);
  add("blk.0.attn_v.weight", kKvHeads * kDim, kHidden);
  add("blk.0.attn_output.weight", kHidden, kHeads * kDim);
  add("blk.0.ffn_norm.weight", 1, kHidden);
  add("blk.0.ffn_gate.weight", kFfn, kHidden);
  add("blk.0.ffn_up.weight", kFfn, kHidden);
  add("blk.0.ffn_down.weight", kHidden, kFfn);
  return w;
}

void ExpectRefused(const GgufWriter& writer, const std::string& part) {
  const TempPath file(".gguf", writer.Encode());
  try {
    ModelFile::Open(file.str())->tokenizer();
    FAIL() << "expected an error with \"" << part << "\"";
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_EQ(what.find(file.str()), 0u) << what;
    EXPECT_NE(what.find(part), std::string::npos) << what;
  }
}

TEST(GgufModel, ConfigAndTokenizer) {
  const TempPath path(".gguf", Llama().Encode());
  const auto file = ModelFile::Open(path.str());
  const ModelConfig& c = file->config();
  EXPECT_EQ(c.layers, 1);
  EXPECT_EQ(c.heads, kHeads);
  EXPECT_EQ(c.kv_heads, kKvHeads);
  EXPECT_EQ(c.head_dim, kDim);
  EXPECT_EQ(c.ffn, kFfn);
  EXPECT_EQ(c.vocab, kVocab);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ(c.rope_theta, 10000);
  const TokenizerData& t = file->tokenizer();
  EXPECT_EQ(t.eos, 4);
  EXPECT_EQ(t.stop, (std::vector<int32_t>{4, 3}));
  EXPECT_EQ(t.types[3], TokenizerData::TokenType::kSpecial);
  EXPECT_FALSE(t.add_bos);
}

TEST(GgufModel, ReadsAnyRectangle) {
  const TempPath path(".gguf", Llama().Encode());
  const auto file = ModelFile::Open(path.str());
  for (const int64_t col : {0, 5, 47}) {
    for (const int64_t cols : {int64_t{1}, int64_t{kFfn} - col}) {
      std::vector<float> out(static_cast<size_t>(3 * cols));
      file->Read({WeightKind::kDown, 0}, 7, 3, col, cols, out.data());
      std::vector<bf16> narrow(out.size());
      file->Read({WeightKind::kDown, 0}, 7, 3, col, cols, narrow.data());
      for (int64_t i = 0; i < 3 * cols; ++i) {
        ASSERT_EQ(out[static_cast<size_t>(i)], Value(7 + i / cols, col + i % cols));
        ASSERT_EQ(ToFloat(narrow[static_cast<size_t>(i)]), out[static_cast<size_t>(i)]);
      }
    }
  }
  // Tied: the output weight is the embedding.
  float value = -1;
  file->Read({WeightKind::kOutput, 0}, 4, 1, 3, 1, &value);
  EXPECT_EQ(value, Value(4, 3));
  EXPECT_THROW(file->Read({WeightKind::kDown, 0}, kHidden - 1, 2, 0, 1, &value), Error);
  EXPECT_THROW(file->Read({WeightKind::kDown, 1}, 0, 1, 0, 1, &value), Error);
}

TEST(GgufModel, QueryAndKeyRowsComeInRotateHalfOrder) {
  const TempPath path(".gguf", Llama().Encode());
  const auto file = ModelFile::Open(path.str());
  for (const WeightKind kind : {WeightKind::kQ, WeightKind::kK, WeightKind::kV}) {
    const int64_t rows = (kind == WeightKind::kQ ? kHeads : kKvHeads) * kDim;
    std::vector<float> first(static_cast<size_t>(rows));
    file->Read({kind, 0}, 0, rows, 0, 1, first.data());
    for (int64_t h = 0; h < rows / kDim; ++h) {
      for (int64_t p = 0; p < 2; ++p) {
        for (int64_t i = 0; i < kDim / 2; ++i) {
          const int64_t here = h * kDim + p * kDim / 2 + i;
          const int64_t in_file = kind == WeightKind::kV ? here : h * kDim + 2 * i + p;
          ASSERT_EQ(first[static_cast<size_t>(here)], Value(in_file, 0));
        }
      }
    }
  }
}

TEST(GgufModel, QwenRowsLieInRotateHalfOrderAlready) {
  for (const std::string architecture : {"qwen2", "qwen3"}) {
    GgufWriter w = TinyModel::Gguf(false, architecture);
    for (GgufWriter::Tensor& tensor : w.tensors) {
      std::vector<float> values(tensor.data.size() / sizeof(float));
      for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
      std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
    }
    const TempPath path(".gguf", w.Encode());
    const auto file = ModelFile::Open(path.str());
    EXPECT_EQ(file->config().architecture, architecture);
    EXPECT_EQ(file->config().qkv_bias, architecture == "qwen2");
    EXPECT_EQ(file->config().qk_norm, architecture == "qwen3");
    EXPECT_EQ(file->config().sliding_window, 0);
    EXPECT_EQ(file->config().rope_scaling->factor, 2);
    std::vector<WeightKind> kinds = {WeightKind::kQ, WeightKind::kK};
    if (architecture == "qwen2") {
      kinds.insert(kinds.end(), {WeightKind::kQBias, WeightKind::kKBias, WeightKind::kVBias});
    } else {
      kinds.insert(kinds.end(), {WeightKind::kQNorm, WeightKind::kKNorm});
    }
    for (const WeightKind kind : kinds) {
      const int64_t rows = kind <= WeightKind::kDown ? 16 : 1;
      std::vector<float> values(static_cast<size_t>(rows * 16));
      file->Read({kind, 0}, 0, rows, 0, 16, values.data());
      for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], static_cast<float>(i));
    }
    const std::string last = w.tensors.back().name;
    w.tensors.pop_back();
    ExpectRefused(w, "'" + last + "': is missing; expected [1, 16]");
    w = TinyModel::Gguf(false, architecture);
    w.F32("blk.0.attn_output.bias", {16}, std::vector<float>(16));
    ExpectRefused(w, "'blk.0.attn_output.bias': is not part of a dense " + architecture);
  }
}

TEST(GgufModel, RefusesWhatIsMissingOrWrong) {
  ExpectRefused(Llama("block_count"), "llama.block_count: is missing");
  ExpectRefused(Llama("blk.0.ffn_up.weight"),
                "'blk.0.ffn_up.weight': is missing; expected [48, 32]");
  ExpectRefused(Llama("token_embd.weight"), "token_embd.weight");
  GgufWriter w = Llama("blk.0.attn_v.weight");
  w.F32("blk.0.attn_v.weight", {kHidden, 8}, Matrix(8, kHidden));
  ExpectRefused(w, "is [8, 32]; expected [16, 32]");
  w = Llama();
  w.F32("blk.0.attn_q.bias", {kHidden}, Matrix(1, kHidden));
  ExpectRefused(w, "blk.0.attn_q.bias");
  w = Llama("attention.head_count_kv");
  w.Uint32("llama.attention.head_count_kv", 0);
  ExpectRefused(w, "KV heads");
  w = Llama("attention.head_count");
  w.Uint32("llama.attention.head_count", 0);
  ExpectRefused(w, "attention.head_count");
  w = Llama("block_count");
  w.Uint32("llama.block_count", 0xffffffff);
  ExpectRefused(w, "block_count");
  w = Llama();
  w.Uint32("llama.expert_count", 8);
  ExpectRefused(w, "dense");
  w = Llama();
  w.String("llama.rope.scaling.type", "yarn");
  ExpectRefused(w, "yarn");
}

TEST(ModelFile, RefusesPathsThatAreNoModel) {
  try {
    ModelFile::Open("/nonexistent/model.gguf");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_NE(std::string(e.what()).find("/nonexistent/model.gguf"), std::string::npos);
  }
}

TEST(Rope, PlainAndScaledFrequencies) {
  ModelConfig c;
  c.head_dim = 64;
  c.rope_theta = 500000;
  const std::vector<float> plain = RopeInverseFrequencies(c);
  ASSERT_EQ(plain.size(), 32u);
  EXPECT_EQ(plain[0], 1.0f);
  EXPECT_NEAR(plain[16], 1 / std::sqrt(500000.0), 1e-9);
  c.rope_scaling = RopeScaling{.type = "linear", .factor = 4};
  EXPECT_FLOAT_EQ(RopeInverseFrequencies(c)[5], plain[5] / 4);
  c.rope_scaling = RopeScaling{.type = "llama3",
                               .factor = 8,
                               .low_freq_factor = 1,
                               .high_freq_factor = 4,
                               .original_context = 8192};
  const std::vector<float> scaled = RopeInverseFrequencies(c);
  int kept = 0, blended = 0, stretched = 0;
  for (size_t i = 0; i < scaled.size(); ++i) {
    const double wavelength = 2 * std::numbers::pi / static_cast<double>(plain[i]);
    if (wavelength < 8192.0 / 4) {
      EXPECT_FLOAT_EQ(scaled[i], plain[i]);
      ++kept;
    } else if (wavelength > 8192.0) {
      EXPECT_FLOAT_EQ(scaled[i], plain[i] / 8);
      ++stretched;
    } else {
      EXPECT_LT(scaled[i], plain[i]);
      EXPECT_GT(scaled[i], plain[i] / 8);
      ++blended;
    }
  }
  EXPECT_GT(kept, 0);
  EXPECT_GT(blended, 0);
  EXPECT_GT(stretched, 0);
  c.rope_scaling.reset();
  c.rope_factors.assign(32, 2.0f);
  EXPECT_FLOAT_EQ(RopeInverseFrequencies(c)[3], plain[3] / 2);
}

TEST(SmolLm2, OpensWithItsShape) {
  const std::string path = TestModelPath();
  if (path.empty()) GTEST_SKIP() << "SmolLM2's GGUF is not here; tools/setup.sh fetches it";
  const auto file = ModelFile::Open(path);
  const ModelConfig& c = file->config();
  EXPECT_EQ(c.layers, 30);
  EXPECT_EQ(c.hidden, 576);
  EXPECT_EQ(c.heads, 9);
  EXPECT_EQ(c.kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.vocab, 49152);
  EXPECT_EQ(c.context_length, 8192);
  EXPECT_EQ(c.rope_theta, 100000);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ(file->tokenizer().pre_tokenizer, "smollm");
  EXPECT_GT(file->weight_bytes(), 80'000'000u);
  // A weight that is read wrong is far from this spread.
  std::vector<float> q(576 * 576);
  file->Read({WeightKind::kQ, 29}, 0, 576, 0, 576, q.data());
  double sum = 0;
  for (const float x : q) sum += static_cast<double>(x) * static_cast<double>(x);
  const double rms = std::sqrt(sum / static_cast<double>(q.size()));
  EXPECT_GT(rms, 0.01);
  EXPECT_LT(rms, 1.0);
}

}  // namespace
}  // namespace passel::model
