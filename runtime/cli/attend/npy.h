#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace passel::cli {

struct NpyArray {
  std::vector<uint64_t> shape;
  std::vector<float> data;  // row-major
};

// Reads a NumPy .npy file (format 1 to 3) of little-endian float32 in C order with `dimensions`
// dimensions, all values finite. Throws Error{kIo} naming the file and what is wrong with it; sizes
// are checked against the file's before memory is taken.
NpyArray ReadNpy(const std::string& path, size_t dimensions);
// The product of shape must be the size of data. Throws Error{kIo}.
void WriteNpy(const std::string& path, const std::vector<uint64_t>& shape,
              std::span<const float> data);
void WriteNpy(const std::string& path, const std::vector<uint64_t>& shape,
              std::span<const int64_t> data);

}  // namespace passel::cli
