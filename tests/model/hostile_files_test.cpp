// Files that say what they should not: every header field of every format set to values chosen to
// break a reader, and random damage on top. Each opens, or ends in one Error that names it; never
// anything else, and soon. Meant to run under the address and undefined behaviour sanitizers.

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/model/model_file.h"
#include "tests/model/tiny_model.h"

namespace passel::model {
namespace {

using nlohmann::json;

struct Tally {
  int files = 0, opened = 0, refused = 0;
  double slowest_s = 0;
};

// Opens a model and makes its tokenizer, as every command does. An Error must be about the model
// and name the file or what in it is wrong; what opens must also tokenize.
void Try(const std::string& path, const std::string& what, Tally& tally) {
  const auto start = std::chrono::steady_clock::now();
  ++tally.files;
  try {
    const auto file = ModelFile::Open(path);
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({WeightKind::kDown, file->config().layers - 1}, 0, 1, 0, 1, row.data());
    RopeInverseFrequencies(file->config());
    Tokenizer::Make(file->tokenizer())->Encode("abc a<s>\xff", true);
    ++tally.opened;
  } catch (const Error& e) {
    ++tally.refused;
    const std::string message = e.what();
    EXPECT_EQ(e.error_class(), ErrorClass::kModel) << what << ": " << message;
    EXPECT_TRUE(message.starts_with(path) || message.starts_with("tokenizer: "))
        << what << ": " << message;
    EXPECT_LE(message.size(), 2010u) << what;
  } catch (const std::exception& e) {
    ADD_FAILURE() << what << ": not an Error: " << e.what();
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  tally.slowest_s = std::max(tally.slowest_s, took.count());
  EXPECT_LT(took.count(), 20) << what;
}

void Report(const char* name, const Tally& tally) {
  std::cout << name << ": " << tally.files << " files, " << tally.opened << " opened, "
            << tally.refused << " refused, the slowest in " << tally.slowest_s << " s\n";
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
  file.close();
  ASSERT_TRUE(file.good()) << path;
}

// Twenty thousand files are written: to memory, where the machine has a directory there with room.
class HostileFiles : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::error_code error;
    const auto space = std::filesystem::space("/dev/shm", error);
    if (!error && space.available > (uint64_t{1} << 30)) ::setenv("TMPDIR", "/dev/shm", 0);
  }
};

// A Hugging Face directory whose files are rewritten as the test goes.
class Directory {
 public:
  Directory() {
    std::filesystem::create_directory(path_.str());
    Restore();
  }
  void Restore() const {
    Write("config.json", TinyModel::Config().dump());
    Write("model.safetensors", Safetensors(TinyModel::SafetensorsHeader().dump()));
    Write("tokenizer.json", TinyModel::Tokenizer().dump());
  }
  void Write(const std::string& name, const std::string& content) const {
    WriteFile(path_.str() + "/" + name, content);
  }
  void Remove(const std::string& name) const { std::filesystem::remove(path_.str() + "/" + name); }
  static std::string Safetensors(const std::string& header) {
    return Bytes().Text(header).str() + TinyModel::SafetensorsData();
  }
  const std::string& path() const { return path_.str(); }

 private:
  TempPath path_;
};

// What a field of JSON is set to.
std::vector<json> HostileValues() {
  return {nullptr,
          true,
          -1,
          0,
          1,
          2,
          7,
          15,
          17,
          1 << 20,
          INT32_MAX,
          int64_t{INT32_MAX} + 1,
          INT64_MAX,
          INT64_MIN,
          UINT64_MAX,
          UINT64_MAX / 2 + 2,
          0.5,
          -1e308,
          1e-320,
          "",
          "../../etc/passwd",
          "\u0000",
          std::string(5000, 'x'),
          json::array(),
          json::object(),
          json{-1, -1},
          json{UINT64_MAX, UINT64_MAX, 2},
          json{{"Regex", "(a*)*$"}},
          json{{"type", "NFC"}}};
}

// Calls use(text, what) with the document once for each of its values replaced by each hostile one,
// each value removed, and each key doubled.
void MutateJson(const json& document, const std::function<void(std::string, std::string)>& use) {
  const json flat = document.flatten();
  // The objects and arrays on the way are values too.
  std::vector<json::json_pointer> places;
  for (const auto& [pointer, value] : flat.items()) {
    for (json::json_pointer at(pointer); !at.empty(); at = at.parent_pointer()) {
      if (std::find(places.begin(), places.end(), at) == places.end()) places.push_back(at);
    }
  }
  const std::vector<json> values = HostileValues();
  for (const json::json_pointer& place : places) {
    for (size_t v = 0; v < values.size(); ++v) {
      json changed = document;
      changed[place] = values[v];
      use(changed.dump(), place.to_string() + " value " + std::to_string(v));
    }
    json without = document;
    json& parent = without[place.parent_pointer()];
    if (parent.is_object()) {
      parent.erase(place.back());
    } else {
      parent.erase(static_cast<size_t>(std::stoul(place.back())));
    }
    use(without.dump(), place.to_string() + " removed");
    // A key given twice, in the innermost object.
    const std::string text = document.dump(), key = json(place.back()).dump() + ":";
    if (const size_t at = text.find(key); at != std::string::npos) {
      use(std::string(text).insert(at, key + "0,"), place.to_string() + " doubled");
    }
  }
}

// Text that is not what it should be as a whole.
std::vector<std::string> HostileTexts(const std::string& good) {
  std::vector<std::string> texts = {
      "",
      " ",
      "{",
      "[]",
      "null",
      "{}",
      "{}{}",
      "\xff\xfe{}",
      good + "x",
      good + good,
      good + std::string(1, '\0'),
      "\xef\xbb\xbf" + good,
      std::string(10000, '['),
      std::string(100000, '{'),
      "{\"a\":" + std::string(10000, '[') + std::string(10000, ']') + "}",
      "{\"a\":1" + std::string(100000, '0') + "}",
      "{\"a\":1e999999}",
      "{\"\xc3\x28\":1}",
      "{\"\\ud800\":1}"};
  std::string deep;
  for (int i = 0; i < 10000; ++i) deep += "{\"a\":";
  texts.push_back(deep + "1" + std::string(10000, '}'));
  return texts;
}

std::string Damage(std::string bytes, size_t within, Random& random) {
  const auto below = [&](size_t n) {
    return static_cast<size_t>(random.Uniform() * static_cast<double>(n)) % n;
  };
  const size_t count = 1 + below(3);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = below(std::min(within, bytes.size()));
    switch (below(5)) {
      case 0:
        bytes[at] = static_cast<char>(below(256));
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 2:
        bytes.erase(at, 1 + below(9));
        break;
      case 3:
        bytes.insert(at, std::string(1 + below(9), static_cast<char>(below(256))));
        break;
      default:
        bytes.resize(std::max<size_t>(at, 1));
    }
    if (bytes.empty()) return "x";
  }
  return bytes;
}

TEST_F(HostileFiles, ConfigJson) {
  const Directory directory;
  Tally tally;
  const auto use = [&](const std::string& text, const std::string& what) {
    directory.Write("config.json", text);
    Try(directory.path(), "config.json " + what, tally);
  };
  const std::string good = TinyModel::Config().dump();
  use(good, "unchanged");
  ASSERT_EQ(tally.opened, 1);
  MutateJson(TinyModel::Config(), use);
  for (const std::string& text : HostileTexts(good)) use(text, text.substr(0, 40));
  Random random(1);
  for (int i = 0; i < 1500; ++i)
    use(Damage(good, good.size(), random), "damage " + std::to_string(i));
  Report("config.json", tally);
  EXPECT_GE(tally.files, 2000);
}

TEST_F(HostileFiles, SafetensorsHeader) {
  const Directory directory;
  Tally tally;
  const auto raw = [&](const std::string& bytes, const std::string& what) {
    directory.Write("model.safetensors", bytes);
    Try(directory.path(), "safetensors " + what, tally);
  };
  const auto use = [&](const std::string& header, const std::string& what) {
    raw(Directory::Safetensors(header), what);
  };
  const json header = TinyModel::SafetensorsHeader();
  use(header.dump(), "unchanged");
  ASSERT_EQ(tally.opened, 1);
  MutateJson(header, use);
  for (const std::string& text : HostileTexts(header.dump())) use(text, text.substr(0, 40));

  const std::string good = Directory::Safetensors(header.dump());
  for (const uint64_t length : {uint64_t{0}, uint64_t{1}, uint64_t{100'000'001}, UINT64_MAX,
                                UINT64_MAX - 7, uint64_t{good.size()}, uint64_t{good.size() - 8},
                                uint64_t{good.size() - 7}, uint64_t{1} << 63}) {
    std::string bytes = good;
    std::memcpy(bytes.data(), &length, sizeof(length));
    raw(bytes, "header length " + std::to_string(length));
  }
  raw(good + "trailing", "trailing bytes");
  raw(good.substr(0, good.size() - 1), "one byte short");
  // Overlap, gap and exchange of two tensors of one size.
  for (const int64_t shift : {-2, 2, -512, 512}) {
    json moved = header;
    json& offsets = moved["model.layers.0.self_attn.k_proj.weight"]["data_offsets"];
    offsets = {offsets[0].get<int64_t>() + shift, offsets[1].get<int64_t>() + shift};
    use(moved.dump(), "moved by " + std::to_string(shift));
  }
  // Products that wrap to what is there.
  for (const json& shape :
       {json{uint64_t{1} << 32, uint64_t{1} << 32}, json{UINT64_MAX, 0},
        json{uint64_t{1} << 63, 2, 16, 16}, json{16, 16, 1}, json{(uint64_t{1} << 60) + 16, 16}}) {
    json wraps = header;
    wraps["model.layers.0.self_attn.k_proj.weight"]["shape"] = shape;
    use(wraps.dump(), "shape " + shape.dump());
  }
  Random random(2);
  const size_t header_size = header.dump().size() + 8;
  for (int i = 0; i < 1500; ++i)
    raw(Damage(good, header_size, random), "damage " + std::to_string(i));
  Report("safetensors", tally);
  EXPECT_GE(tally.files, 3500);
}

TEST_F(HostileFiles, TokenizerJson) {
  const Directory directory;
  Tally tally;
  const auto use = [&](const std::string& text, const std::string& what) {
    directory.Write("tokenizer.json", text);
    Try(directory.path(), "tokenizer.json " + what, tally);
  };
  int opened = 0;
  Random random(3);
  for (const json& tokenizer : {TinyModel::Tokenizer(), TinyModel::SentencePieceTokenizer()}) {
    const std::string good = tokenizer.dump();
    use(good, "unchanged");
    ASSERT_GT(tally.opened, opened);
    MutateJson(tokenizer, use);
    for (const std::string& text : HostileTexts(good)) use(text, text.substr(0, 40));
    for (int i = 0; i < 700; ++i) {
      use(Damage(good, good.size(), random), "damage " + std::to_string(i));
    }
    opened = tally.opened;
  }
  directory.Restore();
  const auto also = [&](const char* name, const json& document) {
    MutateJson(document, [&](const std::string& text, const std::string& what) {
      directory.Write(name, text);
      Try(directory.path(), name + (" " + what), tally);
    });
    directory.Remove(name);
  };
  also("tokenizer_config.json",
       {{"bos_token", {{"content", "<s>"}}},
        {"eos_token", "</s>"},
        {"add_bos_token", true},
        {"chat_template", {{{"name", "default"}, {"template", "[INST]"}}}}});
  also("generation_config.json", {{"eos_token_id", {2, 3}}});
  Report("tokenizer.json", tally);
  EXPECT_GE(tally.files, 4000);
}

TEST_F(HostileFiles, ShardIndex) {
  const Directory directory;
  Tally tally;
  const json index = {{"weight_map", {{"model.norm.weight", "model.safetensors"}}}};
  MutateJson(index, [&](const std::string& text, const std::string& what) {
    directory.Write("model.safetensors.index.json", text);
    Try(directory.path(), "index " + what, tally);
  });
  Report("index", tally);
}

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

TEST_F(HostileFiles, GgufHeader) {
  Tally tally;
  const TempPath path(".gguf");
  const auto use = [&](const std::string& bytes, const std::string& what) {
    WriteFile(path.str(), bytes);
    Try(path.str(), "gguf " + what, tally);
  };
  int opened = 0;
  Random random(4);
  for (const bool sentence_piece : {false, true}) {
    const std::string good = TinyModel::Gguf(sentence_piece).Encode();
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
    use(good + "trailing", "trailing bytes");
    opened = tally.opened;
  }
  Report("gguf", tally);
  EXPECT_GE(tally.files, 6000);
}

TEST_F(HostileFiles, GgufThatRepeatsOverlapsOrIsVeryLarge) {
  Tally tally;
  const TempPath path(".gguf");
  const auto refused = [&](const GgufWriter& writer, const std::string& what) {
    const int before = tally.refused;
    WriteFile(path.str(), writer.Encode());
    Try(path.str(), what, tally);
    EXPECT_EQ(tally.refused, before + 1) << what;
  };
  GgufWriter twice = TinyModel::Gguf(false);
  twice.values.push_back(twice.values.front());
  refused(twice, "a key twice");
  GgufWriter again = TinyModel::Gguf(false);
  again.tensors.push_back(again.tensors.front());
  refused(again, "a tensor twice");
  GgufWriter overlap = TinyModel::Gguf(false);
  overlap.tensors[4].offset = overlap.tensors[3].offset + 32;
  refused(overlap, "an overlap");
  GgufWriter outside = TinyModel::Gguf(false);
  outside.tensors[4].offset = uint64_t{1} << 40;
  refused(outside, "an offset outside the file");
  GgufWriter nested = TinyModel::Gguf(false);
  nested.values.push_back(
      Bytes().Text("x").Put<uint32_t>(9).Put<uint32_t>(9).Put<uint64_t>(1).str());
  refused(nested, "an array of arrays");

  GgufWriter many = TinyModel::Gguf(false);
  const std::vector<GgufWriter::Tensor> real = many.tensors;
  for (int i = 0; i < 1'000'000; ++i) many.tensors.push_back({std::to_string(i), {1}, 0, 0, ""});
  refused(many, "a million tensors");
  GgufWriter long_key = TinyModel::Gguf(false);
  long_key.String(std::string(100'000'001, 'k'), "v");
  long_key.tensors[0].dims = {0};
  refused(long_key, "a key of 100 MB");
  Report("gguf, whole", tally);
}

TEST_F(HostileFiles, JsonThatIsVeryLarge) {
  const Directory directory;
  Tally tally;
  std::string many = "{";
  for (int i = 0; i < 1'000'000; ++i) many.append("\"").append(std::to_string(i)).append("\":0,");
  many.back() = '}';
  directory.Write("model.safetensors", Bytes().Text(many).str());
  Try(directory.path(), "a million tensors", tally);
  directory.Write("model.safetensors", Directory::Safetensors(std::string(100'000'001, ' ')));
  Try(directory.path(), "a header above 100 MB", tally);
  directory.Restore();
  directory.Write("config.json", "{\"a\":\"" + std::string(20'000'000, 'x') + "\"}");
  Try(directory.path(), "a config of 20 MB", tally);
  EXPECT_EQ(tally.refused, 3);
  Report("JSON, large", tally);
}

}  // namespace
}  // namespace passel::model
