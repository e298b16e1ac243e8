#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "runtime/base/error.h"

namespace passel::engine {

// Hands out the pages of a device's KV pool.
class KvPages {
 public:
  explicit KvPages(int32_t pages) : free_(static_cast<size_t>(pages)) {
    std::iota(free_.rbegin(), free_.rend(), 0);
  }

  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  std::vector<int32_t> Take(int64_t count) {
    Check(count <= free(), "the KV pool has too few pages");
    std::vector<int32_t> out(free_.end() - count, free_.end());
    free_.resize(free_.size() - static_cast<size_t>(count));
    return out;
  }
  void Return(const std::vector<int32_t>& pages) {
    free_.insert(free_.end(), pages.begin(), pages.end());
  }

 private:
  std::vector<int32_t> free_;
};

}  // namespace passel::engine
