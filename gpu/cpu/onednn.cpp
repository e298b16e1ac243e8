#include "gpu/cpu/onednn.h"

#include <algorithm>
#include <utility>

#include "runtime/base/error.h"

namespace passel::gpu::cpu {
namespace {

using Dims = dnnl::memory::dims;

dnnl::memory::data_type DnnlType(DType type) {
  Check(type == DType::kF32 || type == DType::kBf16, "oneDNN operands are f32 or bf16");
  return type == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

dnnl::memory::desc RowMajor(DType type, int64_t rows, int64_t cols) {
  return {Dims{rows, cols}, DnnlType(type), Dims{cols, 1}};
}

[[noreturn]] void Rethrow(const dnnl::error& error, const std::string& call) {
  const auto error_class =
      error.status == dnnl_out_of_memory ? ErrorClass::kMemory : ErrorClass::kBug;
  throw Error(error_class, "oneDNN " + call + ": " + error.what() + " (status " +
                               std::to_string(static_cast<int>(error.status)) + ")");
}

dnnl::matmul::primitive_desc MatmulDesc(const dnnl::engine& engine, DType type, int64_t m,
                                        const dnnl::memory::desc& b, int64_t k, int64_t n) {
  dnnl::primitive_attr attr;
  // The library's own scratchpad belongs to the thread that created the primitive.
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const auto a = RowMajor(type, m, k);
  const auto c = RowMajor(DType::kF32, m, n);
#if DNNL_VERSION_MAJOR >= 3
  return {engine, a, b, c, attr};
#else
  return {dnnl::matmul::desc(a, b, c), attr, engine};
#endif
}

struct Blocking {
  std::vector<int64_t> strides;                           // of the outer blocks of each dimension
  std::vector<std::pair<int64_t, int64_t>> inner_blocks;  // (dimension, size), outermost first
};

Blocking BlockingOf(const dnnl::memory::desc& desc) {
  Blocking result;
#if DNNL_VERSION_MAJOR >= 3
  const auto strides = desc.get_strides();
  result.strides.assign(strides.begin(), strides.end());
  const auto sizes = desc.get_inner_blks();
  const auto dims = desc.get_inner_idxs();
  for (size_t i = 0; i < sizes.size(); ++i) result.inner_blocks.emplace_back(dims[i], sizes[i]);
#else
  Check(desc.data.format_kind == dnnl_blocked, "oneDNN weights have a blocked layout");
  const auto& blocking = desc.data.format_desc.blocking;
  result.strides.assign(blocking.strides, blocking.strides + desc.data.ndims);
  for (int i = 0; i < blocking.inner_nblks; ++i) {
    result.inner_blocks.emplace_back(blocking.inner_idxs[i], blocking.inner_blks[i]);
  }
#endif
  return result;
}

// Offset that index `i` of dimension `dim` contributes.
int64_t OffsetOf(const Blocking& blocking, int64_t dim, int64_t i) {
  int64_t block = 1;
  for (const auto& [d, size] : blocking.inner_blocks) {
    if (d == dim) block *= size;
  }
  int64_t offset = i / block * blocking.strides[static_cast<size_t>(dim)];
  int64_t rest = i % block;
  int64_t step = 1;  // elements between neighbours in the inner block at hand
  int64_t weight = 1;
  for (auto it = blocking.inner_blocks.rbegin(); it != blocking.inner_blocks.rend(); ++it) {
    if (it->first == dim) {
      offset += rest / weight % it->second * step;
      weight *= it->second;
    }
    step *= it->second;
  }
  return offset;
}

void CheckStatus(dnnl_status_t status, const char* call) {
  if (status != dnnl_success) [[unlikely]] {
    throw Error(ErrorClass::kBug, std::string("oneDNN ") + call + ": status " +
                                      std::to_string(static_cast<int>(status)));
  }
}

}  // namespace

bool HasBf16Arithmetic() {
  // The values are sets of features: a superset has all bits of the smaller one.
  const auto have = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto want = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (have & want) == want;
}

PackedLayout::PackedLayout(const dnnl::engine& engine, DType type, int64_t k, int64_t n) {
  try {
    const dnnl::memory::desc any(Dims{k, n}, DnnlType(type), dnnl::memory::format_tag::any);
    const auto desc = MatmulDesc(engine, type, kTileRows, any, k, n);
    desc_ = desc.weights_desc();
    implementation_ = desc.impl_info_str();
  } catch (const dnnl::error& error) {
    Rethrow(error, "matmul descriptor");
  }
  ComputeOffsets(k, n);
}

void PackedLayout::ComputeOffsets(int64_t k, int64_t n) {
  const Blocking blocking = BlockingOf(desc_);
  for (int64_t i = 0; i < k; ++i) row_offsets_.push_back(OffsetOf(blocking, 0, i));
  for (int64_t i = 0; i < n; ++i) col_offsets_.push_back(OffsetOf(blocking, 1, i));
}

Gemm::Gemm(const dnnl::engine& engine, DType type, int64_t m, const PackedLayout& layout, int64_t k,
           int64_t n)
    : engine_(engine),
      desc_(MatmulDesc(engine, type, m, layout.desc(), k, n)),
      primitive_(desc_),
      implementation_(desc_.impl_info_str()),
      calls_([this] { return MakeCall(); }) {}

Gemm::Call Gemm::MakeCall() const {
  Call call;
  call.stream = dnnl::stream(engine_);
  call.a = dnnl::memory(desc_.src_desc(), engine_, nullptr);
  call.b = dnnl::memory(desc_.weights_desc(), engine_, nullptr);
  call.c = dnnl::memory(desc_.dst_desc(), engine_, nullptr);
  const size_t bytes = desc_.scratchpad_desc().get_size();
  constexpr size_t kAlign = 64;
  call.scratch_bytes.resize(bytes + kAlign);
  void* aligned = call.scratch_bytes.data();
  size_t space = call.scratch_bytes.size();
  std::align(kAlign, bytes, aligned, space);
  call.scratch = dnnl::memory(desc_.scratchpad_desc(), engine_, aligned);
  return call;
}

void Gemm::Run(const void* a, const void* b, float* c) {
  Call& call = calls_.local();
  call.a.set_data_handle(const_cast<void*>(a));
  call.b.set_data_handle(const_cast<void*>(b));
  call.c.set_data_handle(c);
  const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, call.a.get()},
                                  {DNNL_ARG_WEIGHTS, call.b.get()},
                                  {DNNL_ARG_DST, call.c.get()},
                                  {DNNL_ARG_SCRATCHPAD, call.scratch.get()}};
  CheckStatus(dnnl_primitive_execute(primitive_.get(), call.stream.get(), 4, args), "matmul");
}

Packer::Packer(const dnnl::engine& engine, DType type, const PackedLayout& layout, int64_t k,
               int64_t n, bool transposed)
    : engine_(engine), packed_(layout.desc()), calls_([this] {
        return Call{dnnl::stream(engine_), dnnl::memory(source_, engine_, nullptr),
                    dnnl::memory(packed_, engine_, nullptr)};
      }) {
  try {
    source_ = {Dims{k, n}, DnnlType(type), transposed ? Dims{1, k} : Dims{n, 1}};
    primitive_ = dnnl::reorder(dnnl::reorder::primitive_desc(engine, source_, engine, packed_));
  } catch (const dnnl::error& error) {
    Rethrow(error, "reorder");
  }
}

void Packer::Run(const void* source, void* packed) {
  Call& call = calls_.local();
  call.source.set_data_handle(const_cast<void*>(source));
  call.packed.set_data_handle(packed);
  const dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, call.source.get()},
                                  {DNNL_ARG_TO, call.packed.get()}};
  CheckStatus(dnnl_primitive_execute(primitive_.get(), call.stream.get(), 2, args), "reorder");
}

GemmCache::GemmCache() : engine_(dnnl::engine::kind::cpu, 0) {}

const PackedLayout& GemmCache::Layout(DType type, int64_t k, int64_t n) {
  auto& slot = layouts_[{type, 0, k, n}];
  if (!slot) slot = std::make_unique<PackedLayout>(engine_, type, k, n);
  return *slot;
}

Packer& GemmCache::PackerFor(DType type, int64_t k, int64_t n, bool transposed) {
  auto& slot = packers_[{type, transposed ? 1 : 0, k, n}];
  if (!slot) {
    slot = std::make_unique<Packer>(engine_, type, Layout(type, k, n), k, n, transposed);
  }
  return *slot;
}

GemmCache::Kernel GemmCache::KernelFor(DType type, int64_t m, int64_t k, int64_t n) {
  Kernel& kernel = kernels_[{type, m, k, n}];
  if (kernel.gemm) return kernel;
  const PackedLayout& layout = Layout(type, k, n);
  for (const int64_t rows : {m, std::max(m, kTileRows)}) {
    try {
      auto& slot = gemms_[{type, rows, k, n}];
      if (!slot) slot = std::make_unique<Gemm>(engine_, type, rows, layout, k, n);
      // Another implementation for a few rows would be a slow fallback.
      if (slot->implementation() == layout.implementation() || rows >= kTileRows) {
        kernel = {rows, slot.get()};
        return kernel;
      }
    } catch (const dnnl::error& error) {
      if (rows >= kTileRows) Rethrow(error, "matmul");
    }
  }
  ThrowBug("no oneDNN matmul", std::source_location::current());
}

}  // namespace passel::gpu::cpu
