#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace passel {

// Objects that are used again for the memory they have: work that comes layer after layer needs as
// much each time, and memory that the system has just given costs more than what is written to it.
// `size_of` gives an object's bytes; larger ones than `largest`, and more than `most`, are not
// kept. From any thread.
template <typename T>
class Recycler {
 public:
  Recycler(size_t most, uint64_t largest, uint64_t (*size_of)(const T&))
      : shared_(std::make_shared<Shared>(most, largest, size_of)) {}

  // A new object, or one as it was left; it comes back with the last reference, from whichever
  // thread, and also where the recycler is gone.
  std::shared_ptr<T> Take() {
    std::unique_ptr<T> object;
    {
      const std::lock_guard lock(shared_->mutex);
      if (!shared_->free.empty()) {
        object = std::move(shared_->free.back());
        shared_->free.pop_back();
      }
    }
    if (object == nullptr) object = std::make_unique<T>();
    return {object.release(), [shared = shared_](T* used) {
              std::unique_ptr<T> owner(used);
              if (shared->size_of(*used) > shared->largest) return;
              const std::lock_guard lock(shared->mutex);
              if (shared->free.size() < shared->most) shared->free.push_back(std::move(owner));
            }};
  }

 private:
  struct Shared {
    Shared(size_t m, uint64_t l, uint64_t (*s)(const T&)) : most(m), largest(l), size_of(s) {
      free.reserve(most);
    }
    const size_t most;
    const uint64_t largest;
    uint64_t (*const size_of)(const T&);
    std::mutex mutex;
    std::vector<std::unique_ptr<T>> free;
  };
  std::shared_ptr<Shared> shared_;
};

}  // namespace passel
