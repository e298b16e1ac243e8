#include "runtime/engine/kv_read_server.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace passel::engine {
namespace {

// Of reads that wait.
constexpr uint64_t kMaxWaitingBytes = uint64_t{16} << 20;
// Of replies under way to a rank: enough for any link. One may always go.
constexpr uint64_t kMostUnderWay = uint64_t{32} << 20;
// What is kept for them: the usual reply is 4 MiB, and blocks of one size never make way for
// others, which peers would keep mapped.
constexpr ReplyMemory::Limits kMemory{8, size_t{4} << 20, size_t{4} << 20};

}  // namespace

KvReadServer::KvReadServer(
    transport::Channel& channel, const cluster::WireShape& shape, std::vector<RankId> readers,
    host::HostAttention& attention,
    std::function<void(const transport::FrameHeader&, const std::string&)> dropped)
    : channel_(channel),
      shape_(shape),
      attention_(attention),
      dropped_(std::move(dropped)),
      replies_(channel, std::move(readers), kMemory) {}

uint64_t KvReadServer::Read::tokens() const {
  uint64_t tokens = 0;
  for (const cluster::ReadKvEntry& e : entries) tokens += e.count;
  return tokens;
}

bool KvReadServer::Take(const transport::FrameHeader& header, cluster::PayloadPieces payload,
                        std::string* why) {
  auto entries = cluster::ParseReadKv(shape_, header.count, payload, why);
  if (!entries) return false;
  Read read{header, std::move(*entries)};
  if (bytes_ + read.bytes() > kMaxWaitingBytes) {
    *why = "too many reads wait";
    return false;
  }
  bytes_ += read.bytes();
  queue_.push_back(std::move(read));
  Advance();
  return true;
}

const std::shared_ptr<std::atomic<uint64_t>>& KvReadServer::UnderWay(int32_t reader) {
  auto& bytes = under_way_[reader];
  if (bytes == nullptr) bytes = std::make_shared<std::atomic<uint64_t>>(0);
  return bytes;
}

void KvReadServer::Advance() {
  for (auto next = queue_.begin(); next != queue_.end();) {
    const auto read = next++;
    const uint64_t bytes = read->tokens() * 2 * shape_.head_dim * sizeof(bf16);
    const uint64_t others = *UnderWay(read->header.source);
    if (others > 0 && others + bytes > kMostUnderWay) continue;
    std::list<Read> one;
    one.splice(one.end(), queue_, read);
    bytes_ -= read->bytes();
    try {
      if (Start(*read)) continue;
    } catch (const std::exception& e) {  // no memory
      dropped_(read->header, e.what());
      continue;
    }
    bytes_ += read->bytes();
    waiting_.splice(waiting_.end(), one);
  }
}

void KvReadServer::Retry() {
  queue_.splice(queue_.end(), waiting_);
  Advance();
}

void KvReadServer::Forget(RequestId request) {
  for (std::list<Read>* reads : {&queue_, &waiting_}) {
    std::erase_if(*reads, [&](const Read& read) {
      const bool asks = std::any_of(read.entries.begin(), read.entries.end(),
                                    [&](const auto& e) { return RequestId(e.request) == request; });
      if (asks) bytes_ -= read.bytes();
      return asks;
    });
  }
}

std::shared_ptr<float> KvReadServer::TakeMemory(int32_t reader, uint64_t bytes) {
  auto memory = replies_.Take(bytes / sizeof(float));
  float* const rows = memory.get();
  *UnderWay(reader) += bytes;
  return {rows, [memory = std::move(memory), under_way = UnderWay(reader), bytes](float*) mutable {
            memory.reset();
            *under_way -= bytes;
          }};
}

bool KvReadServer::Start(const Read& read) {
  const size_t row = 2 * size_t{shape_.head_dim};
  const auto memory = TakeMemory(read.header.source, read.tokens() * row * sizeof(bf16));
  auto* rows = reinterpret_cast<bf16*>(memory.get());
  std::vector<host::ReadSpan> spans;
  spans.reserve(read.entries.size());
  for (const cluster::ReadKvEntry& e : read.entries) {
    spans.push_back(
        {RequestId(e.request), read.header.layer, e.kv_head, e.first_token, e.count, rows});
    rows += e.count * row;
  }
  ++copying_;
  host::Status status;
  try {
    status =
        attention_.Read(std::move(spans), [this, read, memory](host::Status read_status) mutable {
          Reply(read, read_status, std::move(memory));
          --copying_;
          channel_.Wake();
        });
  } catch (...) {
    --copying_;
    throw;
  }
  if (status == host::Status::kOk) return true;
  --copying_;
  if (status == host::Status::kMissingTokens) return false;
  Reply(read, status, nullptr);
  return true;
}

void KvReadServer::Reply(const Read& read, host::Status status, std::shared_ptr<float> memory) {
  try {
    std::vector<cluster::KvRowsEntry> entries;
    entries.reserve(read.entries.size());
    std::vector<const bf16*> sources;
    sources.reserve(read.entries.size());
    const auto* rows = reinterpret_cast<const bf16*>(memory.get());
    for (const cluster::ReadKvEntry& e : read.entries) {
      entries.push_back(
          {e.request, e.first_token, e.kv_head, e.count, static_cast<uint32_t>(status), 0});
      sources.push_back(rows);
      if (status == host::Status::kOk) rows += e.count * 2 * size_t{shape_.head_dim};
    }
    cluster::Pieces pieces;
    auto payload = cluster::BuildKvRows(shape_, entries, sources, &pieces, payloads_.Take());
    transport::FrameHeader h;
    h.type = transport::FrameType::kKvRows;
    h.layer = read.header.layer;
    h.micro_batch = read.header.micro_batch;
    h.step = read.header.step;
    h.part = read.header.part;
    h.count = static_cast<uint32_t>(entries.size());
    channel_.Post(RankId(read.header.source),
                  payloads_.Frame(h, std::move(payload), std::move(pieces), std::move(memory)));
  } catch (const std::exception& e) {
    dropped_(read.header, e.what());
  }
}

}  // namespace passel::engine
