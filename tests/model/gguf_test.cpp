#include "runtime/model/gguf.h"

#include <gtest/gtest.h>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "tests/model/gguf_writer.h"

namespace passel::model {
namespace {

GgufWriter Small() {
  GgufWriter writer;
  writer.String("general.architecture", "llama");
  writer.Uint32("n", 7);
  writer.Float("x", 0.5f);
  writer.Strings("words", {"a", "", "bc"});
  writer.Ints("ids", {-1, 2});
  writer.F32("t", {2, 3}, {0, 1, 2, 3, 4, 5});
  writer.F32("u", {4}, {6, 7, 8, 9});
  return writer;
}

// Expects Error{kModel} that names the file and holds `part`.
void ExpectRefused(const std::string& content, const std::string& part) {
  const TempPath file(".gguf", content);
  try {
    GgufFile parsed(file.str());
    FAIL() << "expected an error with \"" << part << "\"";
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_EQ(what.find(file.str()), 0u) << what;
    EXPECT_NE(what.find(part), std::string::npos) << what;
  }
}
void ExpectRefused(const GgufWriter& writer, const std::string& part) {
  ExpectRefused(writer.Encode(), part);
}

TEST(GgufFile, ReadsMetadataAndTensors) {
  const TempPath path(".gguf", Small().Encode());
  const GgufFile file(path.str());
  EXPECT_EQ(file.String("general.architecture"), "llama");
  EXPECT_EQ(file.Int("n"), 7);
  EXPECT_EQ(file.Float("x"), 0.5);
  EXPECT_EQ(file.Strings("words"), (std::vector<std::string>{"a", "", "bc"}));
  EXPECT_EQ(file.Ints("ids"), (std::vector<int64_t>{-1, 2}));
  EXPECT_EQ(file.IntOr("none", 3), 3);
  EXPECT_THROW(file.Int("none"), Error);
  EXPECT_THROW(file.Int("x"), Error);
  ASSERT_EQ(file.tensors().size(), 2u);
  const GgufTensor& t = file.tensors().at("t");
  EXPECT_EQ(t.rows, 3);
  EXPECT_EQ(t.cols, 2);
  float last;
  std::memcpy(&last, t.data + 20, sizeof(float));
  EXPECT_EQ(last, 5);
  EXPECT_EQ(file.tensors().at("u").rows, 1);
  EXPECT_EQ(file.tensor_bytes(), 40u);
}

TEST(GgufFile, EveryTruncationIsRefused) {
  const std::string whole = Small().Encode();
  for (size_t size = 0; size < whole.size(); ++size) {
    const TempPath file(".gguf", whole.substr(0, size));
    EXPECT_THROW(GgufFile parsed(file.str()), Error) << size << " of " << whole.size() << " bytes";
  }
}

// Whatever the bytes say, reading ends in a file or an Error: no other exception, no over-read.
TEST(GgufFile, CorruptBytesNeverCrash) {
  const std::string whole = Small().Encode();
  Random random(6);
  int refused = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    std::string bytes = whole;
    for (uint64_t n = random.Next() % 4 + 1; n > 0; --n) {
      static constexpr uint8_t kValues[] = {0, 1, 0x7f, 0x80, 0xff};
      const uint64_t pick = random.Next();
      bytes[random.Next() % bytes.size()] =
          static_cast<char>(pick % 2 == 0 ? kValues[pick / 2 % 5] : pick >> 8);
    }
    const TempPath path(".gguf", bytes);
    try {
      const GgufFile file(path.str());
      uint64_t sum = 0;
      for (const auto& [name, tensor] : file.tensors()) {
        for (uint64_t i = 0; i < tensor.bytes; ++i) sum += tensor.data[i];
      }
      EXPECT_LE(sum, 255 * file.tensor_bytes());
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kModel);
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(GgufFile, RefusesWrongPreambles) {
  GgufWriter w = Small();
  w.magic = "GGML";
  ExpectRefused(w, "magic");
  w = Small();
  w.version = 1;
  ExpectRefused(w, "version");
  w.version = 0x03000000;
  ExpectRefused(w, "big-endian");
  ExpectRefused("", "empty");
}

TEST(GgufFile, RefusesHostileCounts) {
  GgufWriter w = Small();
  w.extra_tensors = uint64_t{1} << 60;
  ExpectRefused(w, "tensor count");
  w = Small();
  w.extra_values = ~uint64_t{0} - w.values.size();
  ExpectRefused(w, "metadata count");
  w = Small();
  w.values.push_back(
      Bytes().Text("k").Put<uint32_t>(9).Put<uint32_t>(8).Put<uint64_t>(uint64_t{1} << 61).str());
  ExpectRefused(w, "k: is 2305843009213693952");
  w.values.back() = Bytes().Text("k").Put<uint32_t>(8).Put<uint64_t>(~uint64_t{0} - 7).str();
  ExpectRefused(w, "k: needs 18446744073709551608 bytes");
}

TEST(GgufFile, RefusesBadValues) {
  GgufWriter w = Small();
  w.Uint32("n", 8);
  ExpectRefused(w, "n: is given twice");
  w = Small();
  w.values.push_back(Bytes().Text("k").Put<uint32_t>(13).Put<uint64_t>(0).str());
  ExpectRefused(w, "value type 13");
  w.values.back() =
      Bytes().Text("k").Put<uint32_t>(9).Put<uint32_t>(9).Put<uint64_t>(1).Put<uint64_t>(0).str();
  ExpectRefused(w, "array of type 9");
  w.values.back() = Bytes().Text("k").Put<uint32_t>(7).Put<uint8_t>(2).str();
  ExpectRefused(w, "boolean");
  w.values.back() = Bytes().Text("k").Put<uint32_t>(10).Put(~uint64_t{0}).str();
  ExpectRefused(w, "2^63 - 1");
  for (const uint32_t alignment : {0u, 3u, 48u, 1u << 30}) {
    w = Small();
    w.Uint32("general.alignment", alignment);
    ExpectRefused(w, "general.alignment");
  }
}

TEST(GgufFile, RefusesBadTensors) {
  const auto with = [](const GgufWriter::Tensor& tensor) {
    GgufWriter w = Small();
    w.tensors.push_back(tensor);
    return w;
  };
  // Products that wrap around 2^64 to something small.
  ExpectRefused(with({"v", {uint64_t{1} << 32, uint64_t{1} << 32}, 0, 64, ""}), "too many");
  ExpectRefused(with({"v", {uint64_t{1} << 33, (uint64_t{1} << 31) + 1}, 0, 64, ""}), "too many");
  ExpectRefused(with({"v", {4, 0}, 0, 64, ""}), "tensor 'v'");
  ExpectRefused(with({"v", {}, 0, 64, ""}), "0 dimensions");
  ExpectRefused(with({"v", {1, 1, 1, 1, 1}, 0, 64, ""}), "5 dimensions");
  ExpectRefused(with({"v", {4}, 99, 64, ""}), "element type 99");
  ExpectRefused(with({"v", {33}, 8, 64, ""}), "multiple of 32");
  ExpectRefused(with({"v", {4}, 0, 65, ""}), "multiple of 32");
  ExpectRefused(with({"v", {4}, 0, uint64_t{1} << 40, ""}), "complete file");
  ExpectRefused(with({"v", {4}, 0, ~uint64_t{0} - 31, ""}), "complete file");
  ExpectRefused(with({"t", {4}, 0, 64, std::string(16, 'x')}), "given twice");
  ExpectRefused(with({"v", {4}, 0, 32, std::string(16, 'x')}), "overlaps");
}

}  // namespace
}  // namespace passel::model
