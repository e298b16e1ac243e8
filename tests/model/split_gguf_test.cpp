// GGUF models split into several files.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "runtime/base/error.h"
#include "runtime/model/model_file.h"
#include "tests/model/tiny_model.h"

namespace passel::model {
namespace {

class SplitGguf : public testing::Test {
 protected:
  // Three files: the first has metadata and no tensors, as splitters like to write it.
  SplitGguf() : parts_(3) {
    std::filesystem::create_directory(directory_.str());
    GgufWriter whole = TinyModel::Gguf(false);
    parts_[0].values = whole.values;
    for (size_t i = 0; i < whole.tensors.size(); ++i) {
      GgufWriter::Tensor tensor = whole.tensors[i];
      GgufWriter& part = parts_[i < 4 ? 1 : 2];
      tensor.offset = 0;
      for (const auto& t : part.tensors) tensor.offset += (t.data.size() + 31) / 32 * 32;
      if (tensor.name == "blk.0.ffn_down.weight") {
        const float mark = 7;
        std::memcpy(tensor.data.data() + 5 * sizeof(float), &mark, sizeof(mark));
      }
      part.tensors.push_back(tensor);
    }
    for (uint32_t i = 0; i < 3; ++i) {
      parts_[i].Uint32("split.no", i);
      parts_[i].Uint32("split.count", 3);
    }
    parts_[0].Uint32("split.tensors.count", static_cast<uint32_t>(whole.tensors.size()));
  }
  std::string Name(size_t part) const {
    return directory_.str() + "/m-0000" + std::to_string(part + 1) + "-of-00003.gguf";
  }
  void Write() const {
    for (size_t i = 0; i < parts_.size(); ++i) {
      std::ofstream(Name(i), std::ios::binary) << parts_[i].Encode();
    }
  }
  static void ExpectRefused(const std::string& path, const std::string& part) {
    try {
      ModelFile::Open(path);
      FAIL() << "expected an error with \"" << part << "\"";
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kModel);
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }

  TempPath directory_;
  std::vector<GgufWriter> parts_;
};

TEST_F(SplitGguf, OpensByItsFirstFile) {
  Write();
  const auto file = ModelFile::Open(Name(0));
  EXPECT_EQ(file->config().vocab, TinyModel::kVocab);
  float value = 0;
  file->Read({WeightKind::kDown, 0}, 0, 1, 5, 1, &value);
  EXPECT_EQ(value, 7);
  uint64_t bytes = 0;
  for (const TinyModel::Weight& w : TinyModel::Weights()) bytes += 4 * w.rows * w.cols;
  EXPECT_EQ(file->weight_bytes(), bytes);
}

TEST_F(SplitGguf, RefusesPartsThatDoNotBelongTogether) {
  Write();
  ExpectRefused(Name(1), "not the first of the model's 3 files");
  const std::string other = directory_.str() + "/other.gguf";
  std::filesystem::copy_file(Name(0), other);
  ExpectRefused(other, "file name");
  std::filesystem::remove(Name(2));
  ExpectRefused(Name(0), Name(2));
  std::filesystem::copy_file(Name(1), Name(2));
  ExpectRefused(Name(0), "split.no");
}

TEST_F(SplitGguf, RefusesTensorsGivenTwiceOrMissing) {
  parts_[2].tensors.insert(parts_[2].tensors.begin(), parts_[1].tensors[1]);
  parts_[2].tensors[0].offset = parts_[2].tensors.back().offset + 1024;
  parts_[2].tensors.push_back(parts_[2].tensors[0]);
  parts_[2].tensors.erase(parts_[2].tensors.begin());
  Write();
  ExpectRefused(Name(0), "is in an earlier file too");
  parts_[2].tensors.resize(parts_[2].tensors.size() - 2);
  Write();
  ExpectRefused(Name(0), "split.tensors.count");
}

TEST_F(SplitGguf, RefusesCountsOutOfRange) {
  for (const uint32_t count : {100000u, 0xffffffffu}) {
    GgufWriter writer = TinyModel::Gguf(false);
    writer.Uint32("split.count", count);
    const TempPath path(".gguf", writer.Encode());
    ExpectRefused(path.str(), "split.count");
  }
}

}  // namespace
}  // namespace passel::model
