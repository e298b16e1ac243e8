#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace passel {

struct SentencePiece {
  std::string text;
  float score = 0;
  int32_t type = 1;  // as SentencePiece and GGUF number it
};

// Protocol buffers' wire format, of messages without groups.
class WireReader {
 public:
  explicit WireReader(std::string_view bytes) : bytes_(bytes) {}

  // The next field; false at the end. `bytes`: of a string or message; `number`: of others.
  bool Next(uint64_t& field, uint64_t& number, std::string_view& bytes) {
    if (bytes_.empty()) return false;
    const uint64_t tag = Varint();
    field = tag >> 3;
    switch (tag & 7) {
      case 0:
        number = Varint();
        break;
      case 1:
        number = Fixed(8);
        break;
      case 5:
        number = Fixed(4);
        break;
      default: {
        const uint64_t size = Varint();
        bytes = bytes_.substr(0, size);
        bytes_.remove_prefix(bytes.size());
      }
    }
    return true;
  }

 private:
  uint64_t Fixed(size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, bytes_.data(), std::min(size, bytes_.size()));
    bytes_.remove_prefix(std::min(size, bytes_.size()));
    return value;
  }
  uint64_t Varint() {
    uint64_t value = 0;
    for (int shift = 0; !bytes_.empty(); shift += 7) {
      const auto byte = static_cast<uint8_t>(bytes_[0]);
      bytes_.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) break;
    }
    return value;
  }

  std::string_view bytes_;
};

// The pieces of a tokenizer.model; none where there is no such file.
inline std::vector<SentencePiece> ReadSentencePieces(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<SentencePiece> pieces;
  uint64_t field = 0, number = 0;
  std::string_view message;
  for (WireReader model(bytes); model.Next(field, number, message);) {
    if (field != 1) continue;
    SentencePiece piece;
    std::string_view text;
    for (WireReader reader(message); reader.Next(field, number, text);) {
      if (field == 1) piece.text = text;
      if (field == 2) std::memcpy(&piece.score, &number, sizeof(float));
      if (field == 3) piece.type = static_cast<int32_t>(number);
    }
    pieces.push_back(piece);
  }
  return pieces;
}

// The tokenizer.json that converters make of the pieces, with the added tokens of the fixture: two
// pieces merge wherever their union is one, those of the highest score first.
inline nlohmann::json SentencePieceJson(const std::vector<SentencePiece>& pieces) {
  using nlohmann::json;
  std::unordered_map<std::string_view, int64_t> ids;
  json vocabulary = json::object(), added = json::array();
  for (const SentencePiece& piece : pieces) {
    const auto id = static_cast<int64_t>(ids.size());
    ids[piece.text] = id;
    vocabulary[piece.text] = id;
    if (piece.type == 2 || piece.type == 3) {
      added.push_back({{"id", id}, {"content", piece.text}, {"special", true}});
    }
  }
  for (const char* text : {"<|turn|>", "[PAD]"}) {
    const bool normalized = text[0] == '[';
    added.push_back({{"id", vocabulary.size()}, {"content", text}, {"normalized", normalized}});
    vocabulary[text] = vocabulary.size();
  }
  std::vector<std::tuple<float, int64_t, int64_t, int64_t>> merges;  // −score, union, left, right
  for (const SentencePiece& piece : pieces) {
    for (size_t cut = 1; piece.type == 1 && cut < piece.text.size(); ++cut) {
      const std::string_view text = piece.text;
      const auto left = ids.find(text.substr(0, cut)), right = ids.find(text.substr(cut));
      if (left == ids.end() || right == ids.end()) continue;
      merges.emplace_back(-piece.score, ids[text], left->second, right->second);
    }
  }
  std::sort(merges.begin(), merges.end());
  json pairs = json::array();
  for (const auto& [score, whole, left, right] : merges) {
    pairs.push_back(
        {pieces[static_cast<size_t>(left)].text, pieces[static_cast<size_t>(right)].text});
  }
  return {{"added_tokens", added},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "\u2581"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}}},
          {"pre_tokenizer", nullptr},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", vocabulary},
            {"merges", pairs}}}};
}

}  // namespace passel
