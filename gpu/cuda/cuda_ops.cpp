// Checks and launches of CudaDevice's ops. Checks mirror the CPU device's.

#include <algorithm>
#include <string>
#include <vector>

#include "gpu/cuda/cuda_device.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

bool IsFloat(const Tensor& t) { return t.type == DType::kF32 || t.type == DType::kBf16; }

// Whether rows can be read 16 bytes at a time.
bool IsAligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride % 8 == 0;
}

int64_t CheckPartials(const Partials& p, const char* what, bool may_be_bf16 = false) {
  Check(p.max.type == DType::kF32 && p.den.type == DType::kF32 &&
            (p.num.type == DType::kF32 || (may_be_bf16 && p.num.type == DType::kBf16)) &&
            p.den.rows == p.max.rows && p.num.rows == p.max.rows && p.den.cols == p.max.cols &&
            p.max.cols > 0 && p.num.cols % p.max.cols == 0,
        what);
  return p.num.cols / p.max.cols;
}

}  // namespace

void CudaDevice::AddRmsNorm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor out) {
  const int64_t n = residual.cols;
  Check(residual.type == DType::kF32 && weight.type == DType::kF32 && weight.cols == n &&
            weight.rows == 1,
        "AddRmsNorm: residual and weight disagree");
  Check(delta.data == nullptr ||
            (delta.type == DType::kF32 && delta.cols == n && delta.rows == residual.rows),
        "AddRmsNorm: delta does not fit residual");
  Check(out.rows == residual.rows && out.cols == n && IsFloat(out),
        "AddRmsNorm: out does not fit residual");
  LaunchAddRmsNorm(IssueTo(), residual, delta, weight, eps, out);
}

// Of each pair the cosine and the sine.
void CudaDevice::RopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                           Tensor table) {
  CheckRopeTable(inv_freq, positions, table);
  const auto [device_positions, device_freq] = ring_.Upload(positions, inv_freq);
  LaunchRopeTable(IssueTo(), device_positions, table.rows, device_freq, table.cols / 2,
                  static_cast<float2*>(table.data));
}

void CudaDevice::Rope(Tensor x, int32_t head_dim, Tensor table) {
  CheckRope(x, head_dim, table);
  const bool put_off = PutOffRope(x, head_dim, table.data);
  cudaStream_t stream = IssueTo();
  if (!put_off) LaunchRope(stream, x, head_dim, static_cast<const float2*>(table.data));
}

void CudaDevice::SiluMul(Tensor gate_up, Tensor out) {
  Check(gate_up.type == DType::kF32 && gate_up.cols == 2 * out.cols && gate_up.rows == out.rows &&
            IsFloat(out),
        "SiluMul: shapes disagree");
  LaunchSiluMul(IssueTo(), gate_up, out);
}

void CudaDevice::HeadRmsNorm(Tensor x, int32_t head_dim, Tensor weight, float eps) {
  Check(x.type == DType::kF32 && head_dim > 0 && x.cols % head_dim == 0 &&
            weight.type == DType::kF32 && weight.rows == 1 && weight.cols == x.cols,
        "HeadRmsNorm: shapes disagree");
  LaunchHeadRmsNorm(IssueTo(), x, head_dim, weight, eps);
}

void CudaDevice::Add(Tensor into, Tensor delta) {
  Check(into.type == DType::kF32 && delta.type == DType::kF32 && into.cols == delta.cols &&
            (delta.rows == into.rows || delta.rows == 1),
        "Add: shapes disagree");
  LaunchAdd(IssueTo(), into, delta);
}

void CudaDevice::Convert(Tensor in, Tensor out) {
  Check(in.rows == out.rows && in.cols == out.cols, "Convert: shapes disagree");
  Check(IsFloat(in) && IsFloat(out), "Convert: f32 and bf16 only");
  LaunchConvert(IssueTo(), in, out);
}

void CudaDevice::Sample(Tensor x, std::span<const SamplingRule> rules, std::span<int32_t> ids) {
  Check(x.type == DType::kF32 && x.cols > 0 && static_cast<int64_t>(ids.size()) == x.rows &&
            rules.size() == ids.size(),
        "Sample: shapes disagree");
  if (x.rows == 0) return;
  LaunchSample(IssueTo(), x, ring_.Upload(rules), ids.data());
}

void CudaDevice::CreateKvPool(const AttentionShape& shape, int32_t pages) {
  Check(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 &&
            shape.head_dim > 0 && shape.head_dim % 16 == 0 && shape.head_dim <= kMaxHeadDim &&
            pages > 0,
        "CreateKvPool: shape");
  const uint64_t slot = uint64_t{2} * sizeof(bf16) * static_cast<uint64_t>(shape.kv_heads) *
                        static_cast<uint64_t>(shape.head_dim);
  pool_.reset();
  pool_ = Allocate(slot * kKvPageTokens * static_cast<uint64_t>(pages));
  pool_shape_ = shape;
  pool_pages_ = pages;
}

const int64_t* CudaDevice::UploadSlots(std::span<const int32_t> pages,
                                       std::span<const int64_t> slots, const Tensor& k,
                                       const Tensor& v) {
  const int64_t cols = int64_t{pool_shape_.kv_heads} * pool_shape_.head_dim;
  Check(pool_ != nullptr, "KV access before CreateKvPool");
  Check(static_cast<int64_t>(slots.size()) == k.rows && v.rows == k.rows && k.cols == cols &&
            v.cols == cols,
        "KV rows do not fit the pool");
  std::vector<int64_t> places;
  places.reserve(slots.size());
  for (const int64_t slot : slots) {
    const int64_t index = slot / kKvPageTokens;
    Check(slot >= 0 && index < static_cast<int64_t>(pages.size()), "KV slot beyond the pages");
    const int32_t page = pages[static_cast<size_t>(index)];
    Check(page >= 0 && page < pool_pages_, "KV page beyond the pool");
    places.push_back(int64_t{page} * kKvPageTokens + slot % kKvPageTokens);
  }
  return ring_.Upload(std::span<const int64_t>(places));
}

void CudaDevice::StoreKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                         Tensor v) {
  Check(IsFloat(k) && IsFloat(v), "StoreKv: f32 and bf16 only");
  LaunchStoreKv(IssueTo(), {pool_ ? pool_->data() : nullptr, pool_shape_},
                UploadSlots(pages, slots, k, v), k, v);
}

void CudaDevice::LoadKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                        Tensor v) {
  Check(k.type == DType::kBf16 && v.type == DType::kBf16, "LoadKv: bf16 only");
  LaunchLoadKv(IssueTo(), {pool_ ? pool_->data() : nullptr, pool_shape_},
               UploadSlots(pages, slots, k, v), k, v);
}

void CudaDevice::PackKv(Tensor k, Tensor v, Tensor out) {
  CheckPackKv(k, v, out);
  LaunchPackKv(IssueTo(), k, v, out);
}

void CudaDevice::UnpackKv(Tensor in, Tensor k, Tensor v) {
  CheckPackKv(k, v, in);
  LaunchUnpackKv(IssueTo(), in, k, v);
}

void CudaDevice::DecodeAttention(Tensor q, std::span<const KvView> views, Partials out) {
  Check(pool_ != nullptr, "DecodeAttention before CreateKvPool");
  const int64_t n = q.rows;
  Check(q.type == DType::kF32 && q.cols == int64_t{pool_shape_.heads} * pool_shape_.head_dim &&
            static_cast<int64_t>(views.size()) == n && n < 65536,
        "DecodeAttention: q and views disagree");
  CheckPartials(out, "DecodeAttention: shapes of `out` disagree");
  Check(out.max.rows == n && out.max.cols == pool_shape_.heads && out.num.cols == q.cols,
        "DecodeAttention: out does not fit");
  if (n == 0) return;
  // Short rows have a kernel of their own.
  const bool has_short = HasShortRows(pool_shape_);
  std::vector<int32_t> short_rows, short_pages;
  int64_t max_short = -1;
  std::vector<DecodeRow> rows;
  std::vector<int32_t> pages;
  int64_t partials = 0;
  int32_t max_splits = 1;
  bool any_long = false;
  for (const KvView& view : views) {
    const int64_t used = (view.tokens + kKvPageTokens - 1) / kKvPageTokens;
    Check(view.tokens >= 0 && used <= static_cast<int64_t>(view.pages.size()),
          "KV slot beyond the pages");
    for (const int32_t page : view.pages.first(static_cast<size_t>(used))) {
      Check(page >= 0 && page < pool_pages_, "KV page beyond the pool");
    }
    const bool is_short = has_short && view.tokens <= kMaxShortTokens;
    short_rows.push_back(is_short ? static_cast<int32_t>(view.tokens) : -1);
    short_rows.push_back(static_cast<int32_t>(2 * views.size() + short_pages.size()));
    auto& list = is_short ? short_pages : pages;
    DecodeRow row{static_cast<int64_t>(pages.size()), view.tokens, 0, partials, 1};
    CutDecodeRow(&row);
    list.insert(list.end(), view.pages.begin(), view.pages.begin() + used);
    rows.push_back(row);
    if (is_short) {
      max_short = std::max(max_short, view.tokens);
      continue;
    }
    any_long = true;
    if (row.splits > 1) partials += row.splits;
    max_splits = std::max(max_splits, row.splits);
  }
  const PoolView pool{pool_->data(), pool_shape_};
  if (any_long) {
    auto* scratch = static_cast<float*>(decode_scratch_.Get(
        static_cast<size_t>(partials * DecodePartialFloats(pool_shape_)) * sizeof(float)));
    const auto [device_rows, device_pages] =
        ring_.Upload(std::span<const DecodeRow>(rows), std::span<const int32_t>(pages));
    LaunchDecodeAttention(IssueTo(), pool, q, device_pages, device_rows, max_splits, scratch, out);
  }
  if (max_short >= 0) {
    short_rows.insert(short_rows.end(), short_pages.begin(), short_pages.end());
    const std::span<const int32_t> list(short_rows);
    const int32_t* uploaded = list.size() > kMaxListWords ? ring_.Upload(list) : nullptr;
    LaunchShortDecodeAttention(IssueTo(), pool, q, list, uploaded, max_short, out);
  }
}

void CudaDevice::CausalAttention(const AttentionShape& shape, Tensor q, Tensor k, Tensor v,
                                 int64_t start, int64_t window, Tensor out) {
  const int64_t head_dim = shape.head_dim;
  Check(shape.kv_heads > 0 && head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim &&
            shape.heads % shape.kv_heads == 0 && start >= 0 && window >= 0,
        "CausalAttention: shape");
  Check(q.type == DType::kF32 && q.cols == shape.heads * head_dim && out.rows == q.rows &&
            out.cols == q.cols && IsFloat(out),
        "CausalAttention: q and out disagree");
  Check(k.type == DType::kBf16 && v.type == DType::kBf16 && k.rows >= start + q.rows &&
            v.rows >= start + q.rows && k.cols == shape.kv_heads * head_dim && v.cols == k.cols &&
            IsAligned(k) && IsAligned(v),
        "CausalAttention: k and v do not fit q");
  if (q.rows == 0) return;
#ifdef PASSEL_CUDNN
  // The bits of cuDNN's results depend on its version and, between chunk sizes, on its choices.
  IssueTo();
  if (!deterministic_ && cudnn_attention_.Run(shape, q, k, v, start, window, out)) return;
#endif
  LaunchCausalAttention(IssueTo(), shape, q, k, v, start, window, out);
}

void CudaDevice::SetProjections(std::span<const float> r, int32_t head_dim, int32_t k, int32_t l) {
  Check(head_dim > 0 && head_dim % 4 == 0 && k > 0 && k <= 16 && l > 0,
        "SetProjections: head_dim a multiple of 4, k in 1 … 16, l ≥ 1");
  const int64_t columns = int64_t{k} * l;
  Check(static_cast<int64_t>(r.size()) == head_dim * columns, "SetProjections: size of R");
  const int64_t width = HashColumns(k);
  std::vector<float> padded(static_cast<size_t>(head_dim * l * width));
  for (int64_t j = 0; j < head_dim; ++j) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t column = c / k * width + c % k;
      padded[static_cast<size_t>(column * head_dim + j)] = r[static_cast<size_t>(j * columns + c)];
    }
  }
  const std::vector<uint16_t> packed = PackProjections(padded);
  projections_.reset();
  projections_ = Allocate(packed.size() * sizeof(uint16_t));
  CopyToDevice(projections_->data(), packed.data(), projections_->bytes());
  if (hash_scratch_ == nullptr) {
    hash_scratch_ = MakeDeviceBuffer(nullptr, HashScratchBytes());
    CheckCuda(cudaMemsetAsync(hash_scratch_->data(), 0, HashScratchBytes(), stream_.get),
              "cudaMemsetAsync");
  }
  Record()->Wait();
  hash_dim_ = head_dim;
  hash_bits_ = k;
  hash_tables_ = l;
}

void CudaDevice::HashCodes(Tensor x, Tensor mean, Tensor codes) {
  Check(projections_ != nullptr, "HashCodes before SetProjections");
  const int64_t heads = x.cols / hash_dim_;
  Check(IsFloat(x) && x.cols == heads * hash_dim_ && codes.type == DType::kU16 &&
            FitCodes(codes, x.rows, heads, hash_tables_),
        "HashCodes: shapes disagree");
  Check(mean.data == nullptr || (mean.type == DType::kF32 && mean.cols == x.cols &&
                                 (mean.rows == 1 || mean.rows == x.rows)),
        "HashCodes: mean does not fit x");
  LaunchHashCodes(IssueTo(), projections_->data(), hash_dim_, hash_bits_, hash_tables_,
                  hash_scratch_->data(), x, mean, codes);
}

void CudaDevice::ColumnMean(Tensor x, Tensor mean) {
  Check(
      IsFloat(x) && mean.type == DType::kF32 && mean.rows == 1 && mean.cols == x.cols && x.rows > 0,
      "ColumnMean: shapes disagree");
  LaunchColumnMean(IssueTo(), x, mean,
                   static_cast<double*>(mean_scratch_.Get(ColumnMeanScratch(x.rows, x.cols))));
}

void CudaDevice::ClearPartials(Partials partials) {
  CheckPartials(partials, "ClearPartials: shapes disagree");
  LaunchClearPartials(IssueTo(), partials);
}

void CudaDevice::MergePartials(Partials into, Partials from, std::span<const int32_t> rows,
                               std::span<const int32_t> first_heads) {
  const int64_t head_dim = CheckPartials(into, "MergePartials: shapes of `into` disagree");
  Check(CheckPartials(from, "MergePartials: shapes of `from` disagree", true) == head_dim,
        "MergePartials: head_dim differs");
  Check(head_dim <= kMaxHeadDim && head_dim % 2 == 0 && from.num.stride % 2 == 0,
        "MergePartials: head_dim");
  const auto n = static_cast<int64_t>(rows.size());
  Check(n == from.max.rows && first_heads.size() == rows.size() && into.max.rows < 65536,
        "MergePartials: one row and head index per partial");
  const auto into_rows = static_cast<size_t>(into.max.rows);
  std::vector<int32_t> list(into_rows + 1 + 2 * rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    Check(rows[i] >= 0 && rows[i] < into.max.rows && first_heads[i] >= 0 &&
              first_heads[i] <= into.max.cols - from.max.cols,
          "MergePartials: row or head out of range");
    ++list[static_cast<size_t>(rows[i]) + 1];
  }
  if (n == 0) return;
  for (size_t r = 1; r <= into_rows; ++r) list[r] += list[r - 1];
  std::vector<int32_t> next(list.begin(), list.begin() + into.max.rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto entry = static_cast<size_t>(next[static_cast<size_t>(rows[i])]++);
    list[into_rows + 1 + 2 * entry] = static_cast<int32_t>(i);
    list[into_rows + 2 + 2 * entry] = first_heads[i];
  }
  const int32_t* uploaded =
      list.size() > kMaxListWords ? ring_.Upload(std::span<const int32_t>(list)) : nullptr;
  LaunchMergePartials(IssueTo(), into, from, list, uploaded);
}

void CudaDevice::NormalizePartials(Partials partials, Tensor out) {
  CheckPartials(partials, "NormalizePartials: shapes disagree");
  Check(out.rows == partials.num.rows && out.cols == partials.num.cols && IsFloat(out),
        "NormalizePartials: out does not fit");
  LaunchNormalizePartials(IssueTo(), partials, out);
}

}  // namespace passel::gpu::cuda
