#include "gpu/cpu/cpu_device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::gpu {
namespace cpu {
namespace {

class DoneEvent final : public Event {
 public:
  bool Done() override { return true; }
  void Wait() override {}
};

class PanelLinear final : public Linear {
 public:
  PanelLinear(int64_t out, std::unique_ptr<PanelMatrix> matrix)
      : out_(out), matrix_(std::move(matrix)) {}
  int64_t in_features() const override { return matrix_->in(); }
  int64_t out_features() const override { return out_; }
  const PanelMatrix& matrix() const { return *matrix_; }

 private:
  int64_t out_;
  std::unique_ptr<PanelMatrix> matrix_;
};

const PanelLinear& AsPanels(const Linear& w) {
  const auto* panels = dynamic_cast<const PanelLinear*>(&w);
  Check(panels != nullptr, "Linear of another device");
  return *panels;
}

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) {
      const size_t colon = line.find(": ");
      if (colon != std::string::npos) return line.substr(colon + 2);
    }
  }
  return "x86-64";
}

class ForeignBuffer final : public Buffer {
 public:
  explicit ForeignBuffer(std::span<std::byte> memory) : memory_(memory) {}
  void* data() const override { return memory_.data(); }
  size_t bytes() const override { return memory_.size(); }

 private:
  std::span<std::byte> memory_;
};

}  // namespace

CpuDevice::CpuDevice(const DeviceOptions& options, const Kernels& kernels)
    : kernels_(kernels),
      deterministic_(options.deterministic),
      activation_(HasBf16Arithmetic() ? DType::kBf16 : DType::kF32),
      ledger_(std::make_shared<Ledger>(options.memory_limit_bytes > 0 ? options.memory_limit_bytes
                                                                      : MachineMemoryBytes())),
      context_(kernels, options.threads) {}

DeviceInfo CpuDevice::info() const {
  std::string name = CpuName() + " (" + std::to_string(context_.executor.threads()) + " threads, " +
                     kernels_.name + (activation_ == DType::kBf16 ? ", bf16)" : ", f32)");
  return {"CPU", std::move(name), ledger_->limit};
}

std::unique_ptr<Buffer> CpuDevice::Allocate(size_t bytes) { return MakeBuffer(ledger_, bytes); }

std::unique_ptr<Buffer> CpuDevice::AllocateStaging(size_t bytes) {
  return MakeBuffer(nullptr, bytes);
}

std::unique_ptr<Buffer> CpuDevice::PinStaging(std::span<std::byte> memory) {
  return std::make_unique<ForeignBuffer>(memory);
}

void CpuDevice::CopyToDevice(void* device, const void* host, size_t bytes) {
  if (bytes > 0 && device != host) std::memmove(device, host, bytes);
}

void CpuDevice::CopyToHost(void* host, const void* device, size_t bytes) {
  if (bytes > 0 && device != host) std::memmove(host, device, bytes);
}

std::unique_ptr<Event> CpuDevice::Record() { return std::make_unique<DoneEvent>(); }

std::unique_ptr<Linear> CpuDevice::MakeLinear(int64_t out_features, int64_t in_features,
                                              const RowReader& rows) {
  Check(out_features > 0 && in_features > 0, "MakeLinear: empty matrix");
  const auto panels = static_cast<int64_t>(CeilDiv(static_cast<uint64_t>(out_features), kPanel));
  auto matrix = std::make_unique<PanelMatrix>(
      context_, ledger_, activation_, DType::kBf16, panels, in_features,
      [&](int64_t p, void* data) {
        const int64_t first = p * kPanel;
        const int64_t count = std::min(kPanel, out_features - first);
        auto* out = static_cast<bf16*>(data);
        rows(first, count, out);
        std::fill(out + count * in_features, out + kPanel * in_features, bf16{0});
      });
  return std::make_unique<PanelLinear>(out_features, std::move(matrix));
}

void CpuDevice::MatMul(const Linear& w, Tensor x, Tensor out) {
  const PanelMatrix& matrix = AsPanels(w).matrix();
  const int64_t features = w.out_features();
  Check(x.type == activation_ && x.cols == matrix.in(), "MatMul: x does not fit the weight");
  Check(out.type == DType::kF32 && out.rows == x.rows && out.cols == features,
        "MatMul: out does not fit x and the weight");
  matrix.Multiply(context_, x.data, x.rows, x.stride, deterministic_,
                  [&](int64_t p, int64_t row, int64_t count, const float* tile) {
                    const int64_t first = p * kPanel;
                    const auto bytes =
                        static_cast<size_t>(std::min(kPanel, features - first)) * sizeof(float);
                    for (int64_t i = 0; i < count; ++i) {
                      std::memcpy(RowPtr<float>(out, row + i) + first, tile + i * kPanel, bytes);
                    }
                  });
}

void CpuDevice::Embed(const Linear& table, std::span<const int32_t> ids, Tensor out) {
  const PanelMatrix& matrix = AsPanels(table).matrix();
  const auto n = static_cast<int64_t>(ids.size());
  Check(out.type == DType::kF32 && out.cols == matrix.in() && out.rows == n,
        "Embed: shapes disagree");
  const auto& offsets = matrix.layout().row_offsets();
  ForRows(n, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t id = ids[static_cast<size_t>(i)];
      Check(id < table.out_features(), "Embed: id out of range");
      float* row = RowPtr<float>(out, i);
      if (id < 0) {
        std::fill(row, row + out.cols, 0.0f);
        continue;
      }
      const auto* panel = static_cast<const bf16*>(matrix.panel(id / kPanel));
      const int64_t base = matrix.layout().col_offsets()[static_cast<size_t>(id % kPanel)];
      for (size_t j = 0; j < offsets.size(); ++j) {
        const int64_t at = base + offsets[j];
        row[j] = ToFloat(panel[at]);
      }
    }
  });
}

const float* CpuDevice::RowAsF32(const Tensor& t, int64_t i, int64_t n, float* row) const {
  if (t.type == DType::kF32) return RowPtr<float>(t, i);
  kernels_.to_f32(RowPtr<bf16>(t, i), row, n);
  return row;
}

void CpuDevice::WriteRow(const float* row, int64_t n, const Tensor& t, int64_t i) const {
  if (t.type == DType::kF32) {
    if (RowPtr<float>(t, i) != row) std::copy(row, row + n, RowPtr<float>(t, i));
  } else {
    kernels_.to_bf16(row, RowPtr<bf16>(t, i), n);
  }
}

void CpuDevice::Convert(Tensor in, Tensor out) {
  Check(in.rows == out.rows && in.cols == out.cols, "Convert: shapes disagree");
  Check((in.type == DType::kF32 || in.type == DType::kBf16) &&
            (out.type == DType::kF32 || out.type == DType::kBf16),
        "Convert: f32 and bf16 only");
  ForRows(in.rows, in.cols, [&](int64_t begin, int64_t end) {
    float* buffer = row_scratch_.local().Get<float>(in.cols);
    for (int64_t i = begin; i < end; ++i) {
      WriteRow(RowAsF32(in, i, in.cols, buffer), in.cols, out, i);
    }
  });
}

}  // namespace cpu

std::unique_ptr<Device> MakeCpuDevice(const DeviceOptions& options) {
  const char* forced = std::getenv("PASSEL_ISA");
  return std::make_unique<cpu::CpuDevice>(options, cpu::SelectKernels(forced ? forced : ""));
}

}  // namespace passel::gpu
