// How much memory loading takes: a model's size once, not the file and the packed weights both.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

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

// What a process saw of itself.
struct Measured {
  uint64_t weights = 0;                     // bytes in the file
  uint64_t before = 0, highest_before = 0;  // resident memory before loading
  uint64_t highest = 0;

  uint64_t peak() const { return highest - before; }
};

Measured MeasureHere(const std::string& directory, bool keep_pages) {
  Measured m;
  const auto file = ModelFile::Open(directory);
  const auto device = gpu::MakeTestDevice({.threads = 2});
  const Kept kept(*file);
  SingleRank alone;
  m.weights = file->weight_bytes();
  m.highest_before = Status("VmHWM");
  m.before = Status("VmRSS");
  const Transformer transformer(keep_pages ? static_cast<const ModelFile&>(kept) : *file, *device,
                                alone, nullptr);
  m.highest = Status("VmHWM");
  return m;
}

// Loads in a process of its own, whose highest memory begins where it is forked. There are no
// threads yet that it could lack.
Measured Measure(bool keep_pages) {
  const TempPath directory;
  WriteModel(directory.str());
  Measured m;
  int ends[2];
  if (pipe(ends) != 0) {
    ADD_FAILURE() << "pipe failed";
    return m;
  }
  const pid_t child = fork();
  if (child == 0) {
    // Nothing of the test's may go on in this process.
    try {
      m = MeasureHere(directory.str(), keep_pages);
    } catch (const std::exception& e) {
      std::cerr << e.what() << "\n";
      _exit(1);
    }
    _exit(write(ends[1], &m, sizeof m) == sizeof m ? 0 : 1);
  }
  close(ends[1]);
  EXPECT_EQ(read(ends[0], &m, sizeof m), static_cast<ssize_t>(sizeof m));
  close(ends[0]);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  std::cout << "weights " << m.weights << " bytes, peak " << m.peak() << " ("
            << static_cast<double>(m.peak()) / static_cast<double>(m.weights) << " x)\n";
  EXPECT_LE(m.highest_before, m.before + (uint64_t{4} << 20));
  EXPECT_GT(m.weights, uint64_t{240'000'000});
  return m;
}

TEST(LoadMemory, IsTheSizeOfTheModelOnce) {
  // Code that is touched for the first time, working memory, ends of huge pages.
  constexpr uint64_t kBeside = uint64_t{24} << 20;
  const Measured m = Measure(/*keep_pages=*/false);
  EXPECT_LE(m.peak(), m.weights + m.weights / 10 + kBeside);
  EXPECT_GE(m.peak(), m.weights - m.weights / 5);
}

// The measure sees what Release saves.
TEST(LoadMemory, WouldBeTheFileTooIfItsPagesStayed) {
  const Measured m = Measure(/*keep_pages=*/true);
  EXPECT_GE(m.peak(), m.weights + m.weights / 10 * 8);
}

}  // namespace
}  // namespace passel::model
