#include "host_attention/batch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "host_attention/prefetch.h"
#include "runtime/base/checked_math.h"
#include "runtime/base/random.h"

namespace passel::host {
namespace {

uint64_t Nanoseconds() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

// Tokens of one unit of exact attention: a long segment's units are long, as each begins with rows
// that nobody prefetched; a short one's are many enough for all threads.
uint32_t ExactTile(uint32_t tokens) { return tokens > 16384 ? 4096 : 1024; }

}  // namespace

Scratch::Scratch()
    : counters_(kMaxBlockTokens + 65),
      staging_(kStagingIds),
      ids_(kMaxBlockTokens + 1 + kProbeSlack),
      scores_(kMaxBlockTokens + 1) {}

float* Scratch::work(size_t floats) {
  if (work_.size() < floats) work_.resize(floats);
  return work_.data();
}

float* Scratch::query(size_t floats) {
  if (query_.size() < floats) query_.resize(floats);
  return query_.data();
}

uint16_t* Scratch::codes(size_t count) {
  if (codes_.size() < count) codes_.resize(count);
  return codes_.data();
}

Scratch& Scratch::Local() {
  static thread_local Scratch scratch;
  return scratch;
}

Batch::Batch(const Options& options, const Kernels& kernels, AttendBatch batch,
             std::vector<Item> items, std::shared_ptr<std::vector<float>> results)
    : options_(options),
      kernels_(kernels),
      batch_(std::move(batch)),
      items_(std::move(items)),
      results_(std::move(results)),
      merged_(items_.size()) {
  size_t floats = 0;
  const auto add = [&](uint32_t item, uint32_t view, uint32_t head, uint32_t first, uint32_t last) {
    units_.push_back({item, view, head, first, last, floats});
    // Whole cache lines, so that threads do not share one.
    floats += RoundUp(FloatsOf(HeadsOf(units_.back())), 16);
  };
  units_.reserve(items_.size() * options_.group);
  for (uint32_t i = 0; i < items_.size(); ++i) {
    merged_[i].first = units_.size();
    const bool by_head =
        options_.estimator == Estimator::kTopK || options_.estimator == Estimator::kOracleSample;
    for (uint32_t v = 0; v < items_[i].views.size(); ++v) {
      const SegmentView& view = items_[i].views[v];
      const bool whole = by_head && !batch_.items[i].exact;
      const uint32_t exact_from = whole ? view.limit : view.sampled;
      if (exact_from > 0) {
        for (uint32_t h = 0; h < options_.group; ++h) add(i, v, h, 0, exact_from);
      }
      const uint32_t tile = ExactTile(view.limit);
      for (uint32_t at = exact_from; at < view.limit; at += tile) {
        add(i, v, kAllHeads, at, std::min(at + tile, view.limit));
      }
    }
    merged_[i].last = units_.size();
    merged_[i].left = units_.size() - merged_[i].first;
  }
  if (results_->size() < floats) results_->resize(floats);
  sampled_.resize(units_.size());
  if (batch_.collect_ids) ids_.resize(units_.size());
  MakePartials();
}

// Their memory is taken here, so that threads write to it and ask for none.
void Batch::MakePartials() {
  const size_t group = options_.group;
  const auto add = [&](uint32_t item, int32_t segment) {
    PartialItem& p = partials_.emplace_back();
    p.item = item;
    p.segment = segment;
    p.sampled.assign(group, 0);
    if (batch_.collect_ids) p.ids.resize(group);
  };
  partials_.reserve(items_.size());
  for (uint32_t i = 0; i < items_.size(); ++i) {
    merged_[i].partial = partials_.size();
    if (!options_.deterministic) add(i, -1);
    for (const SegmentView& view : items_[i].views) {
      if (options_.deterministic) add(i, static_cast<int32_t>(view.segment->number()));
    }
  }
  const size_t num = group * options_.head_dim;
  const size_t floats = 2 * group + (batch_.bf16_num ? (num + 1) / 2 : num);
  const size_t stride = RoundUp(floats, 16);
  const size_t all = stride * partials_.size();
  const std::shared_ptr<float> memory =
      batch_.memory ? batch_.memory(all)
                    : std::shared_ptr<float>(new float[all], std::default_delete<float[]>());
  for (size_t i = 0; i < partials_.size(); ++i) {
    partials_[i].values = std::span(memory.get() + i * stride, floats);
    partials_[i].memory = memory;
  }
  for (uint32_t i = 0; i < items_.size(); ++i) {
    if (merged_[i].first == merged_[i].last) MergeItem(i);  // nothing of it is here
  }
}

Batch::Partials Batch::PartialsOf(const Unit& unit) {
  float* at = results_->data() + unit.out;
  return {at, at + HeadsOf(unit), at + 2 * HeadsOf(unit)};
}

const float* Batch::QueryOf(const Unit& unit) const {
  const QueryItem& item = batch_.items[unit.item];
  const size_t first = unit.head == kAllHeads ? 0 : size_t{unit.head} * options_.head_dim;
  if (item.q != nullptr) return item.q + first;
  const size_t floats = HeadsOf(unit) * options_.head_dim;
  float* q = Scratch::Local().query(floats);
  std::transform(item.q_bf16 + first, item.q_bf16 + first + floats, q, ToFloat);
  return q;
}

const uint16_t* Batch::CodesOf(const Unit& unit) const {
  const uint16_t* from = batch_.items[unit.item].codes + size_t{unit.head} * options_.l;
  uint16_t* codes = Scratch::Local().codes(options_.l);
  std::copy_n(from, options_.l, codes);
  const uint32_t all =
      std::accumulate(codes, codes + options_.l, 0u, [](uint32_t a, uint32_t b) { return a | b; });
  return all >> options_.k == 0 ? codes : nullptr;
}

void Batch::Drop() {
  for (const Item& item : items_) {
    for (const SegmentView& view : item.views) {
      PrefetchToWrite(view.segment.get());
      PrefetchToWrite(view.mean.get());
      for (const auto& block : view.blocks) PrefetchToWrite(block.get());
    }
  }
  items_.clear();
  results_.reset();
}

void Batch::Prefetch(size_t index) const {
  if (index >= units_.size()) return;
  const Unit& unit = units_[index];
  const QueryItem& item = batch_.items[unit.item];
  const size_t head = unit.head == kAllHeads ? 0 : unit.head, d = options_.head_dim;
  if (item.q_bf16 != nullptr) PrefetchToRead(item.q_bf16 + head * d, HeadsOf(unit) * d);
  if (unit.head != kAllHeads && item.codes != nullptr) {
    PrefetchToRead(item.codes + head * options_.l, options_.l);
  }
}

void Batch::Run(size_t index) {
  const Unit& unit = units_[index];
  Partials out = PartialsOf(unit);
  std::fill_n(out.max, HeadsOf(unit), kEmptyMax);
  std::fill_n(out.den, HeadsOf(unit) * (1 + size_t{options_.head_dim}), 0.0f);
  RunUnit(index, out);
  // Whoever runs an item's last unit merges it, so that items merge in parallel.
  if (merged_[unit.item].left.fetch_sub(1) == 1) MergeItem(unit.item);
}

void Batch::RunUnit(size_t index, const Partials& out) {
  const Unit& unit = units_[index];
  const QueryItem& item = batch_.items[unit.item];
  const SegmentView& view = items_[unit.item].views[unit.view];
  if (view.segment->damaged()) {
    sampled_[index] = kRefused;
    return;
  }
  if (unit.head == kAllHeads) {
    RunExact(index, view, QueryOf(unit), out);
    return;
  }
  switch (options_.estimator) {
    case Estimator::kLsh:
      RunLsh(index, view, out);
      break;
    case Estimator::kTopK:
      RunTopK(index, view, QueryOf(unit), out);
      break;
    case Estimator::kOracleSample:
      RunOracle(index, view, item, out);
      break;
    case Estimator::kFull:
      break;  // has no such units
  }
}

void Batch::RunExact(size_t index, const SegmentView& view, const float* q, const Partials& out) {
  const Unit& unit = units_[index];
  const uint64_t start = batch_.times != nullptr ? Nanoseconds() : 0;
  const uint32_t group = options_.group;
  float* work = Scratch::Local().work(WorkFloats(group, options_.head_dim));
  kernels_.attend_dense(view.rows, unit.first, unit.last - unit.first, q, group, work, out.max,
                        out.den, out.num);
  sampled_[index] = unit.last - unit.first;
  if (batch_.times != nullptr) batch_.times->attend_ns += Nanoseconds() - start;
}

void Batch::RunLsh(size_t index, const SegmentView& view, const Partials& out) {
  const Unit& unit = units_[index];
  Scratch& scratch = Scratch::Local();
  const uint64_t start = batch_.times != nullptr ? Nanoseconds() : 0;
  const uint16_t* codes = CodesOf(unit);
  if (codes == nullptr) {
    sampled_[index] = kRefused;
    return;
  }
  size_t count = 0;
  for (const auto& block : view.blocks) {
    count += block->Probe(kernels_, codes, view.sampled, scratch.probe(), scratch.ids() + count);
  }
  const uint64_t probed = batch_.times != nullptr ? Nanoseconds() : 0;
  kernels_.attend_list(view.rows, scratch.ids(), count, QueryOf(unit),
                       {view.mean->data(), options_.k, options_.l},
                       scratch.work(WorkFloats(1, options_.head_dim)), {out.max, out.den, out.num});
  sampled_[index] = count;
  if (batch_.collect_ids) ids_[index].assign(scratch.ids(), scratch.ids() + count);
  if (batch_.times != nullptr) {
    batch_.times->probe_ns += probed - start;
    batch_.times->attend_ns += Nanoseconds() - probed;
  }
}

void Batch::RunTopK(size_t index, const SegmentView& view, const float* q, const Partials& out) {
  Scratch& scratch = Scratch::Local();
  float* work = scratch.work(WorkFloats(1, options_.head_dim));
  const uint32_t n = units_[index].last;
  const float* scores = scratch.scores();
  kernels_.scores(view.rows, 0, n, q, work, scratch.scores());
  uint32_t* ids = scratch.ids();
  std::iota(ids, ids + n, 0u);
  const auto wanted = std::clamp<uint64_t>(
      static_cast<uint64_t>(std::ceil(options_.budget * static_cast<double>(n))), 1, n);
  std::nth_element(ids, ids + (wanted - 1), ids + n, [scores](uint32_t a, uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::sort(ids, ids + wanted);
  kernels_.attend_list(view.rows, ids, wanted, q, {}, work, {out.max, out.den, out.num});
  sampled_[index] = wanted;
  if (batch_.collect_ids) ids_[index].assign(ids, ids + wanted);
}

// Draws with replacement from the segment's true softmax: den is exact, num = den · mean of the
// drawn values, unbiased.
void Batch::RunOracle(size_t index, const SegmentView& view, const QueryItem& item,
                      const Partials& out) {
  const Unit& unit = units_[index];
  Scratch& scratch = Scratch::Local();
  const uint32_t n = unit.last, d = options_.head_dim;
  const float* q = QueryOf(unit);
  float* work = scratch.work(std::max(WorkFloats(1, d), 2 * size_t{d}));
  float* scores = scratch.scores();
  kernels_.scores(view.rows, 0, n, q, work, scores);
  const float max = *std::max_element(scores, scores + n);
  double total = 0;
  std::vector<double> cumulative(n);
  for (uint32_t i = 0; i < n; ++i) {
    total += std::exp(static_cast<double>(scores[i]) - max);
    cumulative[i] = total;
  }
  const uint64_t name[] = {options_.seed, item.request.value,     batch_.layer, item.kv_head,
                           unit.head,     view.segment->number(), view.limit};
  Random random(HashBytes(name, sizeof(name)));
  const auto draws = std::max<uint64_t>(
      1, static_cast<uint64_t>(std::ceil(options_.budget * static_cast<double>(n))));
  std::vector<uint32_t> ids;
  for (uint64_t i = 0; i < draws; ++i) {
    const auto at =
        std::upper_bound(cumulative.begin(), cumulative.end(), random.Uniform() * total);
    ids.push_back(static_cast<uint32_t>(std::min<ptrdiff_t>(at - cumulative.begin(), n - 1)));
  }
  std::sort(ids.begin(), ids.end());
  *out.max = max;
  *out.den = static_cast<float>(total);
  const float weight = static_cast<float>(total / static_cast<double>(draws));
  for (const uint32_t id : ids) {
    LoadRow(view.rows, id, work, work + d);
    for (uint32_t j = 0; j < d; ++j) out.num[j] += weight * work[d + j];
  }
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  sampled_[index] = ids.size();
  if (batch_.collect_ids) ids_[index] = std::move(ids);
}

// Adds a unit's tokens to those that contributed.
void Batch::Count(size_t index, PartialItem& into) {
  const Unit& unit = units_[index];
  if (sampled_[index] == kRefused) {
    into.status = Status::kBadArgument;
    return;
  }
  const size_t first = unit.head == kAllHeads ? 0 : unit.head;
  const uint64_t offset = items_[unit.item].views[unit.view].segment->spec().first_token;
  for (size_t at = first; at < first + HeadsOf(unit); ++at) {
    into.sampled[at] += sampled_[index];
    if (!batch_.collect_ids) continue;
    for (const uint32_t id : ids_[index]) into.ids[at].push_back(offset + id);
    if (unit.head != kAllHeads) continue;
    for (uint32_t id = unit.first; id < unit.last; ++id) into.ids[at].push_back(offset + id);
  }
}

void Batch::MergeUnits(size_t first, size_t last, PartialItem& into) {
  const size_t d = options_.head_dim, group = options_.group;
  for (size_t i = first; i < last; ++i) Count(i, into);
  // The group's values in float32: what the only unit found, or the sum of all.
  float* sum = batch_.bf16_num ? Scratch::Local().work(FloatsOf(group)) : into.values.data();
  if (last - first == 1 && units_[first].head == kAllHeads) {
    float* only = PartialsOf(units_[first]).max;
    if (batch_.bf16_num) {
      sum = only;
    } else {
      std::copy_n(only, FloatsOf(group), sum);
    }
  } else {
    std::fill_n(sum, group, kEmptyMax);
    std::fill_n(sum + group, FloatsOf(group) - group, 0.0f);
    for (size_t i = first; i < last; ++i) {
      const Partials from = PartialsOf(units_[i]);
      const size_t head = units_[i].head == kAllHeads ? 0 : units_[i].head;
      for (size_t h = 0; h < HeadsOf(units_[i]); ++h) {
        const size_t at = head + h;
        MergePartial({&sum[at], &sum[group + at], &sum[2 * group + at * d]}, from.max[h],
                     from.den[h], from.num + h * d, d);
      }
    }
  }
  if (!batch_.bf16_num) return;
  std::copy_n(sum, 2 * group, into.values.data());
  auto* num = reinterpret_cast<bf16*>(into.values.data() + 2 * group);
  std::transform(sum + 2 * group, sum + FloatsOf(group), num, ToBf16);
}

void Batch::MergeItem(uint32_t item) {
  const Result& result = merged_[item];
  if (!options_.deterministic) {
    return MergeUnits(result.first, result.last, partials_[result.partial]);
  }
  size_t at = result.first;
  for (uint32_t v = 0; v < items_[item].views.size(); ++v) {
    const size_t first = at;
    while (at < result.last && units_[at].view == v) ++at;
    MergeUnits(first, at, partials_[result.partial + v]);
  }
}

}  // namespace passel::host
