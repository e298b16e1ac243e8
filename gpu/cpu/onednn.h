#pragma once

#include <oneapi/tbb/concurrent_hash_map.h>
#include <oneapi/tbb/enumerable_thread_specific.h>

#include <compare>
#include <cstddef>
#include <cstdint>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "gpu/device.h"

namespace passel::gpu::cpu {

// The one place that calls oneDNN: its errors become ours here, and the differences between its
// versions 2 and 3 end here.

// True where the CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX) and oneDNN uses it.
bool HasBf16Arithmetic();

// How oneDNN wants a [k, n] operand B laid out: the same for every number of rows of A.
class PackedLayout {
 public:
  PackedLayout(const dnnl::engine& engine, DType type, int64_t k, int64_t n);

  size_t bytes() const { return desc_.get_size(); }
  // Element (k, n) stands at row_offsets()[k] + col_offsets()[n].
  const std::vector<int64_t>& row_offsets() const { return row_offsets_; }
  const std::vector<int64_t>& col_offsets() const { return col_offsets_; }
  const dnnl::memory::desc& desc() const { return desc_; }
  const std::string& implementation() const { return implementation_; }

 private:
  void ComputeOffsets(int64_t k, int64_t n);

  dnnl::memory::desc desc_;
  std::string implementation_;
  std::vector<int64_t> row_offsets_, col_offsets_;
};

// C = A · B of fixed shape, single-threaded, callable from several threads at once.
// A: [m, k] row-major, dense; B: packed; C: [m, n] f32 row-major, dense.
class Gemm {
 public:
  // Throws dnnl::error where oneDNN has nothing for this shape and layout.
  Gemm(const dnnl::engine& engine, DType type, int64_t m, const PackedLayout& layout, int64_t k,
       int64_t n);
  void Run(const void* a, const void* b, float* c);
  const std::string& implementation() const { return implementation_; }

 private:
  struct Call {  // what one thread executes with
    dnnl::stream stream;
    dnnl::memory a, b, c, scratch;
    std::vector<std::byte> scratch_bytes;
  };
  Call MakeCall() const;

  dnnl::engine engine_;
  dnnl::matmul::primitive_desc desc_;
  dnnl::matmul primitive_;
  std::string implementation_;
  tbb::enumerable_thread_specific<Call> calls_;
};

// Reorders a row-major operand into a PackedLayout; callable from several threads at once.
class Packer {
 public:
  // transposed: the source is [n, k] row-major (a weight), else [k, n].
  Packer(const dnnl::engine& engine, DType type, const PackedLayout& layout, int64_t k, int64_t n,
         bool transposed);
  void Run(const void* source, void* packed);

 private:
  struct Call {
    dnnl::stream stream;
    dnnl::memory source, packed;
  };

  dnnl::engine engine_;
  dnnl::memory::desc source_, packed_;
  dnnl::reorder primitive_;
  tbb::enumerable_thread_specific<Call> calls_;
};

// Every primitive made so far. One thread asks; what it returns lives as long as the cache.
class GemmCache {
 public:
  GemmCache();

  const PackedLayout& Layout(DType type, int64_t k, int64_t n);
  Packer& PackerFor(DType type, int64_t k, int64_t n, bool transposed);
  // The kernel for at least `m` rows: exactly m, or kTileRows where oneDNN has no equally good
  // kernel for fewer. rows() of the result says which.
  struct Kernel {
    int64_t rows = 0;
    Gemm* gemm = nullptr;
  };
  Kernel KernelFor(DType type, int64_t m, int64_t k, int64_t n);

 private:
  using Key = std::tuple<DType, int64_t, int64_t, int64_t>;

  dnnl::engine engine_;
  std::map<Key, std::unique_ptr<PackedLayout>> layouts_;
  std::map<Key, std::unique_ptr<Packer>> packers_;
  std::map<Key, std::unique_ptr<Gemm>> gemms_;
  std::map<Key, Kernel> kernels_;
};

// Rows of the fixed tile that deterministic products are padded to.
inline constexpr int64_t kTileRows = 16;

}  // namespace passel::gpu::cpu
