#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gpu/cuda/check.h"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/memory.h"
#include "gpu/cuda/peer_memory.h"
#include "gpu/cuda/product_chain.h"
#include "gpu/cuda/upload_ring.h"
#include "gpu/device.h"
#ifdef PASSEL_CUDNN
#include "gpu/cuda/cudnn_attention.h"
#endif

namespace passel::gpu::cuda {

struct CudaWeight {
  std::unique_ptr<Buffer> memory;
  std::weak_ptr<CudaWeight> next;  // what was multiplied after this one the last time
  // Whether all ranks can put off a product with it that they sum; none: they have not been asked.
  std::optional<bool> all_can_put_off;
};

// A Device on one NVIDIA GPU: one stream, cuBLAS for products, own kernels for the rest. cuBLAS's
// workspace, scratch memory and the CUDA context do not count against the limit.
class CudaDevice final : public Device {
 public:
  CudaDevice(const DeviceOptions& options, std::string name, uint64_t usable_bytes);
  ~CudaDevice() override;

  DeviceInfo info() const override { return {"CUDA", name_, ledger_->limit, kMaxHeadDim}; }
  DType activation_type() const override { return DType::kBf16; }
  std::unique_ptr<Buffer> Allocate(size_t bytes) override;
  std::unique_ptr<Buffer> AllocateStaging(size_t bytes) override;
  std::unique_ptr<Buffer> PinStaging(std::span<std::byte> memory) override;
  uint64_t allocated_bytes() const override { return ledger_->used; }
  void CopyToDevice(void* device, const void* host, size_t bytes) override;
  void CopyToHost(void* host, const void* device, size_t bytes) override;
  std::unique_ptr<Event> Record() override;
  void Replay(std::unique_ptr<Recording>& recording, Collectives& ranks,
              const std::function<void()>& issue) override;
  std::unique_ptr<Linear> MakeLinear(int64_t out_features, int64_t in_features,
                                     const RowReader& rows) override;
  void MatMul(const Linear& w, Tensor x, Tensor out) override;
  void MatMulAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch) override;
  void MatMulSumAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch,
                    Collectives& ranks) override;
  void NormMatMul(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out,
                  Tensor normed) override;
  void NormMatMulSilu(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out, Tensor normed,
                      Tensor gate_up) override;
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
  std::unique_ptr<Collectives> MakeCollectives(std::unique_ptr<Collectives> host) override;

 private:
  struct Stream {
    Stream();
    ~Stream();
    cudaStream_t get = nullptr;
  };
  // The stream, to which what was put off has been issued; while recording, what records.
  cudaStream_t IssueTo();
  // Issues to the recording stream alone what `issue` issues.
  cudaGraphExec_t RecordGraph(const std::function<void()>& issue);
  void SetCublasStream(cudaStream_t stream);
  // Whether a product of w can be put off, to be one kernel with those that come next; completes
  // it.
  bool CanPutOff(const Linear& w, ChainedProduct* product) const;
  void PutOff(const Linear& w, const ChainedProduct& product);
  // The same on every rank, all of which must call it.
  bool AllCanPutOff(const Linear& w, ChainedProduct* product, Collectives& ranks) const;
  // Has the product put off last, where its result is x, write what the next one reads of norm(x).
  bool PutOffNorm(const Tensor& x, const Tensor& norm, const Tensor& normed);
  // Has the product put off last, where x is the first columns of its result, turn them.
  bool PutOffRope(const Tensor& x, int32_t head_dim, const void* table);

  void Multiply(const Linear& w, Tensor x, Tensor out, bool accumulate);
  void Product(const void* w, int64_t out_features, Tensor x, Tensor out, bool accumulate);
  // The beginning of what was multiplied after this weight the last time.
  Upcoming NextAfter(const std::shared_ptr<CudaWeight>& weight);
  const int64_t* UploadSlots(std::span<const int32_t> pages, std::span<const int64_t> slots,
                             const Tensor& k, const Tensor& v);

  std::string name_;
  bool deterministic_;
  int32_t local_ranks_;
  std::chrono::milliseconds peer_timeout_;
  std::shared_ptr<Ledger> ledger_;
  Stream stream_, recording_stream_;
  bool recording_ = false;
  bool put_off_since_ = false;  // whether a product was, since Replay asked last
  cublasHandle_t cublas_ = nullptr;
  Scratch workspace_;  // cuBLAS's
  UploadRing ring_;
  Scratch product_scratch_, decode_scratch_, mean_scratch_;

  std::weak_ptr<CudaWeight> last_weight_;

  std::vector<ChainedProduct> put_off_;
  std::vector<std::shared_ptr<CudaWeight>> put_off_weights_;
  std::unique_ptr<Buffer> chain_scratch_;
  int chain_turn_ = 0;
  std::shared_ptr<PeerMemory> peers_;  // where chains sum over the ranks; null: they do not

  std::unique_ptr<Buffer> pool_;
  AttentionShape pool_shape_;
  int32_t pool_pages_ = 0;

  std::unique_ptr<Buffer> projections_, hash_scratch_;
  int32_t hash_dim_ = 0, hash_bits_ = 0, hash_tables_ = 0;

#ifdef PASSEL_CUDNN
  CudnnAttention cudnn_attention_{stream_.get};
#endif
};

}  // namespace passel::gpu::cuda
