#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gpu/cpu/kernels.h"
#include "gpu/cpu/memory.h"
#include "gpu/cpu/panel_matrix.h"
#include "gpu/device.h"

namespace passel::gpu::cpu {

// Rows of a tensor as pointers. T must be what tensor.type says.
template <typename T>
T* RowPtr(const Tensor& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.stride;
}

// The device that computes on this process's cores. Work runs while it is issued, so events are
// always done. Each op is a file's worth of checks here and loops in kernels.inc.
class CpuDevice final : public Device {
 public:
  CpuDevice(const DeviceOptions& options, const Kernels& kernels);

  DeviceInfo info() const override;
  DType activation_type() const override { return activation_; }
  std::unique_ptr<Buffer> Allocate(size_t bytes) override;
  std::unique_ptr<Buffer> AllocateStaging(size_t bytes) override;
  std::unique_ptr<Buffer> PinStaging(std::span<std::byte> memory) override;
  uint64_t allocated_bytes() const override { return ledger_->used.load(); }
  void CopyToDevice(void* device, const void* host, size_t bytes) override;
  void CopyToHost(void* host, const void* device, size_t bytes) override;
  std::unique_ptr<Event> Record() override;

  std::unique_ptr<Linear> MakeLinear(int64_t out_features, int64_t in_features,
                                     const RowReader& rows) override;
  void MatMul(const Linear& w, Tensor x, Tensor out) override;
  std::unique_ptr<Collectives> MakeCollectives(std::unique_ptr<Collectives> host) override {
    return host;
  }

  void Embed(const Linear& table, std::span<const int32_t> ids, Tensor out) override;
  void AddRmsNorm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor out) override;
  void RopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                 Tensor table) override;
  void Rope(Tensor x, int32_t head_dim, Tensor table) override;
  void SiluMul(Tensor gate_up, Tensor out) override;
  void HeadRmsNorm(Tensor x, int32_t head_dim, Tensor weight, float eps) override;
  void Add(Tensor into, Tensor delta) override;
  void Convert(Tensor in, Tensor out) override;
  void Sample(Tensor x, std::span<const SamplingRule> rules, std::span<int32_t> ids) override;

  void CreateKvPool(const AttentionShape& shape, int32_t pages) override;
  void StoreKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
               Tensor v) override;
  void LoadKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
              Tensor v) override;
  void PackKv(Tensor k, Tensor v, Tensor out) override;
  void UnpackKv(Tensor in, Tensor k, Tensor v) override;
  void DecodeAttention(Tensor q, std::span<const KvView> views, Partials out) override;
  void CausalAttention(const AttentionShape& shape, Tensor q, Tensor k, Tensor v, int64_t start,
                       int64_t window, Tensor out) override;

  void SetProjections(std::span<const float> r, int32_t head_dim, int32_t k, int32_t l) override;
  void HashCodes(Tensor x, Tensor mean, Tensor codes) override;
  void ColumnMean(Tensor x, Tensor mean) override;

  void ClearPartials(Partials partials) override;
  void MergePartials(Partials into, Partials from, std::span<const int32_t> rows,
                     std::span<const int32_t> first_heads) override;
  void NormalizePartials(Partials partials, Tensor out) override;

 private:
  // n f32 values of a row of type f32 or bf16, through `row` where they must be converted.
  const float* RowAsF32(const Tensor& t, int64_t i, int64_t n, float* row) const;
  // Writes n f32 values to a row of type f32 or bf16.
  void WriteRow(const float* row, int64_t n, const Tensor& t, int64_t i) const;
  // f(begin, end) over rows of `cols` elements, in parts worth a task.
  template <typename F>
  void ForRows(int64_t rows, int64_t cols, const F& f) {
    constexpr int64_t kElementsOfTask = 16384;
    context_.executor.For(rows, std::max<int64_t>(1, kElementsOfTask / std::max<int64_t>(1, cols)),
                          f);
  }
  // The K row of a slot in the pool (its V row is head_dim behind), for KV head 0.
  bf16* SlotPtr(std::span<const int32_t> pages, int64_t slot) const;
  void CheckKvRows(std::span<const int64_t> slots, const Tensor& k, const Tensor& v) const;

  const Kernels& kernels_;
  const bool deterministic_;
  const DType activation_;
  std::shared_ptr<Ledger> ledger_;
  GemmContext context_;

  AttentionShape pool_shape_;
  int32_t pool_pages_ = 0;
  std::unique_ptr<Buffer> pool_;

  int32_t hash_dim_ = 0, hash_bits_ = 0, hash_tables_ = 0;
  std::unique_ptr<PanelMatrix> projections_;

  Scratch decode_scratch_, attention_scratch_, hash_scratch_;
  tbb::enumerable_thread_specific<Scratch> row_scratch_, score_scratch_, weight_scratch_;
};

}  // namespace passel::gpu::cpu
