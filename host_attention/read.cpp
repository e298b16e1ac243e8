#include "host_attention/read.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "host_attention/batch.h"
#include "host_attention/kernels.h"
#include "runtime/base/checked_math.h"

namespace passel::host {
namespace {

// Rows [first, first + count) to [count, 2, head_dim].
void CopyRows(const RowsView& rows, uint64_t first, uint64_t count, bf16* to) {
  const size_t d = rows.head_dim;
  if (rows.type == KvType::kBf16) {
    std::memcpy(to, rows.data + first * rows.stride, count * rows.stride);  // as they are appended
    return;
  }
  float* const values = Scratch::Local().work(2 * d);
  for (uint64_t i = 0; i < count; ++i) {
    LoadRow(rows, first + i, values, values + d);
    to = std::transform(values, values + 2 * d, to, ToBf16);
  }
}

}  // namespace

Status RowsRead::Add(std::shared_ptr<const Segment> segment, const ReadSpan& span) {
  const uint64_t first = span.first_token - segment->spec().first_token;
  if (span.count == 0) return Status::kOk;
  if (span.rows == nullptr || first + span.count > segment->spec().capacity) {
    return Status::kBadArgument;
  }
  if (first + span.count > segment->present()) return Status::kMissingTokens;
  lost_rows_ |= segment->lost_rows();
  parts_.push_back({std::move(segment), first, span.count, span.rows, tokens_});
  tokens_ += span.count;
  return Status::kOk;
}

void RowsRead::Start(Pool& pool) {
  const auto arrive = [self = shared_from_this(), &pool] {
    if (self->waiting_.fetch_sub(1) != 1) return;
    pool.ForEach(
        Pool::Lane::kBackground, CeilDiv(self->tokens_, kTokensPerCopy),
        [self](size_t slice) { self->Run(slice); }, [self] { self->Finish(); });
  };
  for (const Part& part : parts_) {
    if (!part.segment->settling() || part.segment->sealing()) continue;
    waiting_.fetch_add(1);
    if (!part.segment->WhenSettled(arrive)) waiting_.fetch_sub(1);
  }
  arrive();
}

void RowsRead::Run(size_t slice) {
  uint64_t at = slice * uint64_t{kTokensPerCopy};
  const uint64_t end = std::min(at + kTokensPerCopy, tokens_);
  auto part = std::prev(std::upper_bound(parts_.begin(), parts_.end(), at,
                                         [](uint64_t x, const Part& p) { return x < p.at; }));
  for (; at < end; ++part) {
    const RowsView& rows = part->segment->rows();
    const uint64_t skipped = at - part->at, n = std::min(end - at, part->count - skipped);
    CopyRows(rows, part->first + skipped, n, part->rows + skipped * 2 * rows.head_dim);
    at += n;
  }
}

void RowsRead::Finish() {
  parts_.clear();  // a released request's memory is free before anyone hears of it
  std::exchange(done_, nullptr)(lost_rows_ ? Status::kMissingTokens : Status::kOk);
}

}  // namespace passel::host
