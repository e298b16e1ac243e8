#pragma once

#include <cstddef>
#include <cstdint>

#include "host_attention/host_attention.h"
#include "host_attention/isa.h"
#include "runtime/base/partial.h"

namespace passel::host {

// Tokens of one block at most: ids and bucket bounds are 16-bit.
inline constexpr uint32_t kMaxBlockTokens = 65535;
// Bytes that a kernel may read past a table's ids (never uses): buckets are copied in such moves.
inline constexpr size_t kTableSlack = 128;

// K and V rows of a run of tokens, `stride` bytes apart.
//   kBf16: K [head_dim] then V [head_dim];
//   kInt8: scale of K, scale of V (float32), K [head_dim] as int8, half steps of K [head_dim / 8]
//     (bit j % 8 of byte j / 8 is element j's), V [head_dim] as int8: k = scale · (int8 + bit / 2),
//     v = scale · int8. Scores need more than 8 bits, values do not (docs/performance.md).
struct RowsView {
  const std::byte* data = nullptr;
  size_t stride = 0;
  uint32_t head_dim = 0;
  KvType type = KvType::kBf16;
};
size_t RowStride(KvType type, uint32_t head_dim);
// kv: [2, head_dim], K then V.
void StoreRow(KvType type, uint32_t head_dim, const bf16* kv, std::byte* row);
// k, v: [head_dim].
void LoadRow(const RowsView& rows, size_t index, float* k, float* v);

// The sealed form of a block. Table t: bounds[t·(2^k + 1) + c] … [c + 1] delimit the ids, at
// ids[t·stride], of the tokens with code c.
struct CsrView {
  const uint16_t* bounds = nullptr;
  const uint16_t* ids = nullptr;
  size_t stride = 0;
  uint32_t tokens = 0, k = 0, l = 0;
};
// The compact form: codes[t·stride + i] of token i.
struct CompactView {
  const uint16_t* codes = nullptr;
  size_t stride = 0;  // a multiple of 32
  uint32_t l = 0;
};

// Memory a probe works in. counters: [kMaxBlockTokens + 65], zero before and after.
// staging: [kStagingIds].
inline constexpr size_t kStagedAtOnce = 4096;
inline constexpr size_t kStagingIds = 2 * kStagedAtOnce + kTableSlack;
// Entries that a probe may write past those it counts.
inline constexpr size_t kProbeSlack = 3;
struct ProbeScratch {
  uint8_t* counters = nullptr;
  uint16_t* staging = nullptr;
};

// How listed tokens are weighted: by 1/u for SimHash codes of k bits in l tables (DESIGN 2), with
// keys centred by mean [head_dim]; l = 0: u = 1.
struct Weighting {
  const float* mean = nullptr;
  uint32_t k = 0, l = 0;
};

// Floats of work memory that a call for `heads` query heads needs.
size_t WorkFloats(uint32_t heads, uint32_t head_dim);

// One ISA level's kernels. All are pure functions of their arguments, exact up to rounding.
// A partial's `max` is the maximum of the plain scores q·k/√d: any reference value is right, as
// max and den are read together.
struct Kernels {
  // Appends base + i to `out` (room for `limit` + kProbeSlack entries) for each i < limit that
  // shares ≥ 2 of the l codes, ascending; returns the count. codes: [l].
  size_t (*probe_csr)(const CsrView& table, const uint16_t* codes, uint32_t limit, uint32_t base,
                      const ProbeScratch& scratch, uint32_t* out);
  size_t (*probe_compact)(const CompactView& table, const uint16_t* codes, uint32_t limit,
                          uint32_t base, uint32_t* out);
  // Adds rows ids[0 … count) to one head's partial. q: [head_dim].
  void (*attend_list)(const RowsView& rows, const uint32_t* ids, size_t count, const float* q,
                      const Weighting& weighting, float* work, PartialRef partial);
  // Adds rows [first, first + count) to each head's partial, exactly, in one pass over the rows.
  // q, num: [heads, head_dim]; max, den: [heads].
  void (*attend_dense)(const RowsView& rows, size_t first, size_t count, const float* q,
                       uint32_t heads, float* work, float* max, float* den, float* num);
  // scores[i] = q·k_(first+i)/√d.
  void (*scores)(const RowsView& rows, size_t first, size_t count, const float* q, float* work,
                 float* scores);
  // u for each cosine.
  void (*inclusion)(const float* cosines, size_t count, uint32_t k, uint32_t l, float* u);
  // Sign bits of x·R: bit c % 16 of word c / 16 of a row is x·R[:, c] > 0. x: [count, head_dim];
  // r: [head_dim, columns], columns a multiple of 32; bits: [count, columns / 16].
  void (*sign_bits)(const float* x, size_t count, uint32_t head_dim, const float* r, size_t columns,
                    uint16_t* bits);
};

const Kernels& KernelsFor(Isa isa);

// The specification of u in float64: the probability that ≥ 2 of l tables agree, for a key at
// this cosine. The argument is clamped; the result is in (0, 1].
double InclusionProbability(double cosine, uint32_t k, uint32_t l);

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace passel::host
