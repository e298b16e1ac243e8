#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace passel::model {

// A read-only memory-mapped file. The mapping lives as long as the object.
class MappedFile {
 public:
  // Throws Error{kModel} naming the path.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Takes the pages of a stretch of mapped file out of this process's memory. The system may keep
// what it has read of the file; to touch the stretch again maps it again.
void ReleasePages(std::span<const uint8_t> mapped);

}  // namespace passel::model
