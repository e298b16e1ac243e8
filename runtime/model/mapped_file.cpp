#include "runtime/model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "runtime/base/error.h"

namespace passel::model {
namespace {

[[noreturn]] void Fail(const std::string& path, const std::string& what) {
  throw Error(ErrorClass::kModel, path + ": " + what);
}

bool IsLfsPointer(const void* data, size_t size) {
  return std::string_view(static_cast<const char*>(data), size)
      .starts_with("version https://git-lfs.github.com/spec/v1\n");
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK, a FIFO would wait for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) Fail(path, std::string("cannot open the model file: ") + std::strerror(errno));
  struct stat info {};
  std::string problem;
  if (::fstat(fd, &info) != 0) {
    problem = std::string("cannot read the file's size: ") + std::strerror(errno);
  } else if (!S_ISREG(info.st_mode)) {
    problem = "not a regular file; expected a model file";
  } else if (info.st_size == 0) {
    problem = "the file is empty; expected a model file";
  } else {
    void* map = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
      problem = std::string("cannot map the file: ") + std::strerror(errno);
    } else if (IsLfsPointer(map, static_cast<size_t>(info.st_size))) {
      ::munmap(map, static_cast<size_t>(info.st_size));
      problem =
          "is a Git LFS pointer; expected the file that it stands for, which has yet to be fetched "
          "(git lfs pull)";
    } else {
      data_ = static_cast<const uint8_t*>(map);
      size_ = static_cast<size_t>(info.st_size);
    }
  }
  ::close(fd);
  if (!problem.empty()) Fail(path, problem);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

void ReleasePages(std::span<const uint8_t> mapped) {
  if (mapped.empty()) return;
  static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(mapped.data());
  const uintptr_t first = begin - begin % page;
  // Pages at the ends that a neighbour shares go too, and come back by themselves. Advice: where it
  // is refused, the pages stay.
  ::madvise(reinterpret_cast<void*>(first), begin + mapped.size() - first, MADV_DONTNEED);
}

}  // namespace passel::model
