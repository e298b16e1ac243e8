#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gpu/device.h"
#include "runtime/base/bf16.h"
#include "runtime/base/random.h"

namespace passel::gpu {

// The device under test: the same tests are linked with cpu_backend.cpp and with cuda_backend.cpp.
std::unique_ptr<Device> MakeTestDevice(const DeviceOptions& options);
std::string TestBackend();

// A matrix in device memory that tests fill and read as floats. `gap`: unused elements after a row.
class DeviceMatrix {
 public:
  DeviceMatrix(Device& device, DType type, int64_t rows, int64_t cols, int64_t gap = 0)
      : device_(device),
        buffer_(device.Allocate(static_cast<size_t>(rows * (cols + gap)) * SizeOf(type))) {
    tensor = {buffer_->data(), type, rows, cols, cols + gap};
    // Not zeros: results must not hang on what memory held before.
    const std::vector<std::byte> junk(buffer_->bytes(), std::byte{0x7f});
    device.CopyToDevice(buffer_->data(), junk.data(), junk.size());
    device.Record()->Wait();
  }

  DeviceMatrix& Set(std::span<const float> values) {
    for (int64_t i = 0; i < tensor.rows; ++i) {
      const float* row = values.data() + i * tensor.cols;
      std::vector<bf16> rounded;
      const void* source = row;
      if (tensor.type == DType::kBf16) {
        for (int64_t j = 0; j < tensor.cols; ++j) rounded.push_back(ToBf16(row[j]));
        source = rounded.data();
      }
      device_.CopyToDevice(tensor.Rows(i, 1).data, source,
                           static_cast<size_t>(tensor.cols) * SizeOf(tensor.type));
      device_.Record()->Wait();
    }
    return *this;
  }

  template <typename T>
  std::vector<T> Raw() const {
    std::vector<T> all(static_cast<size_t>(tensor.rows * tensor.cols));
    for (int64_t i = 0; i < tensor.rows; ++i) {
      device_.CopyToHost(all.data() + i * tensor.cols, tensor.Rows(i, 1).data,
                         static_cast<size_t>(tensor.cols) * sizeof(T));
    }
    device_.Record()->Wait();
    return all;
  }

  std::vector<float> Get() const {
    if (tensor.type == DType::kF32) return Raw<float>();
    std::vector<float> values;
    for (const bf16 x : Raw<bf16>()) values.push_back(ToFloat(x));
    return values;
  }

  Tensor tensor;

 private:
  Device& device_;
  std::unique_ptr<Buffer> buffer_;
};

inline std::vector<float> RandomFloats(Random& random, int64_t n, double scale = 1) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = static_cast<float>(random.Normal() * scale);
  return values;
}

inline std::vector<float> RoundToBf16(std::vector<float> values) {
  for (float& x : values) x = ToFloat(ToBf16(x));
  return values;
}

// RowReader over a row-major float matrix, converted.
inline RowReader ReaderOf(const std::vector<float>& w, int64_t cols) {
  return [&w, cols](int64_t begin, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count * cols; ++i) {
      out[i] = ToBf16(w[static_cast<size_t>(begin * cols + i)]);
    }
  };
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Relative error of rounding to the device's activation type.
inline double ActivationError(const Device& device) {
  return device.activation_type() == DType::kBf16 ? 1.0 / 256 : 1e-6;
}

}  // namespace passel::gpu
