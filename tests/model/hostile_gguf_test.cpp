// GGUF files that say what they should not: see hostile_files_test.cpp.

#include <cstring>

#include "tests/model/hostile_files.h"

namespace passel::model {
namespace {

class HostileGguf : public HostileFiles {};

// Offsets of the fields of a GGUF file's header, with the size of each, in the order they come.
class GgufFields {
 public:
  explicit GgufFields(const std::string& bytes) : bytes_(bytes) {
    Field(4), Field(4);
    const uint64_t tensors = Field(8), values = Field(8);
    for (uint64_t i = 0; i < values; ++i) {
      Text();
      Value(static_cast<uint32_t>(Field(4)));
    }
    for (uint64_t i = 0; i < tensors; ++i) {
      Text();
      const uint64_t dims = Field(4);
      for (uint64_t d = 0; d < dims; ++d) Field(8);
      Field(4), Field(8);
    }
  }
  struct Place {
    size_t at, size;
  };
  const std::vector<Place>& places() const { return places_; }
  size_t header_size() const { return at_; }

 private:
  uint64_t Field(size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, bytes_.data() + at_, size);
    places_.push_back({at_, size});
    at_ += size;
    return value;
  }
  void Text() { at_ += Field(8); }
  void Value(uint32_t type) {
    static constexpr size_t kSizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == 8) return Text();
    if (type != 9) {
      Field(kSizes[type]);
      return;
    }
    const auto element = static_cast<uint32_t>(Field(4));
    const uint64_t count = Field(8);
    for (uint64_t i = 0; i < count; ++i) Value(element);
  }

  const std::string& bytes_;
  std::vector<Place> places_;
  size_t at_ = 0;
};

TEST_F(HostileGguf, Header) {
  Tally tally;
  const TempPath path(".gguf");
  const auto use = [&](const std::string& bytes, const std::string& what) {
    WriteFile(path.str(), bytes);
    return Try(path.str(), "gguf " + what, tally);
  };
  int opened = 0;
  Random random(4);
  for (const auto& [sentence_piece, architecture] :
       {std::pair(false, "llama"), std::pair(true, "llama"), std::pair(false, "qwen2"),
        std::pair(false, "qwen3")}) {
    const std::string good = TinyModel::Gguf(sentence_piece, architecture).Encode();
    use(good, "unchanged");
    ASSERT_GT(tally.opened, opened);
    const GgufFields fields(good);
    for (const GgufFields::Place& place : fields.places()) {
      uint64_t old = 0;
      std::memcpy(&old, good.data() + place.at, place.size);
      for (const uint64_t value : {uint64_t{0},
                                   uint64_t{1},
                                   uint64_t{9},
                                   uint64_t{33},
                                   UINT64_MAX,
                                   UINT64_MAX - 31,
                                   uint64_t{1} << 63,
                                   uint64_t{1} << 62,
                                   uint64_t{1} << 61,
                                   (uint64_t{1} << 61) + 1,
                                   uint64_t{1} << 56,
                                   uint64_t{1} << 32,
                                   uint64_t{0x7fffffff},
                                   uint64_t{0x80000000},
                                   uint64_t{0xffffffff},
                                   uint64_t{good.size()},
                                   old + 1,
                                   old - 1,
                                   old + 32,
                                   old * 2}) {
        std::string bytes = good;
        std::memcpy(bytes.data() + place.at, &value, place.size);
        use(bytes, "field at " + std::to_string(place.at) + " is " + std::to_string(value));
      }
    }
    for (int i = 0; i < 1000; ++i) {
      use(Damage(good, fields.header_size(), random), "damage " + std::to_string(i));
    }
    EXPECT_EQ(use(good + "trailing", "trailing bytes"), "");  // as the format allows
    opened = tally.opened;
  }
  Report("gguf", tally);
  EXPECT_GE(tally.files, 6000);
}

TEST_F(HostileGguf, TensorsThatRepeatOverlapOrLeaveGaps) {
  Tally tally;
  const TempPath path(".gguf");
  const auto use = [&](const GgufWriter& writer, const std::string& what) {
    WriteFile(path.str(), writer.Encode());
    return Try(path.str(), what, tally);
  };
  const auto refused = [&](const GgufWriter& writer, const std::string& part) {
    const std::string message = use(writer, part);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  GgufWriter twice = TinyModel::Gguf(false);
  twice.values.push_back(twice.values.front());
  refused(twice, "general.architecture: is given twice");
  GgufWriter again = TinyModel::Gguf(false);
  again.tensors.push_back(again.tensors.front());
  refused(again, "tensor 'token_embd.weight': is given twice");
  for (const uint64_t shift : {uint64_t{32}, uint64_t{0} - 32}) {
    GgufWriter overlap = TinyModel::Gguf(false);
    overlap.tensors[4].offset += shift;
    refused(overlap, "overlaps tensor");
  }
  GgufWriter same = TinyModel::Gguf(false);
  same.tensors[4].offset = same.tensors[3].offset;
  refused(same, "overlaps tensor");
  GgufWriter outside = TinyModel::Gguf(false);
  outside.tensors[4].offset = uint64_t{1} << 40;
  refused(outside, "at offset 1099511627776, but the file's data has only");
  GgufWriter unaligned = TinyModel::Gguf(false);
  unaligned.tensors[4].offset += 4;
  refused(unaligned, "expected a multiple of 32");
  GgufWriter nested = TinyModel::Gguf(false);
  nested.values.push_back(
      Bytes().Text("x").Put<uint32_t>(9).Put<uint32_t>(9).Put<uint64_t>(1).str());
  refused(nested, "x: is an array of type 9");
  // The format lets a file have bytes that belong to no tensor.
  GgufWriter gap = TinyModel::Gguf(false);
  gap.tensors.back().offset += 32;
  gap.tensors.back().data.insert(0, 32, '\0');
  EXPECT_EQ(use(gap, "a gap"), "");
  Report("gguf, places", tally);
}

}  // namespace
}  // namespace passel::model
