// Files that say what they should not: every header field of every format set to values chosen to
// break a reader, and random damage on top. Each opens, or ends in one Error that names it; never
// anything else, and soon. Meant to run under the address and undefined behaviour sanitizers.

#include "tests/model/hostile_files.h"

#include <sys/stat.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <future>

namespace passel::model {
namespace {

using nlohmann::json;

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
          std::string(1, '\0'),
          std::string("a\0b", 3),
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

TEST_F(HostileFiles, ConfigJson) {
  const HostileDirectory directory;
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
  for (const char* architecture : {"qwen2", "qwen3"}) {
    const int opened = tally.opened;
    directory.WriteWeights(architecture);
    const json config = TinyModel::QwenConfig(architecture);
    use(config.dump(), architecture);
    EXPECT_EQ(tally.opened, opened + 1);
    MutateJson(config, use);
  }
  Report("config.json", tally);
  EXPECT_GE(tally.files, 2000);
}

TEST_F(HostileFiles, SafetensorsHeader) {
  const HostileDirectory directory;
  Tally tally;
  const auto raw = [&](const std::string& bytes, const std::string& what) {
    directory.Write("model.safetensors", bytes);
    return Try(directory.path(), "safetensors " + what, tally);
  };
  const auto use = [&](const std::string& header, const std::string& what) {
    return raw(HostileDirectory::Safetensors(header), what);
  };
  const json header = TinyModel::SafetensorsHeader();
  use(header.dump(), "unchanged");
  ASSERT_EQ(tally.opened, 1);
  MutateJson(header, use);
  for (const std::string& text : HostileTexts(header.dump())) use(text, text.substr(0, 40));

  const std::string good = HostileDirectory::Safetensors(header.dump());
  for (const uint64_t length : {uint64_t{0}, uint64_t{1}, uint64_t{100'000'001}, UINT64_MAX,
                                UINT64_MAX - 7, uint64_t{good.size()}, uint64_t{good.size() - 8},
                                uint64_t{good.size() - 7}, uint64_t{1} << 63}) {
    std::string bytes = good;
    std::memcpy(bytes.data(), &length, sizeof(length));
    raw(bytes, "header length " + std::to_string(length));
  }
  EXPECT_NE(raw(good + "trailing", "trailing bytes").find("bytes of data; expected the"),
            std::string::npos);
  EXPECT_NE(raw(good.substr(0, good.size() - 1), "one byte short").find("data_offsets: is ["),
            std::string::npos);
  // The format allows neither overlap nor gap, nor data that the shape does not need.
  const auto refused = [&](const json& changed, const std::string& part) {
    const std::string message = use(changed.dump(), part);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  const std::string name = "model.layers.0.self_attn.k_proj.weight";
  for (const int64_t shift : {-512, -2, 2, 512}) {
    json moved = header;
    json& offsets = moved[name]["data_offsets"];
    offsets = {offsets[0].get<int64_t>() + shift, offsets[1].get<int64_t>() + shift};
    refused(moved, "data_offsets: begins at ");
  }
  json gap = header;
  gap[name]["data_offsets"][0] = gap[name]["data_offsets"][0].get<int64_t>() + 32;
  gap[name]["shape"] = {15, 16};
  refused(gap, "data_offsets: begins at ");
  json overlap = header;
  overlap[name]["data_offsets"][0] = overlap[name]["data_offsets"][0].get<int64_t>() - 32;
  overlap[name]["shape"] = {17, 16};
  refused(overlap, "data_offsets: begins at ");
  // Products that wrap, to what is there or to nothing; and one that fits, of another matrix.
  for (const json& shape :
       {json{uint64_t{1} << 32, uint64_t{1} << 32}, json{UINT64_MAX, 0},
        json{uint64_t{1} << 63, 2, 16, 16}, json{(uint64_t{1} << 60) + 16, 16}}) {
    json wraps = header;
    wraps[name]["shape"] = shape;
    refused(wraps, "data_offsets: spans 512 bytes");
  }
  json folded = header;
  folded[name]["shape"] = {16, 16, 1};
  refused(folded, "is [256, 1]; expected [16, 16]");
  Random random(2);
  const size_t header_size = header.dump().size() + 8;
  for (int i = 0; i < 1500; ++i)
    raw(Damage(good, header_size, random), "damage " + std::to_string(i));
  Report("safetensors", tally);
  EXPECT_GE(tally.files, 3500);
}

TEST_F(HostileFiles, TokenizerJson) {
  const HostileDirectory directory;
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
  also("special_tokens_map.json", {{"bos_token", {{"content", "<s>"}}}, {"eos_token", "</s>"}});
  also("generation_config.json", {{"eos_token_id", {2, 3}}});
  Report("tokenizer.json", tally);
  EXPECT_GE(tally.files, 4000);
}

constexpr const char* kNames[] = {"config.json",
                                  "tokenizer.json",
                                  "tokenizer_config.json",
                                  "special_tokens_map.json",
                                  "generation_config.json",
                                  "model.safetensors",
                                  "chat_template.jinja",
                                  "model.safetensors.index.json"};

// A FIFO that nobody writes to is not waited for.
TEST_F(HostileFiles, Fifos) {
  Tally tally;
  const auto expect_refused = [&](const std::string& fifo, const std::string& model) {
    ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0) << fifo;
    auto message = std::async(std::launch::async, [&] { return Try(model, fifo, tally); });
    if (message.wait_for(std::chrono::seconds(30)) != std::future_status::ready) {
      ADD_FAILURE() << fifo << " is waited for";
      std::ofstream writer(fifo);  // lets the reader go on
    }
    // A chat template that cannot be read is an unknown one.
    if (fifo.ends_with("chat_template.jinja")) {
      EXPECT_EQ(message.get(), "");
    } else {
      EXPECT_NE(message.get().find("not a regular file"), std::string::npos) << fifo;
    }
    std::filesystem::remove(fifo);
  };
  for (const char* name : kNames) {
    const HostileDirectory directory;
    directory.Remove(name);
    expect_refused(directory.path() + "/" + name, directory.path());
  }
  const TempPath gguf(".gguf");
  expect_refused(gguf.str(), gguf.str());
}

TEST_F(HostileFiles, GitLfsPointers) {
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:" + std::string(64, 'a') +
      "\nsize 4096\n";
  Tally tally;
  for (const char* name : kNames) {
    const HostileDirectory directory;
    directory.Write(name, pointer);
    const std::string message = Try(directory.path(), name, tally);
    EXPECT_NE(message.find("is a Git LFS pointer"), std::string::npos) << name << ": " << message;
  }
  const TempPath gguf(".gguf", pointer);
  EXPECT_NE(Try(gguf.str(), "GGUF", tally).find("is a Git LFS pointer"), std::string::npos);
}

TEST_F(HostileFiles, ShardIndex) {
  const HostileDirectory directory;
  Tally tally;
  const json index = {{"weight_map", {{"model.norm.weight", "model.safetensors"}}}};
  MutateJson(index, [&](const std::string& text, const std::string& what) {
    directory.Write("model.safetensors.index.json", text);
    Try(directory.path(), "index " + what, tally);
  });
  Report("index", tally);
}

}  // namespace
}  // namespace passel::model
