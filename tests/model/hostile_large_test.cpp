// Files that are large, or that say so: see hostile_files_test.cpp.

#include "tests/model/hostile_files.h"

namespace passel::model {
namespace {

using nlohmann::json;

class HostileLarge : public HostileFiles {
 protected:
  void ExpectRefused(const std::string& path, const std::string& part) {
    const std::string message = Try(path, part, tally_);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  void TearDown() override { Report("large", tally_); }

  Tally tally_;
};

// The header of the model with a million tensors more, all without data. `last`: of the last one.
std::string Millions(const std::string& last) {
  std::string header = TinyModel::SafetensorsHeader().dump();
  const std::string end = std::to_string(TinyModel::SafetensorsData().size());
  header.back() = ',';
  for (int i = 0; i < 1'000'000; ++i) {
    header.append("\"").append(std::to_string(i));
    header.append(R"(":{"dtype":"F32","shape":[0],"data_offsets":[)").append(end).append(",");
    header.append(i == 999'999 ? last : end).append("]},");
  }
  header.back() = '}';
  return header;
}

TEST_F(HostileLarge, AMillionSafetensors) {
  const HostileDirectory directory;
  directory.Write("model.safetensors", HostileDirectory::Safetensors(Millions("0")));
  ExpectRefused(directory.path(), "tensor '999999': data_offsets: is [");
  const std::string end = std::to_string(TinyModel::SafetensorsData().size());
  directory.Write("model.safetensors", HostileDirectory::Safetensors(Millions(end)));
  ExpectRefused(directory.path(), "is not part of a dense mistral model");
}

TEST_F(HostileLarge, AMillionTensorsInGguf) {
  const TempPath path(".gguf");
  const auto write = [&](uint64_t shift) {
    GgufWriter writer = TinyModel::Gguf(false);
    uint64_t offset = 0;
    for (const GgufWriter::Tensor& t : writer.tensors) {
      offset += (t.data.size() + 31) / 32 * 32;
    }
    for (int i = 0; i < 1'000'000; ++i, offset += 32) {
      writer.tensors.push_back({std::to_string(i), {8}, 0, offset, ""});
    }
    writer.tensors.back().offset -= shift;
    const std::string bytes = writer.Encode();
    WriteFile(path.str(), bytes);
    std::filesystem::resize_file(path.str(), bytes.size() + 32'000'000);
  };
  write(32);
  ExpectRefused(path.str(), "overlaps tensor '999998'");
  write(0);
  ExpectRefused(path.str(), "is not part of a dense llama model");
}

// Each claims what its 16 GB could hold, which nothing was written to.
TEST_F(HostileLarge, SparseGgufs) {
  constexpr uint64_t kSize = uint64_t{16} << 30;
  const TempPath path(".gguf");
  const auto sparse = [&](const std::string& bytes, const std::string& part) {
    WriteFile(path.str(), bytes);
    std::filesystem::resize_file(path.str(), kSize);
    ExpectRefused(path.str(), part);
  };
  const std::string array = Bytes()
                                .Raw("GGUF")
                                .Put<uint32_t>(3)
                                .Put<uint64_t>(1)
                                .Put<uint64_t>(2)
                                .Text("a")
                                .Put<uint32_t>(9)
                                .str();
  for (uint32_t type = 0; type <= 12; ++type) {
    if (type == 9) continue;
    for (const uint64_t count : {uint64_t{1} << 30, uint64_t{1} << 33, kSize / 8 - 100}) {
      sparse(array + Bytes().Put(type).Put(count).str(), "a: is " + std::to_string(count));
    }
    // As many as a header can hold; then an empty key and a tensor without dimensions.
    sparse(array + Bytes().Put(type).Put(uint64_t{7} << 20).str(), "tensor '': has 0 dimensions");
  }
  const auto counts = [](uint64_t tensors, uint64_t values) {
    return Bytes().Raw("GGUF").Put<uint32_t>(3).Put(tensors).Put(values).str();
  };
  sparse(counts(uint64_t{1} << 28, 0), "tensor count: is 268435456, more than");
  sparse(counts(0, uint64_t{1} << 30), "metadata count: is 1073741824, more than");
  sparse(counts(2'000'000, 0), "tensor ''");  // the first has no dimensions
  sparse(counts(0, 5'000'000), ": is given twice");
  sparse(counts(0, 1) + Bytes().Put(uint64_t{1} << 33).str(), "metadata key 0: needs 8589934592");
}

TEST_F(HostileLarge, SparseJson) {
  for (const char* name :
       {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "generation_config.json", "model.safetensors.index.json"}) {
    const HostileDirectory directory;
    directory.Write(name, "{");
    std::filesystem::resize_file(directory.path() + "/" + name, uint64_t{16} << 30);
    ExpectRefused(directory.path(), "has 17179869184 bytes; expected at most");
  }
  const HostileDirectory directory;
  directory.Write("model.safetensors", Bytes().Put(uint64_t{100'000'000}).Raw("{").str());
  std::filesystem::resize_file(directory.path() + "/model.safetensors", uint64_t{16} << 30);
  ExpectRefused(directory.path(), "header: expected JSON");
  directory.Write("model.safetensors",
                  HostileDirectory::Safetensors(std::string(100'000'001, ' ')));
  ExpectRefused(directory.path(), "header length: is 100000001");
}

TEST_F(HostileLarge, JsonOfManySmallValues) {
  for (const char* value : {"0,", "{},", "[],", "\"\","}) {
    const HostileDirectory directory;
    std::string text = "{\"model\":[";
    for (int i = 0; i < (1 << 23); ++i) text += value;
    directory.Write("tokenizer.json", text + "0]}");
    ExpectRefused(directory.path(), "has more than 8388608 values");
    text.resize(text.size() - 4 * std::string(value).size());
    directory.Write("tokenizer.json", text + "0]}");
    ExpectRefused(directory.path(), "model: expected a JSON object");
  }
}

// Refused before \s is written out, which takes fifty times as much, and before it is compiled.
TEST_F(HostileLarge, ALongPattern) {
  const HostileDirectory directory;
  json tokenizer = TinyModel::Tokenizer();
  json& pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
  const auto write = [&](size_t spaces) {
    std::string text;
    for (size_t i = 0; i < spaces; ++i) text += R"(\s)";
    pattern = text;
    directory.Write("tokenizer.json", tokenizer.dump());
  };
  write(size_t{32} << 10);
  ExpectRefused(directory.path(), "regular expression is too large");
  tally_.most_bytes = 0;
  write(size_t{8} << 20);
  ExpectRefused(directory.path(), "pattern has 16777216 bytes; expected at most 65536");
  EXPECT_LT(tally_.most_bytes, 8 * (int64_t{16} << 20));
}

TEST_F(HostileLarge, IdsFarApart) {
  const HostileDirectory directory;
  json config = TinyModel::Config();
  config["vocab_size"] = 1 << 26;
  directory.Write("config.json", config.dump());
  json header = TinyModel::SafetensorsHeader();
  const std::string name = "model.embed_tokens.weight";
  const uint64_t more = ((uint64_t{1} << 26) - TinyModel::kVocab) * TinyModel::kHidden * 2;
  for (auto& [tensor, entry] : header.items()) {
    if (tensor == "__metadata__") continue;
    json& offsets = entry["data_offsets"];
    if (tensor != name) offsets[0] = offsets[0].get<uint64_t>() + more;
    offsets[1] = offsets[1].get<uint64_t>() + more;
  }
  header[name]["shape"][0] = 1 << 26;
  const std::string bytes = HostileDirectory::Safetensors(header.dump());
  directory.Write("model.safetensors", bytes);
  std::filesystem::resize_file(directory.path() + "/model.safetensors", bytes.size() + more);
  EXPECT_EQ(Try(directory.path(), "a large vocabulary", tally_), "");
  json tokenizer = TinyModel::Tokenizer();
  tokenizer["added_tokens"].push_back({{"id", (1 << 26) - 1}, {"content", "last"}});
  directory.Write("tokenizer.json", tokenizer.dump());
  ExpectRefused(directory.path(), "\"last\" has id 67108863; expected one below");
}

}  // namespace
}  // namespace passel::model
