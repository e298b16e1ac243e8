#include "gpu/cuda/cudnn_attention.h"

#include <cudnn_frontend.h>

#include <algorithm>
#include <bit>
#include <compare>
#include <map>
#include <string>
#include <unordered_map>

#include "gpu/cuda/check.h"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/memory.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

namespace fe = cudnn_frontend;

// Names of a plan's tensors.
enum Name : int64_t { kQ = 1, kK, kV, kOut, kRows, kKeys };

struct Key {
  int32_t heads, kv_heads, head_dim;
  float scale;
  int64_t rows, keys, kv_stride, window;
  auto operator<=>(const Key&) const = default;
};

struct Plan {
  fe::graph::Graph graph;
  int64_t workspace_bytes = 0;
  bool usable = false;
};

void CheckCudnn(fe::error_t error, const char* what) {
  if (error.is_good()) return;
  throw Error(ErrorClass::kBug, std::string(what) + ": " + error.get_message());
}

// [1, heads, rows, head_dim], where a row holds its heads one after another.
fe::graph::Tensor_attributes Rows(Name name, int64_t heads, int64_t rows, int64_t head_dim,
                                  int64_t stride) {
  return fe::graph::Tensor_attributes()
      .set_uid(name)
      .set_dim({1, heads, rows, head_dim})
      .set_stride({rows * stride, head_dim, stride, 1});
}

fe::graph::Tensor_attributes Count(Name name) {
  return fe::graph::Tensor_attributes()
      .set_uid(name)
      .set_dim({1, 1, 1, 1})
      .set_stride({1, 1, 1, 1})
      .set_data_type(fe::DataType_t::INT32);
}

void Build(const Key& key, cudnnHandle_t cudnn, Plan* plan) {
  fe::graph::Graph& graph = plan->graph;
  graph.set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const int64_t q_stride = int64_t{key.heads} * key.head_dim;
  // The last query stands at the last key: its diagonal is the lower right one.
  auto options = fe::graph::SDPA_attributes()
                     .set_generate_stats(false)
                     .set_attn_scale(key.scale)
                     .set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT)
                     .set_diagonal_band_right_bound(0)
                     .set_padding_mask(true)
                     .set_seq_len_q(graph.tensor(Count(kRows)))
                     .set_seq_len_kv(graph.tensor(Count(kKeys)));
  if (key.window > 0) options.set_diagonal_band_left_bound(static_cast<int>(key.window));
  const auto keys = [&](Name name) {
    return graph.tensor(Rows(name, key.kv_heads, key.keys, key.head_dim, key.kv_stride));
  };
  const auto q = graph.tensor(Rows(kQ, key.heads, key.rows, key.head_dim, q_stride));
  const auto out = graph.sdpa(q, keys(kK), keys(kV), options)[0];
  out->set_output(true).set_uid(kOut).set_dim(q->get_dim()).set_stride(q->get_stride());
  plan->usable = graph.build(cudnn, {fe::HeurMode_t::A}).is_good() &&
                 graph.get_workspace_size(plan->workspace_bytes).is_good();
}

}  // namespace

struct CudnnAttention::Impl {
  cudaStream_t stream;
  cudnnHandle_t cudnn = nullptr;
  std::map<Key, Plan> plans;
  Scratch queries, results, counts, workspace;
};

CudnnAttention::CudnnAttention(cudaStream_t stream) : impl_(std::make_unique<Impl>()) {
  impl_->stream = stream;
}

CudnnAttention::~CudnnAttention() {
  impl_->plans.clear();
  if (impl_->cudnn != nullptr) cudnnDestroy(impl_->cudnn);
}

bool CudnnAttention::Run(const AttentionShape& shape, Tensor q, Tensor k, Tensor v, int64_t start,
                         int64_t window, Tensor out) {
  Impl& m = *impl_;
  const int64_t end = start + q.rows;
  const int64_t padded = (end + kCausalPadding - 1) / kCausalPadding * kCausalPadding;
  if (k.rows < padded || v.rows < padded || k.stride != v.stride) return false;
  if (m.cudnn == nullptr) {
    // Made where it is first needed: it takes a tenth of a second and some memory.
    Check(cudnnCreate(&m.cudnn) == CUDNN_STATUS_SUCCESS, "cudnnCreate");
    Check(cudnnSetStream(m.cudnn, m.stream) == CUDNN_STATUS_SUCCESS, "cudnnSetStream");
  }
  // A plan takes tens of milliseconds to make: few, for powers of two. Keys beyond the counted
  // ones cost nothing.
  const auto power = [](int64_t least, int64_t value) {
    return std::max(least, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(value))));
  };
  const Key key{shape.heads,
                shape.kv_heads,
                shape.head_dim,
                shape.scale,
                power(kCausalPadding, q.rows),
                power(1 << 20, end),
                k.stride,
                window < end ? window : 0};
  const auto [at, is_new] = m.plans.try_emplace(key);
  Plan& plan = at->second;
  if (is_new) Build(key, m.cudnn, &plan);
  if (!plan.usable) return false;

  // Whole tiles of keys are read: what is not there yet has weight 0, but must be a number.
  for (const Tensor& t : {k, v}) {
    const Tensor rest = t.Rows(end, padded - end);
    CheckCuda(cudaMemset2DAsync(rest.data, static_cast<size_t>(rest.stride) * sizeof(bf16), 0,
                                static_cast<size_t>(rest.cols) * sizeof(bf16),
                                static_cast<size_t>(rest.rows), m.stream),
              "cudaMemset2DAsync");
  }
  // cuDNN takes bf16 queries, and fills all rows of the plan with results.
  const size_t bytes = static_cast<size_t>(key.rows * q.cols) * sizeof(bf16);
  const Tensor queries{m.queries.Get(bytes), DType::kBf16, q.rows, q.cols, q.cols};
  LaunchConvert(m.stream, q, queries);
  const bool direct = out.type == DType::kBf16 && out.stride == q.cols && q.rows == key.rows;
  const Tensor results{direct ? out.data : m.results.Get(bytes), DType::kBf16, q.rows, q.cols,
                       q.cols};
  auto* counts = static_cast<int32_t*>(m.counts.Get(2 * sizeof(int32_t)));
  const int32_t values[] = {static_cast<int32_t>(q.rows), static_cast<int32_t>(end)};
  LaunchPut(m.stream, counts, values, sizeof values);
  std::unordered_map<int64_t, void*> tensors{{kQ, queries.data}, {kK, k.data},
                                             {kV, v.data},       {kOut, results.data},
                                             {kRows, counts},    {kKeys, counts + 1}};
  void* workspace = m.workspace.Get(static_cast<size_t>(plan.workspace_bytes));
  CheckCudnn(plan.graph.execute(m.cudnn, tensors, workspace), "cuDNN's attention");
  if (!direct) LaunchConvert(m.stream, results, out);
  return true;
}

}  // namespace passel::gpu::cuda
