// Products with some tens of rows (decode of a batch), one after another in one kernel whose blocks
// fill a processor each: bound by reading the weights once, which must never stop.
// The kernel is chain_kernel.cuh's.

#include <cudaTypedefs.h>

#include <algorithm>

#include "gpu/cuda/chain_kernel.cuh"
#include "gpu/cuda/launch.cuh"
#include "gpu/cuda/product_chain.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

// Elements of each dimension, and how far one is from the next in all but the first.
template <int kRank>
CUtensorMap MapOf(const void* data, const int64_t (&size)[kRank], const int64_t (&apart)[kRank - 1],
                  const int (&box)[kRank]) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    CheckCuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found),
              "cudaGetDriverEntryPointByVersion");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  cuuint64_t sizes[kRank], bytes[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(size[i]);
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(apart[i - 1]) * 2;
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes, bytes,
             boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  Check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a matrix");
  return map;
}

int Processors() {
  static const int count = [] {
    int device = 0, processors = 0;
    CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
    CheckCuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
              "cudaDeviceGetAttribute");
    return processors;
  }();
  return count;
}

constexpr size_t SumBytes(size_t blocks) {
  return 2 * blocks * kSlots * kTileFeatures * kMaxChainRows * sizeof(__nv_bfloat16);
}
constexpr size_t kSquareBytes = 2 * size_t{kMaxChainRows} * kMostParts * sizeof(float);

// All, or nearly all where then no block works on two tiles.
int32_t BlocksFor(int32_t tiles, int32_t steps, int32_t blocks) {
  const int32_t units = tiles * steps;
  if (units <= blocks) return units;
  const auto most = [&](int32_t count) { return (units + count - 1) / count; };
  const int32_t even = blocks / tiles * tiles;
  if (even > 0 && steps % (even / tiles) == 0 && most(even) * 100 <= most(blocks) * 103) {
    return even;
  }
  return blocks;
}

// Of 16 rows of weights; for SiLU of 8 gates and their ups.
int64_t AllGroups(const ChainedProduct& product) {
  const int64_t of_group = product.kind == ChainedProduct::Kind::kSilu ? 8 : 16;
  return (product.features + of_group - 1) / of_group;
}

// Groups in a tile: where other tiles leave one for nearly every block, these, as then no sums are
// shared. Much smaller ones would leave too little under way.
int32_t GroupsOf(const ChainedProduct& product) {
  const int64_t blocks = Processors();
  const int64_t groups = AllGroups(product), most = (groups + blocks - 1) / blocks;
  const bool one_each = product.kind != ChainedProduct::Kind::kAdd && product.turns == nullptr &&
                        most >= 6 && most <= 16 && (groups + most - 1) / most * 100 >= blocks * 95;
  return one_each ? static_cast<int32_t>(most) : 8;
}

template <int kRows>
void Launch(cudaStream_t stream, std::span<const ChainedProduct> products, void* scratch, int turn,
            const PeerInboxes* peers) {
  using S = Shape<kRows>;
  ChainArgs args{};
  const int blocks = Processors();
  auto* memory = static_cast<char*>(scratch);
  args.counters = reinterpret_cast<uint32_t*>(memory) + turn * kCounters;
  args.stale = reinterpret_cast<uint32_t*>(memory) + (1 - turn) * kCounters;
  memory += 2 * kCounters * sizeof(uint32_t);
  args.squares = reinterpret_cast<float*>(memory);
  args.sums = reinterpret_cast<OwnSums::Four*>(memory + kSquareBytes);
  args.count = static_cast<int32_t>(products.size());
  args.n = static_cast<int32_t>(products[0].x.rows);
  if (peers != nullptr) args.peers = *peers;
  for (size_t i = 0; i < products.size(); ++i) {
    const ChainedProduct& from = products[i];
    Phase& p = args.phases[i];
    p.silu = from.kind == ChainedProduct::Kind::kSilu;
    p.add = from.kind == ChainedProduct::Kind::kAdd;
    p.sum_turn = from.sum_turn;
    p.turns = from.turns;
    p.turned = static_cast<int32_t>(from.turned);
    const int64_t k = from.x.cols;
    const int64_t x_size[] = {k, from.x.rows}, x_apart[] = {from.x.stride};
    const int x_box[] = {kStep, kRows};
    p.x = MapOf<2>(from.x.data, x_size, x_apart, x_box);
    // For SiLU, 8 gates and their 8 ups in turns.
    const int64_t size[] = {k, p.silu ? 8 : from.features, p.silu ? 2 : 1,
                            p.silu ? from.features / 8 : 1};
    const int64_t apart[] = {k, p.silu ? from.features * k : k, 8 * k};
    p.groups = GroupsOf(from);
    const auto map_of = [&](int groups) {
      const int box[] = {kStep, p.silu ? 8 : groups * 16, p.silu ? 2 : 1, p.silu ? groups : 1};
      return MapOf<4>(from.w, size, apart, box);
    };
    p.w = map_of(std::min(p.groups, 8));
    if (p.groups > 8) p.w_rest = map_of(p.groups - 8);
    p.out = from.out;
    p.normed = from.normed;
    p.norm = from.norm;
    p.eps = from.eps;
    p.features = static_cast<int32_t>(from.features);
    p.k = static_cast<int32_t>(k);
    p.steps = static_cast<int32_t>((k + kStep - 1) / kStep);
    p.tiles = static_cast<int32_t>((AllGroups(from) + p.groups - 1) / p.groups);
    p.blocks = p.groups != 8 ? p.tiles : BlocksFor(p.tiles, p.steps, blocks);
    p.x_parts = i > 0 ? args.phases[i - 1].parts : 0;
    p.parts = p.tiles * 4;
  }
  static const bool once = [] {
    CheckCuda(cudaFuncSetAttribute(ChainKernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kSharedBytes),
              "cudaFuncSetAttribute");
    return true;
  }();
  static_cast<void>(once);
  LaunchBehind(stream, dim3(static_cast<unsigned>(blocks)), kThreads, kSharedBytes,
               "launch of a chain of products", ChainKernel<kRows>, args);
}

}  // namespace

bool ServesProductChains() {
  static const bool serves = [] {
    int device = 0, major = 0, minor = 0, shared = 0;
    CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
    CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
              "cudaDeviceGetAttribute");
    CheckCuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
              "cudaDeviceGetAttribute");
    CheckCuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
              "cudaDeviceGetAttribute");
    return major == 9 && minor == 0 && shared >= kSharedBytes;
  }();
  return serves;
}

bool FitsProductChain(const ChainedProduct& product) {
  const Tensor& x = product.x;
  const bool silu = product.kind == ChainedProduct::Kind::kSilu;
  const int64_t tiles = (AllGroups(product) + 7) / 8, steps = (x.cols + kStep - 1) / kStep;
  return x.rows > 0 && x.rows <= kMaxChainRows && x.cols % 8 == 0 && x.stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         (!silu || (product.features % 8 == 0 && product.out.stride % 2 == 0 &&
                    reinterpret_cast<uintptr_t>(product.out.data) % 4 == 0)) &&
         tiles * steps * (Processors() + 1) <= INT32_MAX &&
         // A block that finishes squares has room for the sums of two tiles.
         (product.kind != ChainedProduct::Kind::kAdd || tiles <= Processors());
}

bool CanTurn(const ChainedProduct& product) {
  return product.kind == ChainedProduct::Kind::kStore &&
         (AllGroups(product) + 7) / 8 <= Processors();
}

size_t ProductChainScratch() {
  return 2 * kCounters * sizeof(uint32_t) + kSquareBytes +
         SumBytes(static_cast<size_t>(Processors()));
}

void PrepareProductChainScratch(cudaStream_t stream, void* scratch) {
  const size_t zeros = 2 * kCounters * sizeof(uint32_t) + kSquareBytes;
  CheckCuda(cudaMemsetAsync(scratch, 0, zeros, stream), "cudaMemsetAsync");
  CheckCuda(cudaMemsetAsync(static_cast<char*>(scratch) + zeros, 0xff,
                            SumBytes(static_cast<size_t>(Processors())), stream),
            "cudaMemsetAsync");
}

size_t PeerInboxBytes(int ranks) {
  return 2 * static_cast<size_t>(ranks * kMaxSummedFeatures * kMaxChainRows) * sizeof(float);
}

void LaunchProductChain(cudaStream_t stream, std::span<const ChainedProduct> products,
                        void* scratch, int turn, const PeerInboxes* peers) {
  const int64_t n = products[0].x.rows;
  if (n <= 16) return Launch<16>(stream, products, scratch, turn, peers);
  if (n <= 32) return Launch<32>(stream, products, scratch, turn, peers);
  Launch<64>(stream, products, scratch, turn, peers);
}

}  // namespace passel::gpu::cuda
