#pragma once
// The kernel table of one SIMD level, over the Simd of the including file.

namespace passel::host {
namespace {

// Calls body<Rows, head_dim or 0>() for the row type and head size; common sizes are compiled in.
template <class Body>
inline void Dispatch(const RowsView& rows, const Body& body) {
  const auto by_size = [&]<class Rows>() {
    switch (rows.head_dim) {
      case 64:
        return body.template operator()<Rows, 64>();
      case 128:
        return body.template operator()<Rows, 128>();
      default:
        return body.template operator()<Rows, 0>();
    }
  };
  if (rows.type == KvType::kBf16) {
    by_size.template operator()<Bf16Rows>();
  } else {
    by_size.template operator()<Int8Rows>();
  }
}

void AttendList(const RowsView& rows, const uint32_t* ids, size_t count, const float* q,
                const Weighting& weighting, float* work, PartialRef partial) {
  Dispatch(rows, [&]<class Rows, uint32_t kFixed>() {
    AttendListOf<Rows, kFixed>(rows, ids, count, q, weighting, work, partial);
  });
}

void AttendDense(const RowsView& rows, size_t first, size_t count, const float* q, uint32_t heads,
                 float* work, float* max, float* den, float* num) {
  Dispatch(rows, [&]<class Rows, uint32_t kFixed>() {
    AttendDenseOf<Rows, kFixed>(rows, first, count, q, heads, work, max, den, num);
  });
}

void Scores(const RowsView& rows, size_t first, size_t count, const float* q, float* work,
            float* scores) {
  Dispatch(rows, [&]<class Rows, uint32_t kFixed>() {
    ScoresOf<Rows, kFixed>(rows, first, count, q, work, scores);
  });
}

void InclusionOf(const float* cosines, size_t count, uint32_t k, uint32_t l, float* u) {
  float lanes[Simd::kLanes];
  for (size_t at = 0; at < count; at += Simd::kLanes) {
    for (size_t i = 0; i < Simd::kLanes; ++i) lanes[i] = at + i < count ? cosines[at + i] : 0;
    Simd::Store(lanes, Inclusion<Simd>(Simd::Load(lanes), k, l));
    for (size_t i = 0; i < Simd::kLanes && at + i < count; ++i) u[at + i] = lanes[i];
  }
}

// Four rows by 32 columns at a time.
void SignBits(const float* x, size_t count, uint32_t head_dim, const float* r, size_t columns,
              uint16_t* bits) {
  constexpr int kRows = 4, kVectors = 32 / Simd::kLanes;
  const size_t words = columns / 16;
  for (size_t c = 0; c < columns; c += 32) {
    for (size_t at = 0; at < count; at += kRows) {
      const float* rows[kRows];
      for (size_t i = 0; i < kRows; ++i) {
        rows[i] = x + (at + i < count ? at + i : count - 1) * head_dim;
      }
      F acc[kRows][kVectors];
      for (auto& row : acc) {
        for (F& a : row) a = Simd::Zero();
      }
      for (size_t j = 0; j < head_dim; ++j) {
        F column[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          column[v] = Simd::Load(r + j * columns + c + static_cast<size_t>(v * Simd::kLanes));
        }
        for (int i = 0; i < kRows; ++i) {
          const F xj = Simd::Set1(rows[i][j]);
          for (int v = 0; v < kVectors; ++v) acc[i][v] = Simd::Fma(xj, column[v], acc[i][v]);
        }
      }
      for (size_t i = 0; i < kRows && at + i < count; ++i) {
        uint32_t word = 0;
        for (int v = 0; v < kVectors; ++v) {
          word |= Simd::PositiveBits(acc[i][v]) << (v * Simd::kLanes);
        }
        bits[(at + i) * words + c / 16] = static_cast<uint16_t>(word & 0xffff);
        bits[(at + i) * words + c / 16 + 1] = static_cast<uint16_t>(word >> 16);
      }
    }
  }
}

constexpr Kernels kTable = {ProbeCsr, ProbeCompact, AttendList, AttendDense,
                            Scores,   InclusionOf,  SignBits};

}  // namespace
}  // namespace passel::host
