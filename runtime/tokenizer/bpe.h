#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace passel {

// Token text → id.
using TokenIds = std::unordered_map<std::string_view, int32_t>;

// Byte-pair merges over token ids.
class MergeTable {
 public:
  struct Merge {
    int32_t rank;  // lower merges first
    int32_t id;    // of the merged token
  };

  // A pair given twice keeps the last.
  void Add(int32_t left, int32_t right, Merge merge) { merges_[Key(left, right)] = merge; }
  // Adds merges "left right", in rank order. Throws Error{kModel} where a side or the union is no
  // token.
  void AddAll(const std::vector<std::string>& merges, const TokenIds& ids);
  size_t size() const { return merges_.size(); }
  std::optional<Merge> Find(int32_t left, int32_t right) const {
    const auto it = merges_.find(Key(left, right));
    if (it == merges_.end()) return std::nullopt;
    return it->second;
  }
  // Merges `symbols` until no pair is left to, always the pair of lowest rank and, of equal ones,
  // the leftmost. O(n log n) for n symbols.
  void Apply(std::vector<int32_t>& symbols) const;

 private:
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace passel
