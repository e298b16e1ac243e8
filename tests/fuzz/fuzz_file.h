#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "runtime/base/error.h"

namespace passel {

// The input of a fuzz target as a file in memory, which readers open by its path.
class FuzzFile {
 public:
  FuzzFile(const uint8_t* data, size_t size) : fd_(::memfd_create("fuzz", 0)) {
    if (fd_ < 0) std::abort();
    for (size_t done = 0; done < size;) {
      const ssize_t n = ::write(fd_, data + done, size - done);
      if (n <= 0) std::abort();
      done += static_cast<size_t>(n);
    }
  }
  ~FuzzFile() { ::close(fd_); }
  FuzzFile(const FuzzFile&) = delete;
  FuzzFile& operator=(const FuzzFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

// A short text for a tokenizer: what the tokens of the corpus are found in, then the input's end.
inline std::string FuzzText(const uint8_t* data, size_t size) {
  const size_t tail = size < 64 ? size : 64;
  return "abc a<s> \u00e9\xff</s>  d" +
         std::string(reinterpret_cast<const char*>(data + size - tail), tail);
}

// Runs `parse`; an Error about the model is as good as success, whatever else it throws ends the
// process.
template <typename Parse>
void Survives(const Parse& parse) {
  try {
    parse();
  } catch (const Error& e) {
    if (e.error_class() != ErrorClass::kModel) std::abort();
  }
}

}  // namespace passel
