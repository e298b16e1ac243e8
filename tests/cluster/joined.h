#pragma once

#include <cstddef>
#include <vector>

#include "cluster/messages.h"

namespace passel::cluster {

// A payload as it arrives.
inline std::vector<std::byte> Joined(std::vector<std::byte> entries, const Pieces& pieces) {
  for (const auto& piece : pieces) entries.insert(entries.end(), piece.begin(), piece.end());
  return entries;
}

}  // namespace passel::cluster
