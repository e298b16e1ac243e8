#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "runtime/base/bf16.h"
#include "runtime/base/collectives.h"

namespace passel::gpu {

enum class DType : uint8_t { kF32, kBf16, kI32, kU16 };
size_t SizeOf(DType type);

// Memory of a device, owned. Counted against the device's limit; freed on destruction.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual size_t bytes() const = 0;
};

// A row-major matrix in device memory, not owned. Rows may be further apart than `cols`.
struct Tensor {
  void* data = nullptr;
  DType type = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements between rows

  Tensor Rows(int64_t begin, int64_t count) const;
  Tensor Cols(int64_t begin, int64_t count) const;
};

// A weight matrix in the device's own layout: y = x Wᵀ with W: [out_features, in_features].
class Linear {
 public:
  virtual ~Linear() = default;
  virtual int64_t in_features() const = 0;
  virtual int64_t out_features() const = 0;
};
// Writes rows [begin, begin + count) of a [rows, in_features] weight as bf16 to `out`, row-major.
// Called from several threads at once, for disjoint ranges.
using RowReader = std::function<void(int64_t begin, int64_t count, bf16* out)>;

// Attention shapes of this model rank (after tensor-parallel slicing).
struct AttentionShape {
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 0;  // 1/√head_dim
  int32_t group() const { return heads / kv_heads; }
};

// The KV cache of one request and layer on the device, as pages of `kKvPageTokens` token slots. A
// page is [kKvPageTokens, kv_heads, 2, head_dim] bf16 (K then V). Slots are filled in any order;
// attention covers slots [0, tokens).
inline constexpr int32_t kKvPageTokens = 64;
struct KvView {
  std::span<const int32_t> pages;  // host memory; page numbers in the device's KV pool
  int64_t tokens = 0;              // valid slots
};

// Rows of a prompt's K and V up to the next multiple of this let a GPU attend fastest.
inline constexpr int64_t kCausalPadding = 128;

// Partial results of a batch: max, den: [n, heads] f32; num: [n, heads·head_dim] f32; device
// memory.
struct Partials {
  Tensor max;
  Tensor den;
  Tensor num;
};

// How a token is chosen from a row of logits: the likeliest (the lowest of equal ones) where
// temperature ≤ 0. Else of the smallest set of likeliest tokens (of equal ones the lower) whose
// softmax(logits / temperature) sums to top_p or more, the first, in the order of ids, at which the
// sum passes `draw` of the set's.
struct SamplingRule {
  double temperature = 0;
  double top_p = 1;
  double draw = 0;  // in [0, 1)
};

// Completion of all work issued before it was recorded.
class Event {
 public:
  virtual ~Event() = default;
  virtual bool Done() = 0;  // never blocks
  virtual void Wait() = 0;
};

struct DeviceInfo {
  std::string backend;        // "CPU" or "CUDA"
  std::string name;           // "Intel … (AVX-512, BF16)", "NVIDIA H100 80GB HBM3"
  uint64_t memory_bytes = 0;  // budget of this rank
  int32_t max_head_dim = 0;   // the largest that attention serves; 0: any
};

// Operations that a device has recorded, to issue them again at once. Goes before the memory they
// read and write, and before the device.
class Recording {
 public:
  virtual ~Recording() = default;
};

// What a model rank computes with. Work is issued in order and may run asynchronously; results are
// in host-readable memory after an Event recorded behind them is done. One thread issues.
// Shapes: n = rows of the batch (decode: one a sequence; prefill: the tokens of a chunk).
// Throws Error{kMemory} where a budget does not suffice, Error{kBug} for shapes that do not agree.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceInfo info() const = 0;
  // Type of what feeds a MatMul: bf16, or f32 on a CPU without bf16 arithmetic.
  virtual DType activation_type() const = 0;
  virtual std::unique_ptr<Buffer> Allocate(size_t bytes) = 0;
  // Host memory that transfers to and from the device go through fast (pinned), 64-byte aligned.
  // Operations read and write it too.
  virtual std::unique_ptr<Buffer> AllocateStaging(size_t bytes) = 0;
  // The same of memory that someone else keeps for longer than the buffer lives.
  virtual std::unique_ptr<Buffer> PinStaging(std::span<std::byte> memory) = 0;
  virtual uint64_t allocated_bytes() const = 0;
  // `host` may also be memory of this device.
  virtual void CopyToDevice(void* device, const void* host, size_t bytes) = 0;
  virtual void CopyToHost(void* host, const void* device, size_t bytes) = 0;
  virtual std::unique_ptr<Event> Record() = 0;

  // Issues what `issue` issues, which is the same for the same `recording` every time: products,
  // norms, Rope, SiluMul, HeadRmsNorm, Add and Convert, of the same tensors, and collectives of
  // `ranks`. A device that gains by it calls `issue` the first times alone and issues what it keeps
  // in `recording` (null at first) from then on.
  virtual void Replay(std::unique_ptr<Recording>& recording, Collectives& ranks,
                      const std::function<void()>& issue) {
    (void)recording, (void)ranks;
    issue();
  }

  virtual std::unique_ptr<Linear> MakeLinear(int64_t out_features, int64_t in_features,
                                             const RowReader& rows) = 0;
  // out: [n, out_features] f32. Same bits for a row whatever n is, when deterministic.
  virtual void MatMul(const Linear& w, Tensor x, Tensor out) = 0;

  // into += x Wᵀ. scratch: like `into`, without its content; unused where the product can add.
  virtual void MatMulAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch) {
    MatMul(w, x, scratch);
    Add(into, scratch);
  }

  // into += the sum of x Wᵀ over the ranks, each of which holds some of W's columns: the same bits
  // on every rank. Every rank must call it. scratch: like `into`, without gaps between rows.
  virtual void MatMulSumAdd(const Linear& w, Tensor x, Tensor into, Tensor scratch,
                            Collectives& ranks);

  // out = norm(x) Wᵀ, norm as in AddRmsNorm without a delta. x: [n, in_features] f32; normed:
  // scratch of as many elements, of activation_type.
  virtual void NormMatMul(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out,
                          Tensor normed) {
    AddRmsNorm(x, {}, norm, eps, normed);
    MatMul(w, normed, out);
  }

  // out = SiluMul of norm(x) Wᵀ. normed: as above; gate_up: scratch, [n, out_features] f32.
  virtual void NormMatMulSilu(Tensor x, Tensor norm, float eps, const Linear& w, Tensor out,
                              Tensor normed, Tensor gate_up) {
    NormMatMul(x, norm, eps, w, gate_up, normed);
    SiluMul(gate_up, out);
  }

  // out[i] = row ids[i] of the weight, f32; zeros where ids[i] < 0 (a row another rank holds).
  // table: [vocab, hidden]; with tied embeddings the output weight. ids: host memory, validated by
  // the caller.
  virtual void Embed(const Linear& table, std::span<const int32_t> ids, Tensor out) = 0;
  // residual += delta (where delta.data is set); out = residual / rms(residual) · weight.
  // residual, delta: [n, hidden] f32; weight: [1, hidden] f32; out: activation_type or f32.
  virtual void AddRmsNorm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor out) = 0;
  // What Rope turns by: angles positions[i] · inv_freq[j], computed in double. inv_freq: head_dim/2
  // values, positions: [n], both in host memory; table: [n, head_dim] f32, without gaps between
  // rows, in the device's own layout.
  virtual void RopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                         Tensor table) = 0;
  // Rotates pairs (j, j + head_dim/2) of each head in place, row i by row i of the table. x: [n,
  // heads·head_dim] f32.
  virtual void Rope(Tensor x, int32_t head_dim, Tensor table) = 0;
  // out = silu(gate) · up; gate_up: [n, 2·ffn] f32 (gate first); out: [n, ffn] activation_type.
  virtual void SiluMul(Tensor gate_up, Tensor out) = 0;
  // Each head of a row by itself, in place: x = x / rms(x) · weight. x: [n, heads·head_dim] f32;
  // weight: [1, heads·head_dim] f32.
  virtual void HeadRmsNorm(Tensor x, int32_t head_dim, Tensor weight, float eps) = 0;
  // into += delta. f32; into: [n, cols]; delta: the same, or one row that goes to every row.
  virtual void Add(Tensor into, Tensor delta) = 0;
  // out = in, between f32 and bf16 or within one type.
  virtual void Convert(Tensor in, Tensor out) = 0;

  // ids[i] = the token that rules[i] chooses from row i; −1 where the row has a NaN. x: [n, cols]
  // f32; ids: [n] in staging memory, there when an event behind is done. Weights are at least as
  // exact as float32's, their sums are float64: devices may differ where a draw falls on an edge.
  virtual void Sample(Tensor x, std::span<const SamplingRule> rules, std::span<int32_t> ids) = 0;

  // Reserves the KV pool: `pages` pages of this shape. Page numbers are the caller's to hand out.
  virtual void CreateKvPool(const AttentionShape& shape, int32_t pages) = 0;
  // k, v: [n, kv_heads·head_dim] f32 or bf16; row i goes to slot slots[i] of pages.
  virtual void StoreKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                       Tensor v) = 0;
  // Reads slots back as bf16: k, v: [n, kv_heads·head_dim].
  virtual void LoadKv(std::span<const int32_t> pages, std::span<const int64_t> slots, Tensor k,
                      Tensor v) = 0;
  // As K and V leave for host ranks, by head: out: [kv_heads·n, 2·head_dim] bf16, whose row h·n + i
  // has head h of row i of k, then of v: [n, kv_heads·head_dim] bf16. out may be staging memory.
  virtual void PackKv(Tensor k, Tensor v, Tensor out) = 0;
  // The reverse. in: what PackKv's `out` holds; may be staging memory.
  virtual void UnpackKv(Tensor in, Tensor k, Tensor v) = 0;
  // Exact attention of one query row per sequence over its view. q: [n, heads·head_dim] f32.
  virtual void DecodeAttention(Tensor q, std::span<const KvView> views, Partials out) = 0;
  // Causal attention of a prefill chunk: query row i stands at position start + i and sees keys
  // 0 … start + i (the last `window` of them where window > 0). q: [n, heads·head_dim] f32;
  // k, v: [≥ start + n, kv_heads·head_dim] bf16, whose rows from start + n to the next multiple of
  // kCausalPadding may be overwritten; out: [n, heads·head_dim] activation_type or f32.
  virtual void CausalAttention(const AttentionShape& shape, Tensor q, Tensor k, Tensor v,
                               int64_t start, int64_t window, Tensor out) = 0;

  // Sets R: [head_dim, k·l] f32 row-major in host memory.
  virtual void SetProjections(std::span<const float> r, int32_t head_dim, int32_t k, int32_t l) = 0;
  // SimHash codes: x: [n, heads·head_dim] f32 or bf16, minus mean: [1 or n, heads·head_dim] f32
  // (where mean.data is set; one row for all or one for each); codes: [n, heads·l] u16, or by head:
  // [heads·n, l], whose row h·n + i is of head h of row i. Bit b of table t = (x·R[:, t·k + b] >
  // 0).
  virtual void HashCodes(Tensor x, Tensor mean, Tensor codes) = 0;
  // mean: [1, cols] f32 of the rows of x (f32 or bf16), summed in float64 on CPUs.
  virtual void ColumnMean(Tensor x, Tensor mean) = 0;

  // Makes every partial the empty one (−∞, 0, 0).
  virtual void ClearPartials(Partials partials) = 0;
  // into ← into ∪ from, row i of `from` into row rows[i] and heads first_heads[i] … of `into`, in
  // ascending order of i (which fixes the bits).
  // from: memory that the device can read, with rows that cover `from.max.cols` heads; num f32 or
  // bf16, head_dim and its stride even. It is read from the call on, not behind what was issued
  // before: nothing that is still to be done on the device may write it.
  virtual void MergePartials(Partials into, Partials from, std::span<const int32_t> rows,
                             std::span<const int32_t> first_heads) = 0;
  // out = num / den; out: [n, heads·head_dim] activation_type. den = 0 gives 0.
  virtual void NormalizePartials(Partials partials, Tensor out) = 0;

  // Collectives over this device's memory, for the same ranks as `host`, which does the same over
  // host memory and is kept for what stays there. Every rank must call it. Must not outlive the
  // device. Throws Error{kCluster} where the ranks' devices cannot be joined.
  virtual std::unique_ptr<Collectives> MakeCollectives(std::unique_ptr<Collectives> host) = 0;
};

// What every backend checks: the arguments of RopeTable, Rope, and PackKv and UnpackKv (throws),
// and whether `codes` fit HashCodes of n rows of so many heads.
void CheckRopeTable(std::span<const float> inv_freq, std::span<const int64_t> positions,
                    const Tensor& table);
void CheckRope(const Tensor& x, int32_t head_dim, const Tensor& table);
void CheckPackKv(const Tensor& k, const Tensor& v, const Tensor& packed);
bool FitCodes(const Tensor& codes, int64_t n, int64_t heads, int64_t l);

struct DeviceOptions {
  uint64_t memory_limit_bytes = 0;  // 0: what the device has
  int32_t threads = 0;              // CPU backend; 0: the affinity mask's
  bool deterministic = false;
  // Of the model ranks of this machine, which this one is and how many they are: they take the
  // GPUs in turn, and share one where there are more of them.
  int32_t local_rank = 0;
  int32_t local_ranks = 1;
  // After which a model rank that others wait for is taken for lost. Long enough for one that is
  // still loading its weights; a rank's death ends the job sooner.
  std::chrono::milliseconds peer_timeout = std::chrono::minutes(5);
};
std::unique_ptr<Device> MakeCpuDevice(const DeviceOptions& options);
// Null where the build has no CUDA backend or the machine no usable GPU; `why` then says which.
std::unique_ptr<Device> MakeCudaDevice(const DeviceOptions& options, std::string* why);

}  // namespace passel::gpu
