#include "host_attention/tables.h"

#include <emmintrin.h>

#include <algorithm>
#include <utility>

#include "host_attention/prefetch.h"

namespace passel::host {
namespace {

// to[j · to_stride + i] = from[i · from_stride + j] for 8 i and 8 j.
void Transpose8(const uint16_t* from, size_t from_stride, uint16_t* to, size_t to_stride) {
  __m128i a[8], b[8];
  for (size_t i = 0; i < 8; ++i) {
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  }
  for (size_t i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (size_t i = 0; i < 2; ++i) {
    for (size_t half = 0; half < 2; ++half) {
      a[4 * i + 2 * half] = _mm_unpacklo_epi32(b[4 * i + half], b[4 * i + 2 + half]);
      a[4 * i + 2 * half + 1] = _mm_unpackhi_epi32(b[4 * i + half], b[4 * i + 2 + half]);
    }
  }
  for (size_t j = 0; j < 4; ++j) {
    b[2 * j] = _mm_unpacklo_epi64(a[j], a[4 + j]);
    b[2 * j + 1] = _mm_unpackhi_epi64(a[j], a[4 + j]);
  }
  for (size_t j = 0; j < 8; ++j) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * to_stride), b[j]);
  }
}

}  // namespace

bool UsesCsr(uint32_t tokens, uint32_t k) { return tokens >= 1024 && tokens >= (1u << k); }

size_t TableStride(uint32_t tokens) { return (size_t{tokens} + 31) / 32 * 32; }

size_t IdBytes(uint32_t tokens, uint32_t l) {
  return TableStride(tokens) * l * sizeof(uint16_t) + kTableSlack;
}

size_t BoundBytes(uint32_t tokens, uint32_t k, uint32_t l) {
  if (!UsesCsr(tokens, k)) return 0;
  const size_t bytes = ((size_t{1} << k) + 1) * l * sizeof(uint16_t);
  return (bytes + 63) / 64 * 64;
}

size_t TableBytes(uint32_t tokens, uint32_t k, uint32_t l) {
  return IdBytes(tokens, l) + BoundBytes(tokens, k, l);
}

void SortTable(const uint16_t* codes, uint32_t tokens, uint32_t k, uint16_t* bounds,
               uint16_t* ids) {
  const size_t buckets = size_t{1} << k;
  std::fill_n(bounds, buckets + 1, uint16_t{0});
  for (uint32_t i = 0; i < tokens; ++i) ++bounds[codes[i] + size_t{1}];
  for (size_t c = 1; c <= buckets; ++c)
    bounds[c] = static_cast<uint16_t>(bounds[c] + bounds[c - 1]);
  // Filling advances each bucket's start to its end, which is the next one's start.
  for (uint32_t i = 0; i < tokens; ++i) ids[bounds[codes[i]]++] = static_cast<uint16_t>(i);
  for (size_t c = buckets; c > 0; --c) bounds[c] = bounds[c - 1];
  bounds[0] = 0;
}

TableBlock::TableBlock(uint32_t first, uint32_t tokens, uint32_t k, uint32_t l, bool csr,
                       std::shared_ptr<Usage> usage)
    : first_(first),
      tokens_(tokens),
      k_(k),
      l_(l),
      stride_(TableStride(tokens)),
      own_bytes_(IdBytes(tokens, l) + (csr ? BoundBytes(tokens, k, l) : 0)),
      usage_(std::move(usage)) {
  own_ = std::make_unique<uint16_t[]>(own_bytes_ / sizeof(uint16_t));
  ids_ = own_.get();
  if (csr) bounds_ = ids_ + IdBytes(tokens, l) / sizeof(uint16_t);
  usage_->AddTables(static_cast<int64_t>(own_bytes_));
}

TableBlock::TableBlock(uint32_t first, uint32_t tokens, uint32_t k, uint32_t l, uint16_t* ids,
                       uint16_t* bounds)
    : first_(first),
      tokens_(tokens),
      k_(k),
      l_(l),
      stride_(TableStride(tokens)),
      ids_(ids),
      bounds_(bounds) {}

TableBlock::~TableBlock() {
  if (usage_ != nullptr) usage_->AddTables(-static_cast<int64_t>(own_bytes_));
}

void TableBlock::PutCodes(uint32_t index, uint32_t count, const uint16_t* codes) {
  // Tables lie far apart: a cache line of each is filled at a time, and asked for ahead.
  constexpr uint32_t kRun = 32, kAhead = 16;
  for (uint32_t at = 0, run = 0; at < count; at += run) {
    run = std::min(kRun - (index + at) % kRun, count - at);
    const uint16_t* from = codes + size_t{at} * l_;
    uint16_t* to = ids_ + index + at;
    uint32_t t = 0;
    for (; run == kRun && t + 8 <= l_; t += 8) {
      for (uint32_t ahead = t + kAhead; ahead < std::min(t + kAhead + 8, l_); ++ahead) {
        PrefetchToWrite(to + ahead * stride_);
      }
      for (uint32_t i = 0; i < kRun; i += 8) {
        Transpose8(from + size_t{i} * l_ + t, l_, to + t * stride_ + i, stride_);
      }
    }
    for (; t < l_; ++t) {
      for (uint32_t i = 0; i < run; ++i) to[t * stride_ + i] = from[size_t{i} * l_ + t];
    }
  }
}

void TableBlock::SealTable(uint32_t t, uint16_t* scratch) {
  std::copy_n(Ids(t), tokens_, scratch);
  SortTable(scratch, tokens_, k_, Bounds(t), Ids(t));
}

void TableBlock::ReadCodes(uint32_t t, uint16_t* codes) const {
  const uint16_t* ids = Ids(t);
  if (!csr()) {
    std::copy_n(ids, tokens_, codes);
    return;
  }
  const uint16_t* bounds = Bounds(t);
  for (size_t c = 0; c < (size_t{1} << k_); ++c) {
    for (size_t i = bounds[c]; i < bounds[c + 1]; ++i) codes[ids[i]] = static_cast<uint16_t>(c);
  }
}

void TableBlock::MergeTable(uint32_t t, const std::vector<std::shared_ptr<const TableBlock>>& parts,
                            uint16_t* scratch) {
  uint16_t* codes = csr() ? scratch : Ids(t);
  for (const auto& part : parts) part->ReadCodes(t, codes + (part->first() - first_));
  if (csr()) SortTable(codes, tokens_, k_, Bounds(t), Ids(t));
}

size_t TableBlock::Probe(const Kernels& kernels, const uint16_t* codes, uint32_t limit,
                         const ProbeScratch& scratch, uint32_t* out) const {
  if (limit <= first_) return 0;
  const uint32_t local = std::min(limit - first_, tokens_);
  if (csr()) {
    return kernels.probe_csr({bounds_, ids_, stride_, tokens_, k_, l_}, codes, local, first_,
                             scratch, out);
  }
  return kernels.probe_compact({ids_, stride_, l_}, codes, local, first_, out);
}

}  // namespace passel::host
