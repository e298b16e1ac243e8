// The specification of every kernel: plain loops, u in float64.
#include <algorithm>
#include <cmath>
#include <vector>

#include "host_attention/kernels.h"

namespace passel::host {
namespace {

size_t ProbeCsr(const CsrView& table, const uint16_t* codes, uint32_t limit, uint32_t base,
                const ProbeScratch& scratch, uint32_t* out) {
  const size_t buckets = size_t{1} << table.k;
  for (size_t t = 0; t < table.l; ++t) {
    const uint16_t* bounds = table.bounds + t * (buckets + 1) + (codes[t] & (buckets - 1));
    const uint16_t* ids = table.ids + t * table.stride;
    for (size_t i = bounds[0]; i < bounds[1]; ++i) {
      uint8_t& counter = scratch.counters[ids[i]];
      counter = static_cast<uint8_t>(std::min<int>(counter + 1, 2));
    }
  }
  size_t count = 0;
  for (uint32_t i = 0; i < limit; ++i) {
    if (scratch.counters[i] >= 2) out[count++] = base + i;
  }
  std::fill_n(scratch.counters, kMaxBlockTokens + 1, uint8_t{0});
  return count;
}

size_t ProbeCompact(const CompactView& table, const uint16_t* codes, uint32_t limit, uint32_t base,
                    uint32_t* out) {
  size_t count = 0;
  for (uint32_t i = 0; i < limit; ++i) {
    uint32_t agreeing = 0;
    for (size_t t = 0; t < table.l; ++t) agreeing += table.codes[t * table.stride + i] == codes[t];
    if (agreeing >= 2) out[count++] = base + i;
  }
  return count;
}

float Dot(const float* a, const float* b, uint32_t n) {
  float sum = 0;
  for (uint32_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// partial ← partial ∪ one token of this score, weight 1/u and value.
void AddToken(PartialRef partial, float score, float inverse_u, const float* v, uint32_t d) {
  if (score > *partial.max) {
    const float w = *partial.max == kEmptyMax ? 0.0f : std::exp(*partial.max - score);
    *partial.den *= w;
    for (uint32_t j = 0; j < d; ++j) partial.num[j] *= w;
    *partial.max = score;
  }
  const float weight = std::exp(score - *partial.max) * inverse_u;
  *partial.den += weight;
  for (uint32_t j = 0; j < d; ++j) partial.num[j] += weight * v[j];
}

void AttendList(const RowsView& rows, const uint32_t* ids, size_t count, const float* q,
                const Weighting& weighting, float* work, PartialRef partial) {
  const uint32_t d = rows.head_dim;
  float* k = work;
  float* v = work + d;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const float q_norm = std::sqrt(Dot(q, q, d));
  for (size_t i = 0; i < count; ++i) {
    LoadRow(rows, ids[i], k, v);
    const float score = Dot(q, k, d) * scale;
    float inverse_u = 1;
    if (weighting.l > 0) {
      for (uint32_t j = 0; j < d; ++j) k[j] -= weighting.mean[j];
      const float norms = q_norm * std::sqrt(Dot(k, k, d));
      const double cosine = norms > 0 ? Dot(q, k, d) / norms : 0;
      inverse_u = static_cast<float>(1 / InclusionProbability(cosine, weighting.k, weighting.l));
    }
    AddToken(partial, score, inverse_u, v, d);
  }
}

void AttendDense(const RowsView& rows, size_t first, size_t count, const float* q, uint32_t heads,
                 float* work, float* max, float* den, float* num) {
  const uint32_t d = rows.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (size_t i = first; i < first + count; ++i) {
    LoadRow(rows, i, work, work + d);
    for (uint32_t h = 0; h < heads; ++h) {
      const float* qh = q + size_t{h} * d;
      AddToken({max + h, den + h, num + size_t{h} * d}, Dot(qh, work, d) * scale, 1.0f, work + d,
               d);
    }
  }
}

void Scores(const RowsView& rows, size_t first, size_t count, const float* q, float* work,
            float* scores) {
  const uint32_t d = rows.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (size_t i = 0; i < count; ++i) {
    LoadRow(rows, first + i, work, work + d);
    scores[i] = Dot(q, work, d) * scale;
  }
}

void Inclusion(const float* cosines, size_t count, uint32_t k, uint32_t l, float* u) {
  for (size_t i = 0; i < count; ++i) {
    u[i] = static_cast<float>(InclusionProbability(cosines[i], k, l));
  }
}

void SignBits(const float* x, size_t count, uint32_t head_dim, const float* r, size_t columns,
              uint16_t* bits) {
  std::vector<float> sums(columns);
  for (size_t i = 0; i < count; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (size_t j = 0; j < head_dim; ++j) {
      const float xj = x[i * head_dim + j];
      for (size_t c = 0; c < columns; ++c) sums[c] += xj * r[j * columns + c];
    }
    for (size_t w = 0; w < columns / 16; ++w) {
      uint32_t word = 0;
      for (size_t b = 0; b < 16; ++b) word |= (sums[w * 16 + b] > 0 ? 1u : 0u) << b;
      bits[i * (columns / 16) + w] = static_cast<uint16_t>(word);
    }
  }
}

}  // namespace

const Kernels kScalarKernels = {ProbeCsr, ProbeCompact, AttendList, AttendDense,
                                Scores,   Inclusion,    SignBits};

}  // namespace passel::host
