#include "runtime/tokenizer/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <queue>
#include <tuple>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel {
namespace {

struct Node {
  int32_t id;              // −1: merged away
  int64_t previous, next;  // −1: none
};

struct Candidate {
  int32_t rank;
  int64_t left;  // node
  int32_t id;    // what the pair becomes
  bool operator>(const Candidate& other) const {
    return std::tie(rank, left) > std::tie(other.rank, other.left);
  }
};

}  // namespace

void MergeTable::AddAll(const std::vector<std::string>& merges, const TokenIds& ids) {
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string_view merge = merges[rank];
    const size_t space = merge.find(' ');
    const auto id_of = [&](std::string_view token) {
      const auto it = ids.find(token);
      if (it == ids.end()) {
        throw Error(ErrorClass::kModel,
                    fmt::format("tokenizer: merge {} (\"{}\") needs \"{}\", which is no token; "
                                "expected two tokens whose union is a token",
                                rank, Printable(merge), Printable(token)));
      }
      return it->second;
    };
    if (space == std::string_view::npos) {
      throw Error(ErrorClass::kModel,
                  fmt::format("tokenizer: merge {} is \"{}\"; expected two tokens with a space "
                              "between them",
                              rank, Printable(merge)));
    }
    const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
    Add(id_of(left), id_of(right),
        {static_cast<int32_t>(rank), id_of(fmt::format("{}{}", left, right))});
  }
}

void MergeTable::Apply(std::vector<int32_t>& symbols) const {
  if (symbols.size() < 2) return;
  std::vector<Node> nodes(symbols.size());
  const auto count = static_cast<int64_t>(symbols.size());
  for (int64_t i = 0; i < count; ++i) {
    nodes[i] = {symbols[i], i - 1, i + 1 < count ? i + 1 : -1};
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](int64_t left) {
    if (left < 0 || nodes[left].next < 0) return;
    if (const auto merge = Find(nodes[left].id, nodes[nodes[left].next].id)) {
      queue.push({merge->rank, left, merge->id});
    }
  };
  for (int64_t i = 0; i < count; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& left = nodes[top.left];
    if (left.id < 0 || left.next < 0) continue;
    Node& right = nodes[left.next];
    // An earlier merge may have changed either side since the pair was offered.
    const auto merge = Find(left.id, right.id);
    if (!merge || merge->id != top.id || merge->rank != top.rank) continue;
    left.id = top.id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) nodes[left.next].previous = top.left;
    offer(left.previous);
    offer(top.left);
  }
  symbols.clear();
  for (int64_t i = 0; i >= 0; i = nodes[i].next) symbols.push_back(nodes[i].id);
}

}  // namespace passel
