#include "runtime/engine/layer_reader.h"

#include <algorithm>

#include "runtime/base/error.h"

namespace passel::engine {
namespace {

// Under way at once: enough for hosts and copies to be busy, and staging memory for them.
constexpr size_t kPieces = 8, kMostBytes = size_t{64} << 20;

}  // namespace

LayerReader::LayerReader(HostLink& link, gpu::Device& device, const HostedRequest& hosted,
                         const gpu::AttentionShape& shape, int64_t rows)
    : link_(link), device_(device), hosted_(hosted), shape_(shape), rows_(rows) {
  const size_t bytes =
      static_cast<size_t>(rows * 2 * shape.kv_heads * shape.head_dim) * sizeof(bf16);
  pieces_ = std::vector<Piece>(std::clamp<size_t>(kMostBytes / bytes, 2, kPieces));
  memory_ = device.AllocateStaging(pieces_.size() * bytes);
  for (size_t i = 0; i < pieces_.size(); ++i) {
    pieces_[i].memory = static_cast<std::byte*>(memory_->data()) + i * bytes;
  }
}

void LayerReader::Begin(int32_t layer, int64_t tokens, const gpu::Tensor& k, const gpu::Tensor& v) {
  Check(done_ == tokens_, "K, V are read of one layer at a time");
  layer_ = layer;
  tokens_ = tokens;
  next_ = done_ = 0;
  k_ = k;
  v_ = v;
}

bool LayerReader::Advance() {
  for (Piece& p : pieces_) {
    if (p.box && p.box->complete()) {
      const int64_t rows = p.count * shape_.kv_heads, cols = 2 * int64_t{shape_.head_dim};
      device_.UnpackKv({p.memory, gpu::DType::kBf16, rows, cols, cols}, k_.Rows(p.first, p.count),
                       v_.Rows(p.first, p.count));
      p.taken = device_.Record();
      p.box.reset();
      done_ += p.count;
    }
    if (p.box || next_ == tokens_ || (p.taken && !p.taken->Done())) continue;
    p.taken.reset();
    p.first = next_;
    p.count = std::min(rows_, tokens_ - next_);
    next_ += p.count;
    p.box = std::make_unique<KvBox>();
    link_.ReadKv(layer_, hosted_, static_cast<uint64_t>(p.first), static_cast<uint64_t>(p.count),
                 reinterpret_cast<bf16*>(p.memory), p.box.get());
  }
  return done_ == tokens_;
}

}  // namespace passel::engine
