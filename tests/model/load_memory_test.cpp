// How much memory loading takes: a model's size once, not the file and the packed weights both.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "runtime/base/single_rank.h"
#include "runtime/model/transformer.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/gguf_writer.h"

namespace passel::model {
namespace {

// A field of /proc/self/status that is given in kB, in bytes.
uint64_t Status(const std::string& field) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(field + ":")) return 1024 * std::stoull(line.substr(field.size() + 1));
  }
  return 0;
}

// Makes VmHWM, the most memory that was ever resident, what is resident now.
void ResetPeak() { std::ofstream("/proc/self/clear_refs") << 5; }

// A Hugging Face directory of about 250 MB. The file is one hole behind its header: zeros that take
// no place on a disk and as much memory as anything else once they are read.
void WriteModel(const std::string& directory) {
  constexpr int64_t kLayers = 6, kHidden = 1024, kHeads = 16, kKvHeads = 4, kDim = 64, kFfn = 4096,
                    kVocab = 16384;
  using nlohmann::json;
  std::filesystem::create_directory(directory);
  std::ofstream(directory + "/config.json") << json{{"model_type", "llama"},
                                                    {"hidden_size", kHidden},
                                                    {"intermediate_size", kFfn},
                                                    {"num_hidden_layers", kLayers},
                                                    {"num_attention_heads", kHeads},
                                                    {"num_key_value_heads", kKvHeads},
                                                    {"head_dim", kDim},
                                                    {"max_position_embeddings", 4096},
                                                    {"vocab_size", kVocab},
                                                    {"tie_word_embeddings", false}};
  json header;
  int64_t at = 0;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape) {
    int64_t bytes = 2;
    for (const int64_t size : shape) bytes *= size;
    header[name + ".weight"] = {
        {"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  };
  add("model.embed_tokens", {kVocab, kHidden});
  add("lm_head", {kVocab, kHidden});
  add("model.norm", {kHidden});
  for (int64_t l = 0; l < kLayers; ++l) {
    const std::string layer = "model.layers." + std::to_string(l) + ".";
    add(layer + "input_layernorm", {kHidden});
    add(layer + "post_attention_layernorm", {kHidden});
    add(layer + "self_attn.q_proj", {kHeads * kDim, kHidden});
    add(layer + "self_attn.k_proj", {kKvHeads * kDim, kHidden});
    add(layer + "self_attn.v_proj", {kKvHeads * kDim, kHidden});
    add(layer + "self_attn.o_proj", {kHidden, kHeads * kDim});
    add(layer + "mlp.gate_proj", {kFfn, kHidden});
    add(layer + "mlp.up_proj", {kFfn, kHidden});
    add(layer + "mlp.down_proj", {kHidden, kFfn});
  }
  const std::string path = directory + "/model.safetensors",
                    head = Bytes().Text(header.dump()).str();
  std::ofstream(path, std::ios::binary) << head;
  std::filesystem::resize_file(path, head.size() + static_cast<uint64_t>(at));
}

// A model whose pages stay.
class Kept final : public ModelFile {
 public:
  explicit Kept(const ModelFile& file) : file_(file) {}
  const ModelConfig& config() const override { return file_.config(); }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bf16* out) const override {
    file_.Read(id, row, rows, col, cols, out);
  }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            float* out) const override {
    file_.Read(id, row, rows, col, cols, out);
  }
  const TokenizerData& tokenizer() const override { return file_.tokenizer(); }
  uint64_t weight_bytes() const override { return file_.weight_bytes(); }

 private:
  const ModelFile& file_;
};

class LoadMemory : public testing::Test {
 protected:
  LoadMemory() {
    WriteModel(directory_.str());
    file_ = ModelFile::Open(directory_.str());
    // A CPU without bf16 arithmetic holds matrices as f32.
    held_ = file_->weight_bytes() * gpu::SizeOf(device_->activation_type()) / 2;
  }
  // The most memory that loading took beyond what there was.
  uint64_t Peak(const ModelFile& file) {
    SingleRank alone;
    ResetPeak();
    const uint64_t before = Status("VmRSS");
    resets_ = Status("VmHWM") <= before + (uint64_t{4} << 20);
    const Transformer transformer(file, *device_, alone, nullptr);
    const uint64_t peak = Status("VmHWM") - before;
    std::cout << "weights " << held_ << " bytes, peak " << peak << " ("
              << static_cast<double>(peak) / static_cast<double>(held_) << " x)\n";
    return peak;
  }

  TempPath directory_;
  std::unique_ptr<ModelFile> file_;
  std::unique_ptr<gpu::Device> device_ = gpu::MakeTestDevice({.threads = 2});
  uint64_t held_ = 0;
  bool resets_ = false;  // whether the system lets a process reset its peak
};

TEST_F(LoadMemory, IsTheSizeOfTheModelOnce) {
  // Code that is touched for the first time, working memory, ends of huge pages.
  constexpr uint64_t kBeside = uint64_t{24} << 20;
  ASSERT_GT(file_->weight_bytes(), uint64_t{240'000'000});
  const uint64_t peak = Peak(*file_);
  if (!resets_) GTEST_SKIP() << "this system does not let a process reset its peak of memory";
  EXPECT_LE(peak, held_ + held_ / 10 + kBeside);
  EXPECT_GE(peak, held_ - held_ / 5);
}

// The measure sees what Release saves.
TEST_F(LoadMemory, WouldBeTheFileTooIfItsPagesStayed) {
  const uint64_t peak = Peak(Kept(*file_));
  if (!resets_) GTEST_SKIP() << "this system does not let a process reset its peak of memory";
  EXPECT_GE(peak, held_ + file_->weight_bytes() / 10 * 8);
}

}  // namespace
}  // namespace passel::model
