#include "host_attention/segment.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::host {
namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;
// Tables built by one background slice: about a millisecond at the default block size.
constexpr uint32_t kTablesPerSlice = 8;
bool OutOfRange(const uint16_t* codes, size_t count, uint32_t k) {
  uint32_t all = 0;
  for (size_t i = 0; i < count; ++i) all |= codes[i];
  return all >> k != 0;
}

uint16_t* SortScratch() {
  static thread_local std::unique_ptr<uint16_t[]> scratch =
      std::make_unique<uint16_t[]>(kMaxBlockTokens + 1);
  return scratch.get();
}

}  // namespace

Slab::Slab(std::byte* data, uint64_t bytes, std::function<void()> on_free)
    : data_(data), bytes_(bytes), on_free_(std::move(on_free)) {}

Slab::Slab(Slab&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(other.bytes_),
      on_free_(std::move(other.on_free_)) {}

Slab::~Slab() {
  if (data_ == nullptr) return;
  munmap(data_, bytes_);
  on_free_();
}

SlabMap::SlabMap(uint64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    throw Error(ErrorClass::kMemory, "the system refused " + std::to_string(bytes_) +
                                         " bytes of KV cache: " + std::strerror(errno));
  }
  if (bytes_ >= 4 * kHugePage) madvise(p, bytes_, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(p);
}

SlabMap::~SlabMap() {
  if (taken_ < bytes_) munmap(data_ + taken_, bytes_ - taken_);
}

Slab SlabMap::Take(uint64_t bytes, std::function<void()> on_free) {
  Check(bytes > 0 && bytes <= bytes_ - taken_, "a mapping holds what was planned for it");
  taken_ += bytes;
  return Slab(data_ + (taken_ - bytes), bytes, std::move(on_free));
}

Segment::Segment(const Options& options, const SegmentSpec& spec, uint32_t number, Slab slab,
                 std::shared_ptr<Usage> usage, Pool& pool)
    : options_(options),
      spec_(spec),
      number_(number),
      slab_(std::move(slab)),
      usage_(std::move(usage)),
      pool_(pool) {
  row_data_ = slab_.data();
  rows_ = {row_data_, RowStride(options.kv_type, options.head_dim), options.head_dim,
           options.kv_type};
  if (options.estimator == Estimator::kLsh && spec.prompt) {
    const auto tokens = static_cast<uint32_t>(spec.capacity);
    std::byte* tables = row_data_ + RoundUp(spec.capacity * rows_.stride + 64, 64);
    std::byte* bounds = tables + RoundUp(IdBytes(tokens, options.l), 64);
    prompt_ = std::make_shared<TableBlock>(
        0, tokens, options.k, options.l, reinterpret_cast<uint16_t*>(tables),
        UsesCsr(tokens, options.k) ? reinterpret_cast<uint16_t*>(bounds) : nullptr);
  }
}

Segment::~Segment() {
  usage_->AddKv(-static_cast<int64_t>(present_ * rows_.stride));
  if (prompt_ != nullptr && codes_ == Codes::kPresent) {
    usage_->AddTables(-static_cast<int64_t>(TableBytes(prompt_->tokens(), options_.k, options_.l)));
  }
}

Status Segment::Append(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes,
                       std::shared_ptr<const void> memory) {
  const size_t l = options_.l;
  const bool hashed = options_.estimator == Estimator::kLsh && codes != nullptr;
  if (first > present_) return Status::kMissingTokens;
  if (first + count > spec_.capacity) return Status::kBadArgument;
  if (first + count <= present_) return Status::kOk;
  if (codes_ != Codes::kUnknown && (codes_ == Codes::kPresent) != hashed) {
    return Status::kBadArgument;
  }
  const uint64_t at = present_;
  const auto fresh = static_cast<uint32_t>(first + count - at);
  rows += (count - fresh) * size_t{2} * options_.head_dim;
  // Codes of a generated segment go to blocks that this thread makes.
  const bool by_pool =
      memory != nullptr && fresh > kTokensPerCopy && (prompt_ != nullptr || !hashed);
  std::vector<uint16_t> own;
  if (hashed) {
    codes += (count - fresh) * l;
    if (!by_pool) {
      if (memory != nullptr) {
        own.assign(codes, codes + fresh * l);
        codes = own.data();
      }
      if (OutOfRange(codes, fresh * l, options_.k)) return Status::kBadArgument;
    }
  }
  if (codes_ == Codes::kUnknown && hashed && prompt_ != nullptr) {
    usage_->AddTables(static_cast<int64_t>(TableBytes(prompt_->tokens(), options_.k, options_.l)));
  }
  codes_ = hashed ? Codes::kPresent : Codes::kAbsent;
  usage_->AddKv(static_cast<int64_t>(fresh * rows_.stride));
  present_ = first + count;
  const bool seals = hashed && prompt_ != nullptr && present_ == spec_.capacity && prompt_->csr();
  if (by_pool || seals) BeginWork();
  if (seals) {
    const std::lock_guard lock(mutex_);
    seal_due_ = true;
  }
  if (by_pool) {
    try {
      StartCopy(at, fresh, rows, hashed ? codes : nullptr, std::move(memory));
    } catch (...) {  // no memory: these tokens never come
      damaged_ = true;
      lost_rows_ = true;
      EndWork(shared_from_this());
      throw;
    }
    return Status::kOk;
  }
  StoreRows(at, fresh, rows);
  if (hashed) AddCodes(at, fresh, codes);
  if (seals) EndWork(shared_from_this());
  return Status::kOk;
}

void Segment::StoreRows(uint64_t first, uint32_t count, const bf16* rows) {
  for (size_t i = 0; i < count; ++i) {
    StoreRow(options_.kv_type, options_.head_dim, rows + i * 2 * options_.head_dim,
             row_data_ + (first + i) * rows_.stride);
  }
}

void Segment::StartCopy(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes,
                        std::shared_ptr<const void> memory) {
  pool_.ForEach(
      Pool::Lane::kBackground, CeilDiv(count, kTokensPerCopy),
      [=, this](size_t slice) {
        const auto begin = static_cast<uint32_t>(slice * kTokensPerCopy);
        Copy(first + begin, std::min(kTokensPerCopy, count - begin),
             rows + size_t{begin} * 2 * options_.head_dim,
             codes == nullptr ? nullptr : codes + size_t{begin} * options_.l);
      },
      [self = shared_from_this(), memory = std::move(memory)]() mutable {
        memory.reset();
        EndWork(std::move(self));
      });
}

void Segment::Copy(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes) {
  StoreRows(first, count, rows);
  if (codes == nullptr) return;
  // What was judged is what is used.
  static thread_local std::vector<uint16_t> own;
  own.assign(codes, codes + size_t{count} * options_.l);
  if (OutOfRange(own.data(), own.size(), options_.k)) {
    damaged_ = true;
    std::fill(own.begin(), own.end(), uint16_t{0});
  }
  prompt_->PutCodes(static_cast<uint32_t>(first), count, own.data());
}

void Segment::BeginWork() {
  const std::lock_guard lock(mutex_);
  ++work_;
  settling_ = true;
}

void Segment::EndWork(std::shared_ptr<Segment> self) {
  std::vector<std::function<void()>> waiting;
  bool seals = false;
  {
    const std::lock_guard lock(self->mutex_);
    if (self->work_ == 1 && self->seal_due_) {
      seals = true;  // in this work's place
      self->seal_due_ = false;
      self->sealing_ = true;
    } else if (--self->work_ == 0) {
      self->sealing_ = false;
      self->settling_ = false;
      waiting.swap(self->waiting_);
    }
  }
  if (seals) self->StartSeal();
  self.reset();
  for (const auto& then : waiting) then();
}

void Segment::AddCodes(uint64_t index, uint32_t count, const uint16_t* codes) {
  if (prompt_ != nullptr) {
    prompt_->PutCodes(static_cast<uint32_t>(index), count, codes);
    return;
  }
  bool filled = false;
  for (uint32_t done = 0; done < count;) {
    const uint64_t first = index + done;
    const auto at = static_cast<uint32_t>(first % kOpenTokens);
    const uint32_t run = std::min(count - done, kOpenTokens - at);
    if (at == 0) {
      open_ = std::make_shared<TableBlock>(static_cast<uint32_t>(first), kOpenTokens, options_.k,
                                           options_.l, false, usage_);
    }
    open_->PutCodes(at, run, codes + size_t{done} * options_.l);
    done += run;
    if (at + run < kOpenTokens) continue;
    const std::lock_guard lock(mutex_);
    blocks_.push_back(std::move(open_));
    open_ = nullptr;
    filled = true;
  }
  if (filled) StartMerge();
}

void Segment::StartSeal() {
  pool_.ForEach(
      Pool::Lane::kBackground, CeilDiv(options_.l, kTablesPerSlice),
      [this](size_t slice) {
        const auto t0 = static_cast<uint32_t>(slice * kTablesPerSlice);
        for (uint32_t t = t0; t < std::min(t0 + kTablesPerSlice, options_.l); ++t) {
          prompt_->SealTable(t, SortScratch());
        }
      },
      [self = shared_from_this()]() mutable { EndWork(std::move(self)); });
}

bool Segment::WhenSettled(std::function<void()> then) const {
  const std::lock_guard lock(mutex_);
  if (!settling_) return false;
  waiting_.push_back(std::move(then));
  return true;
}

Segment::Blocks Segment::DueMerge() const {
  uint64_t total = 0;
  for (const auto& block : blocks_) total += block->tokens();
  // The final sizes are the binary digits of the number of runs, largest first.
  auto next = blocks_.begin();
  for (uint64_t size = uint64_t{kOpenTokens} << 8; size >= kOpenTokens; size /= 2) {
    if ((total & size) == 0) continue;
    const auto begin = next;
    for (uint64_t covered = 0; covered < size; ++next) covered += (*next)->tokens();
    if (next - begin > 1) return Blocks(begin, next);
  }
  return {};
}

void Segment::StartMerge() {
  Blocks parts;
  {
    const std::lock_guard lock(mutex_);
    if (merging_) return;
    parts = DueMerge();
    if (parts.empty()) return;
    merging_ = true;
  }
  uint32_t tokens = 0;
  for (const auto& part : parts) tokens += part->tokens();
  auto merged = std::make_shared<TableBlock>(parts[0]->first(), tokens, options_.k, options_.l,
                                             UsesCsr(tokens, options_.k), usage_);
  const auto self = shared_from_this();
  pool_.ForEach(
      Pool::Lane::kBackground, CeilDiv(options_.l, kTablesPerSlice),
      [self, merged, parts](size_t slice) {
        const auto t0 = static_cast<uint32_t>(slice * kTablesPerSlice);
        for (uint32_t t = t0; t < std::min(t0 + kTablesPerSlice, self->options_.l); ++t) {
          merged->MergeTable(t, parts, SortScratch());
        }
      },
      [self, merged, parts] {
        {
          const std::lock_guard lock(self->mutex_);
          const auto begin = std::find(self->blocks_.begin(), self->blocks_.end(), parts.front());
          *begin = merged;
          self->blocks_.erase(begin + 1,
                              begin + static_cast<Blocks::difference_type>(parts.size()));
          self->merging_ = false;
        }
        self->StartMerge();
      });
}

bool Segment::View(uint64_t tokens, bool sampling, SegmentView* view) const {
  view->segment = shared_from_this();
  view->rows = rows_;
  view->limit = static_cast<uint32_t>(tokens);
  if (!sampling || tokens == 0) return true;
  if (codes_ != Codes::kPresent) return false;
  if (prompt_ != nullptr) {
    if (tokens == spec_.capacity) {
      view->sampled = view->limit;
      view->blocks.push_back(prompt_);
    }
    return true;
  }
  view->sampled = view->limit / kOpenTokens * kOpenTokens;
  if (view->sampled == 0) return true;
  const std::lock_guard lock(mutex_);
  view->blocks = blocks_;
  return true;
}

}  // namespace passel::host
