// Ops of CpuDevice that treat rows or elements one by one.

#include <algorithm>
#include <cmath>
#include <vector>

#include "gpu/cpu/cpu_device.h"
#include "runtime/base/error.h"
#include "runtime/base/partial.h"

namespace passel::gpu::cpu {

void CpuDevice::AddRmsNorm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor out) {
  const int64_t n = residual.cols;
  Check(residual.type == DType::kF32 && weight.type == DType::kF32 && weight.cols == n &&
            weight.rows == 1,
        "AddRmsNorm: residual and weight disagree");
  Check(delta.data == nullptr ||
            (delta.type == DType::kF32 && delta.cols == n && delta.rows == residual.rows),
        "AddRmsNorm: delta does not fit residual");
  Check(out.rows == residual.rows && out.cols == n &&
            (out.type == DType::kF32 || out.type == activation_),
        "AddRmsNorm: out does not fit residual");
  ForRows(residual.rows, n, [&](int64_t begin, int64_t end) {
    float* buffer = row_scratch_.local().Get<float>(n);
    for (int64_t i = begin; i < end; ++i) {
      kernels_.add_rms_norm(RowPtr<float>(residual, i),
                            delta.data ? RowPtr<float>(delta, i) : nullptr,
                            RowPtr<float>(weight, 0), eps, n, buffer);
      WriteRow(buffer, n, out, i);
    }
  });
}

void CpuDevice::HeadRmsNorm(Tensor x, int32_t head_dim, Tensor weight, float eps) {
  Check(x.type == DType::kF32 && head_dim > 0 && x.cols % head_dim == 0 &&
            weight.type == DType::kF32 && weight.rows == 1 && weight.cols == x.cols,
        "HeadRmsNorm: shapes disagree");
  ForRows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < x.cols; h += head_dim) {
        float* head = RowPtr<float>(x, i) + h;
        kernels_.add_rms_norm(head, nullptr, RowPtr<float>(weight, 0) + h, eps, head_dim, head);
      }
    }
  });
}

void CpuDevice::Add(Tensor into, Tensor delta) {
  Check(into.type == DType::kF32 && delta.type == DType::kF32 && into.cols == delta.cols &&
            (delta.rows == into.rows || delta.rows == 1),
        "Add: shapes disagree");
  ForRows(into.rows, into.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels_.scale_add(RowPtr<float>(into, i), 1.0f,
                         RowPtr<float>(delta, delta.rows == 1 ? 0 : i), into.cols);
    }
  });
}

// Rows of a table: cosines, then sines.
void CpuDevice::RopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                          Tensor table) {
  CheckRopeTable(inv_freq, positions, table);
  const int64_t half = table.cols / 2;
  ForRows(table.rows, 16 * half, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = RowPtr<float>(table, i);
      for (int64_t j = 0; j < half; ++j) {
        // In double: at position 2^20 a float angle has an error of 0.03.
        const double angle = static_cast<double>(positions[static_cast<size_t>(i)]) *
                             static_cast<double>(inv_freq[static_cast<size_t>(j)]);
        row[j] = static_cast<float>(std::cos(angle));
        row[half + j] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

void CpuDevice::Rope(Tensor x, int32_t head_dim, Tensor table) {
  CheckRope(x, head_dim, table);
  const int64_t half = head_dim / 2;
  ForRows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = RowPtr<float>(x, i);
      const float* turns = RowPtr<float>(table, i);
      for (int64_t h = 0; h < x.cols; h += head_dim) {
        kernels_.rotate(row + h, turns, turns + half, half);
      }
    }
  });
}

void CpuDevice::SiluMul(Tensor gate_up, Tensor out) {
  Check(gate_up.type == DType::kF32 && gate_up.cols == 2 * out.cols && gate_up.rows == out.rows &&
            (out.type == DType::kF32 || out.type == activation_),
        "SiluMul: shapes disagree");
  const int64_t ffn = out.cols;
  ForRows(out.rows, 2 * ffn, [&](int64_t begin, int64_t end) {
    float* buffer = row_scratch_.local().Get<float>(ffn);
    for (int64_t i = begin; i < end; ++i) {
      const float* gate = RowPtr<float>(gate_up, i);
      kernels_.silu_mul(gate, gate + ffn, buffer, ffn);
      WriteRow(buffer, ffn, out, i);
    }
  });
}

void CpuDevice::ColumnMean(Tensor x, Tensor mean) {
  Check((x.type == DType::kF32 || x.type == DType::kBf16) && mean.type == DType::kF32 &&
            mean.rows == 1 && mean.cols == x.cols && x.rows > 0,
        "ColumnMean: shapes disagree");
  constexpr int64_t kColumns = 64;  // of a task; each sums its columns over all rows in order
  const int64_t parts = (x.cols + kColumns - 1) / kColumns;
  context_.executor.For(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kColumns;
      const int64_t count = std::min(kColumns, x.cols - first);
      const Tensor columns = x.Cols(first, count);
      double sums[kColumns] = {};
      float buffer[kColumns];
      for (int64_t i = 0; i < x.rows; ++i) {
        const float* row = RowAsF32(columns, i, count, buffer);
        for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(row[j]);
      }
      for (int64_t j = 0; j < count; ++j) {
        RowPtr<float>(mean, 0)[first + j] =
            static_cast<float>(sums[j] / static_cast<double>(x.rows));
      }
    }
  });
}

namespace {

int64_t CheckPartials(const Partials& p, const char* what, bool may_be_bf16 = false) {
  Check(p.max.type == DType::kF32 && p.den.type == DType::kF32 &&
            (p.num.type == DType::kF32 || (may_be_bf16 && p.num.type == DType::kBf16)) &&
            p.den.rows == p.max.rows && p.num.rows == p.max.rows && p.den.cols == p.max.cols &&
            p.max.cols > 0 && p.num.cols % p.max.cols == 0,
        what);
  return p.num.cols / p.max.cols;
}

}  // namespace

void CpuDevice::ClearPartials(Partials partials) {
  CheckPartials(partials, "ClearPartials: shapes disagree");
  for (int64_t i = 0; i < partials.max.rows; ++i) {
    std::fill_n(RowPtr<float>(partials.max, i), partials.max.cols, kEmptyMax);
    std::fill_n(RowPtr<float>(partials.den, i), partials.den.cols, 0.0f);
    std::fill_n(RowPtr<float>(partials.num, i), partials.num.cols, 0.0f);
  }
}

void CpuDevice::MergePartials(Partials into, Partials from, std::span<const int32_t> rows,
                              std::span<const int32_t> first_heads) {
  const int64_t head_dim = CheckPartials(into, "MergePartials: shapes of `into` disagree");
  Check(CheckPartials(from, "MergePartials: shapes of `from` disagree", true) == head_dim,
        "MergePartials: head_dim differs");
  Check(static_cast<int64_t>(rows.size()) == from.max.rows && first_heads.size() == rows.size(),
        "MergePartials: one row and head index per partial");
  for (int64_t i = 0; i < from.max.rows; ++i) {
    const int64_t row = rows[static_cast<size_t>(i)];
    const int64_t first = first_heads[static_cast<size_t>(i)];
    Check(row >= 0 && row < into.max.rows && first >= 0 && first <= into.max.cols - from.max.cols,
          "MergePartials: row or head out of range");
    float* buffer = row_scratch_.local().Get<float>(from.num.cols);
    const float* num = RowAsF32(from.num, i, from.num.cols, buffer);
    for (int64_t h = 0; h < from.max.cols; ++h) {
      const PartialRef target{RowPtr<float>(into.max, row) + first + h,
                              RowPtr<float>(into.den, row) + first + h,
                              RowPtr<float>(into.num, row) + (first + h) * head_dim};
      MergePartial(target, RowPtr<float>(from.max, i)[h], RowPtr<float>(from.den, i)[h],
                   num + h * head_dim, static_cast<size_t>(head_dim));
    }
  }
}

void CpuDevice::NormalizePartials(Partials partials, Tensor out) {
  const int64_t head_dim = CheckPartials(partials, "NormalizePartials: shapes disagree");
  Check(out.rows == partials.num.rows && out.cols == partials.num.cols &&
            (out.type == DType::kF32 || out.type == activation_),
        "NormalizePartials: out does not fit");
  ForRows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    float* buffer = row_scratch_.local().Get<float>(out.cols);
    for (int64_t i = begin; i < end; ++i) {
      const float* num = RowPtr<float>(partials.num, i);
      for (int64_t h = 0; h < partials.max.cols; ++h) {
        const float den = RowPtr<float>(partials.den, i)[h];
        const float inverse = den > 0 ? 1.0f / den : 0.0f;
        for (int64_t j = h * head_dim; j < (h + 1) * head_dim; ++j) buffer[j] = num[j] * inverse;
      }
      WriteRow(buffer, out.cols, out, i);
    }
  });
}

}  // namespace passel::gpu::cpu
