#include "gpu/device.h"

#include "runtime/base/error.h"

namespace passel::gpu {

size_t SizeOf(DType type) {
  switch (type) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBf16:
    case DType::kU16:
      return 2;
  }
  ThrowBug("DType out of range", std::source_location::current());
}

Tensor Tensor::Rows(int64_t begin, int64_t count) const {
  Check(begin >= 0 && count >= 0 && begin <= rows - count, "Tensor::Rows: out of range");
  Tensor t = *this;
  t.data = static_cast<char*>(data) + static_cast<size_t>(begin * stride) * SizeOf(type);
  t.rows = count;
  return t;
}

Tensor Tensor::Cols(int64_t begin, int64_t count) const {
  Check(begin >= 0 && count >= 0 && begin <= cols - count, "Tensor::Cols: out of range");
  Tensor t = *this;
  t.data = static_cast<char*>(data) + static_cast<size_t>(begin) * SizeOf(type);
  t.cols = count;
  return t;
}

void CheckRopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                    const Tensor& table) {
  Check(table.type == DType::kF32 && table.stride == table.cols &&
            2 * static_cast<int64_t>(inv_freq.size()) == table.cols &&
            static_cast<int64_t>(positions.size()) == table.rows,
        "RopeTable: shapes disagree");
}

void CheckRope(const Tensor& x, int32_t head_dim, const Tensor& table) {
  Check(x.type == DType::kF32 && head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0 &&
            table.type == DType::kF32 && table.rows == x.rows && table.cols == head_dim &&
            table.stride == table.cols,
        "Rope: shapes disagree");
}

void CheckPackKv(const Tensor& k, const Tensor& v, const Tensor& packed) {
  const bool bf16s =
      k.type == DType::kBf16 && v.type == DType::kBf16 && packed.type == DType::kBf16;
  const int64_t dim = packed.cols / 2;
  Check(bf16s && v.rows == k.rows && v.cols == k.cols && dim > 0 && packed.cols == 2 * dim &&
            k.cols % dim == 0 && packed.rows == k.rows * (k.cols / dim),
        "PackKv, UnpackKv: shapes disagree");
}

bool FitCodes(const Tensor& codes, int64_t n, int64_t heads, int64_t l) {
  return (codes.rows == n && codes.cols == heads * l) ||
         (codes.rows == n * heads && codes.cols == l);
}

void Device::MatMulSumAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch,
                          Collectives& ranks) {
  if (ranks.size() == 1) return MatMulAdd(w, x, into, scratch);
  Check(scratch.stride == scratch.cols, "MatMulSumAdd: scratch has gaps");
  MatMul(w, x, scratch);
  ranks.AllReduceSum(
      {static_cast<float*>(scratch.data), static_cast<size_t>(scratch.rows * scratch.cols)});
  Add(into, scratch);
}

}  // namespace passel::gpu
