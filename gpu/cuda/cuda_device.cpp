#include "gpu/cuda/cuda_device.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <utility>

#include "runtime/base/error.h"

namespace passel::gpu {
namespace cuda {
namespace {

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(cudaStream_t stream) {
    CheckCuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
    const cudaError_t code = cudaEventRecord(event_, stream);
    if (code != cudaSuccess) cudaEventDestroy(event_);
    CheckCuda(code, "cudaEventRecord");
  }
  ~CudaEvent() override { cudaEventDestroy(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  bool Done() override {
    const cudaError_t code = cudaEventQuery(event_);
    if (code == cudaErrorNotReady) return false;
    CheckCuda(code, "cudaEventQuery");
    return true;
  }
  void Wait() override { CheckCuda(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// [out, in] bf16, row-major.
class CudaLinear final : public Linear {
 public:
  CudaLinear(int64_t out, int64_t in, std::shared_ptr<CudaWeight> weight)
      : out_(out), in_(in), weight_(std::move(weight)) {}
  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }
  void* data() const { return weight_->memory->data(); }
  const std::shared_ptr<CudaWeight>& weight() const { return weight_; }

 private:
  int64_t out_, in_;
  std::shared_ptr<CudaWeight> weight_;
};

const CudaLinear& AsCuda(const Linear& w) {
  const auto* linear = dynamic_cast<const CudaLinear*>(&w);
  Check(linear != nullptr, "Linear of another device");
  return *linear;
}

// Reads `count` rows from `begin` on into pinned memory with several threads.
void ReadRows(const RowReader& rows, int64_t begin, int64_t count, int64_t in, bf16* out) {
  const int64_t threads =
      std::clamp<int64_t>(std::min<int64_t>(std::thread::hardware_concurrency(), 8), 1, count);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(threads));
  {
    std::vector<std::jthread> readers;
    for (int64_t t = 0; t < threads; ++t) {
      readers.emplace_back([&, t] {
        const int64_t from = count * t / threads, to = count * (t + 1) / threads;
        try {
          rows(begin + from, to - from, out + from * in);
        } catch (...) {
          errors[static_cast<size_t>(t)] = std::current_exception();
        }
      });
    }
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

CudaDevice::Stream::Stream() {
  CheckCuda(cudaStreamCreateWithFlags(&get, cudaStreamNonBlocking), "cudaStreamCreate");
}
CudaDevice::Stream::~Stream() { cudaStreamDestroy(get); }

CudaDevice::CudaDevice(const DeviceOptions& options, std::string name, uint64_t usable_bytes)
    : name_(std::move(name)),
      deterministic_(options.deterministic),
      local_ranks_(options.local_ranks),
      peer_timeout_(options.peer_timeout),
      ledger_(std::make_shared<Ledger>(options.memory_limit_bytes > 0 ? options.memory_limit_bytes
                                                                      : usable_bytes)),
      ring_(stream_.get) {
  ledger_->before_free = [this] { IssueTo(); };
  CheckCublas(cublasCreate(&cublas_), "cublasCreate");
  SetCublasStream(stream_.get);
}

CudaDevice::~CudaDevice() {
  ledger_->before_free = nullptr;
  cudaStreamSynchronize(stream_.get);
  cublasDestroy(cublas_);
}

std::unique_ptr<Buffer> CudaDevice::Allocate(size_t bytes) {
  return MakeDeviceBuffer(ledger_, bytes);
}

std::unique_ptr<Buffer> CudaDevice::AllocateStaging(size_t bytes) {
  return MakePinnedBuffer(bytes);
}

std::unique_ptr<Buffer> CudaDevice::PinStaging(std::span<std::byte> memory) {
  return PinBuffer(memory);
}

void CudaDevice::CopyToDevice(void* device, const void* host, size_t bytes) {
  if (bytes == 0 || device == host) return;
  CheckCuda(cudaMemcpyAsync(device, host, bytes, cudaMemcpyDefault, IssueTo()),
            "cudaMemcpyAsync to the device");
}

void CudaDevice::CopyToHost(void* host, const void* device, size_t bytes) {
  if (bytes == 0 || device == host) return;
  CheckCuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDefault, IssueTo()),
            "cudaMemcpyAsync to the host");
}

std::unique_ptr<Event> CudaDevice::Record() { return std::make_unique<CudaEvent>(IssueTo()); }

std::unique_ptr<Linear> CudaDevice::MakeLinear(int64_t out_features, int64_t in_features,
                                               const RowReader& rows) {
  Check(out_features > 0 && in_features > 0, "MakeLinear: empty matrix");
  auto weight = std::make_shared<CudaWeight>();
  weight->memory = Allocate(static_cast<size_t>(out_features * in_features) * sizeof(bf16));
  // One panel is read while the other is on its way.
  constexpr int64_t kPanelBytes = int64_t{16} << 20;
  const int64_t row_bytes = in_features * static_cast<int64_t>(sizeof(bf16));
  const int64_t panel_rows = std::clamp<int64_t>(kPanelBytes / row_bytes, 1, out_features);
  const std::unique_ptr<Buffer> panels[2] = {
      AllocateStaging(static_cast<size_t>(panel_rows * row_bytes)),
      AllocateStaging(static_cast<size_t>(panel_rows * row_bytes))};
  std::unique_ptr<Event> copied[2];
  size_t which = 0;
  for (int64_t begin = 0; begin < out_features; begin += panel_rows, which = 1 - which) {
    const int64_t count = std::min(panel_rows, out_features - begin);
    auto* panel = static_cast<bf16*>(panels[which]->data());
    if (copied[which]) copied[which]->Wait();
    ReadRows(rows, begin, count, in_features, panel);
    CopyToDevice(static_cast<bf16*>(weight->memory->data()) + begin * in_features, panel,
                 static_cast<size_t>(count * row_bytes));
    copied[which] = Record();
  }
  for (const auto& event : copied) {
    if (event) event->Wait();
  }
  return std::make_unique<CudaLinear>(out_features, in_features, std::move(weight));
}

Upcoming CudaDevice::NextAfter(const std::shared_ptr<CudaWeight>& weight) {
  // More only delays what is needed sooner.
  constexpr size_t kBytes = size_t{4} << 20;
  if (const auto before = last_weight_.lock()) before->next = weight;
  last_weight_ = weight;
  const auto next = weight->next.lock();
  if (next == nullptr) return {};
  return {next->memory->data(), std::min(next->memory->bytes(), kBytes)};
}

cudaStream_t CudaDevice::IssueTo() {
  if (put_off_.empty()) return recording_ ? recording_stream_.get : stream_.get;
  if (chain_scratch_ == nullptr) {
    chain_scratch_ = MakeDeviceBuffer(nullptr, ProductChainScratch());
    PrepareProductChainScratch(stream_.get, chain_scratch_->data());
  }
  // Gone in any case: what cannot be issued now will not be later.
  const auto products = std::exchange(put_off_, {});
  const auto weights = std::exchange(put_off_weights_, {});
  LaunchProductChain(stream_.get, products, chain_scratch_->data(), chain_turn_,
                     peers_ ? &peers_->inboxes() : nullptr);
  chain_turn_ = 1 - chain_turn_;
  const auto sums = [](const ChainedProduct& p) { return p.sum_turn >= 0; };
  if (std::ranges::any_of(products, sums) && peers_->issued) peers_->issued();
  return stream_.get;
}

bool CudaDevice::CanPutOff(const Linear& w, ChainedProduct* product) const {
  // Rows; fewer are faster one product at a time, but not where a sum over ranks comes between.
  const int64_t fewest = peers_ ? 1 : 9;
  const CudaLinear& linear = AsCuda(w);
  const bool silu = product->kind == ChainedProduct::Kind::kSilu;
  product->w = linear.data();
  product->features = linear.out_features() / (silu ? 2 : 1);
  const Tensor &x = product->x, &out = product->out;
  Check(x.type == DType::kBf16 && x.cols == linear.in_features(),
        "MatMul: x does not fit the weight");
  Check(out.type == (silu ? DType::kBf16 : DType::kF32) && out.rows == x.rows &&
            out.cols == product->features,
        "MatMul: out does not fit x and the weight");
  return !deterministic_ && x.rows >= fewest && ServesProductChains() && FitsProductChain(*product);
}

bool CudaDevice::AllCanPutOff(const Linear& w, ChainedProduct* product, Collectives& ranks) const {
  const bool own = CanPutOff(w, product);
  std::optional<bool>& all = AsCuda(w).weight()->all_can_put_off;
  if (!all.has_value()) {
    all = true;
    for (int r = 0; r < ranks.size(); ++r) {
      bool its = own;
      ranks.Broadcast(std::as_writable_bytes(std::span(&its, 1)), r);
      *all = *all && its;
    }
  }
  Check(own || !*all, "MatMulSumAdd: this rank cannot do as agreed with the others");
  return *all;
}

void CudaDevice::PutOff(const Linear& w, const ChainedProduct& product) {
  if (put_off_.size() == kMaxChain ||
      (!put_off_.empty() && put_off_.back().x.rows != product.x.rows)) {
    IssueTo();
  }
  put_off_.push_back(product);
  put_off_since_ = true;
  put_off_weights_.push_back(AsCuda(w).weight());
}

bool CudaDevice::PutOffNorm(const Tensor& x, const Tensor& norm, const Tensor& normed) {
  if (put_off_.empty() || put_off_.size() == kMaxChain) return false;
  ChainedProduct& last = put_off_.back();
  if (last.kind != ChainedProduct::Kind::kAdd || last.out.data != x.data ||
      last.out.rows != x.rows || last.out.cols != x.cols || last.out.stride != x.stride) {
    return false;
  }
  Check(norm.type == DType::kF32 && norm.rows == 1 && norm.cols == x.cols &&
            normed.rows == x.rows && normed.cols == x.cols,
        "NormMatMul: x, norm and normed disagree");
  last.norm = static_cast<const float*>(norm.data);
  last.normed = normed;
  return true;
}

bool CudaDevice::PutOffRope(const Tensor& x, int32_t head_dim, const void* table) {
  if (put_off_.empty() || head_dim != kTurnedHead) return false;
  ChainedProduct& last = put_off_.back();
  if (!CanTurn(last) || last.turns != nullptr || last.out.data != x.data ||
      last.out.rows != x.rows || last.out.cols < x.cols || last.out.stride != x.stride) {
    return false;
  }
  last.turns = static_cast<const float2*>(table);
  last.turned = x.cols;
  return true;
}

// Row-major out = x Wᵀ is column-major outᵀ = W xᵀ, with W stored transposed.
void CudaDevice::Product(const void* w, int64_t out_features, Tensor x, Tensor out,
                         bool accumulate) {
  const float one = 1, beta = accumulate ? 1 : 0;
  IssueTo();
  CheckCublas(cublasGemmEx(cublas_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(out_features),
                           static_cast<int>(x.rows), static_cast<int>(x.cols), &one, w, CUDA_R_16BF,
                           static_cast<int>(x.cols), x.data, CUDA_R_16BF,
                           static_cast<int>(x.stride), &beta, out.data, CUDA_R_32F,
                           static_cast<int>(out.stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
              "cublasGemmEx");
}

// What ends a chain; alone, it is as fast by itself.
void CudaDevice::MatMul(const Linear& w, Tensor x, Tensor out) {
  ChainedProduct product{.x = x, .out = out};
  if (put_off_.empty() || !CanPutOff(w, &product)) return Multiply(w, x, out, false);
  PutOff(w, product);
  IssueTo();
}

void CudaDevice::NormMatMul(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out,
                            Tensor normed) {
  ChainedProduct product{.x = normed, .out = out, .eps = eps};
  if (!CanPutOff(w, &product) || !PutOffNorm(x, norm, normed)) {
    return Device::NormMatMul(x, norm, eps, w, out, normed);
  }
  PutOff(w, product);
  // Logits; who asks for them may do other things first.
  if (!CanTurn(product)) IssueTo();
}

void CudaDevice::NormMatMulSilu(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out,
                                Tensor normed, Tensor gate_up) {
  ChainedProduct product{.x = normed, .out = out, .kind = ChainedProduct::Kind::kSilu, .eps = eps};
  if (!CanPutOff(w, &product)) {
    return Device::NormMatMulSilu(x, norm, eps, w, out, normed, gate_up);
  }
  if (!PutOffNorm(x, norm, normed)) {
    AddRmsNorm(x, {}, norm, eps, normed);
    product.eps = -1;
  }
  PutOff(w, product);
}

void CudaDevice::MatMulAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch) {
  ChainedProduct product{.x = x, .out = into, .kind = ChainedProduct::Kind::kAdd};
  if (CanPutOff(w, &product)) return PutOff(w, product);
  if (!deterministic_) return Multiply(w, x, into, true);
  Multiply(w, x, scratch, false);
  Add(into, scratch);
}

void CudaDevice::MatMulSumAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch,
                              Collectives& ranks) {
  ChainedProduct product{.x = x, .out = into, .kind = ChainedProduct::Kind::kAdd};
  // What is asked first is the same on every rank.
  if (ranks.size() == 1 || peers_ == nullptr || deterministic_ || x.rows == 0 ||
      x.rows > kMaxChainRows || into.cols > kMaxSummedFeatures ||
      !AllCanPutOff(w, &product, ranks)) {
    return Device::MatMulSumAdd(w, x, into, scratch, ranks);
  }
  ranks.ThrowIfFailed();
  product.sum_turn = peers_->NextTurn();
  PutOff(w, product);
}

void CudaDevice::Multiply(const Linear& w, Tensor x, Tensor out, bool accumulate) {
  const CudaLinear& linear = AsCuda(w);
  const int64_t features = linear.out_features();
  Check(x.type == DType::kBf16 && x.cols == linear.in_features(),
        "MatMul: x does not fit the weight");
  Check(out.type == DType::kF32 && out.rows == x.rows && out.cols == features,
        "MatMul: out does not fit x and the weight");
  if (x.rows == 0) return;
  if (!deterministic_) {
    const Upcoming next = NextAfter(linear.weight());
    if (FitsSkinnyMatMul(x.cols, x)) {
      return LaunchSkinnyMatMul(IssueTo(), linear.data(), features, x.cols, x, out, accumulate,
                                next);
    }
    return Product(linear.data(), features, x, out, accumulate);
  }
  // cuBLAS chooses its algorithm, so a row's bits, by the number of rows and the alignment: always
  // the same number, in the same place. Up to about this many rows the weight's bytes bound the
  // time, so a decode step pays little for it.
  constexpr int64_t kRows = 128;
  const auto out_bytes = static_cast<size_t>(kRows * features) * sizeof(float);
  auto* scratch = static_cast<char*>(
      product_scratch_.Get(out_bytes + 256 + static_cast<size_t>(kRows * x.cols) * sizeof(bf16)));
  const Tensor product{scratch, DType::kF32, kRows, features, features};
  const Tensor operand{scratch + (out_bytes + 255) / 256 * 256, DType::kBf16, kRows, x.cols,
                       x.cols};
  for (int64_t begin = 0; begin < x.rows; begin += kRows) {
    const int64_t count = std::min(kRows, x.rows - begin);
    LaunchConvert(IssueTo(), x.Rows(begin, count), operand.Rows(0, count));
    Product(linear.data(), features, operand, product, /*accumulate=*/false);
    LaunchConvert(IssueTo(), product.Rows(0, count), out.Rows(begin, count));
  }
}

void CudaDevice::Embed(const Linear& table, std::span<const int32_t> ids, Tensor out) {
  const CudaLinear& linear = AsCuda(table);
  const int64_t in = linear.in_features(), rows = linear.out_features();
  Check(out.type == DType::kF32 && out.cols == in && out.rows == static_cast<int64_t>(ids.size()),
        "Embed: shapes disagree");
  for (const int32_t id : ids) Check(id < rows, "Embed: id out of range");
  LaunchEmbed(IssueTo(), {linear.data(), DType::kBf16, rows, in, in}, ring_.Upload(ids), out);
}

}  // namespace cuda

std::unique_ptr<Device> MakeCudaDevice(const DeviceOptions& options, std::string* why) {
  const auto refuse = [&](const std::string& reason) {
    cudaGetLastError();
    if (why != nullptr) *why = reason;
    return nullptr;
  };
  int count = 0;
  if (const cudaError_t code = cudaGetDeviceCount(&count); code != cudaSuccess || count == 0) {
    return refuse(std::string("no usable GPU: ") +
                  (code != cudaSuccess ? cudaGetErrorString(code) : "none is visible"));
  }
  Check(options.local_rank >= 0 && options.local_rank < options.local_ranks,
        "MakeCudaDevice: local_rank beyond local_ranks");
  const int gpu = options.local_rank % count;
  cudaDeviceProp properties{};
  if (const cudaError_t code = cudaGetDeviceProperties(&properties, gpu); code != cudaSuccess) {
    return refuse("GPU " + std::to_string(gpu) + ": " + cudaGetErrorString(code));
  }
  if (properties.major < 8) {
    return refuse(std::string(properties.name) + " has compute capability " +
                  std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                  "; 8.0 or later is needed (bf16)");
  }
  size_t free_bytes = 0, total_bytes = 0;
  cudaError_t code = cudaSetDevice(gpu);
  if (code == cudaSuccess) code = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (code != cudaSuccess) {
    return refuse(std::string(properties.name) + ": " + cudaGetErrorString(code));
  }
  // What is left for cuBLAS, scratch memory and the context's growth.
  constexpr uint64_t kReserve = uint64_t{1} << 30;
  // Ranks that share the GPU have equal parts, whichever of them comes first.
  const auto sharers = static_cast<uint64_t>((options.local_ranks - gpu + count - 1) / count);
  const uint64_t share = std::min<uint64_t>(free_bytes, total_bytes / sharers);
  if (share <= kReserve) {
    return refuse(std::string(properties.name) + ": less than 1 GiB of its memory is free");
  }
  if (why != nullptr) why->clear();
  return std::make_unique<cuda::CudaDevice>(options, properties.name, share - kReserve);
}

}  // namespace passel::gpu
