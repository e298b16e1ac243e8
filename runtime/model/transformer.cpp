#include "runtime/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "runtime/base/error.h"

namespace passel::model {
namespace {

using gpu::DType;
using gpu::Tensor;

// Rows [first, first + rows) of a weight, which a fused matrix holds one after another.
struct RowSegment {
  WeightId id;
  int64_t first = 0;
  int64_t rows = 0;
};

struct Layer {
  Tensor attn_norm, ffn_norm;
  Tensor qkv_bias;  // [1, columns of qkv], empty where the architecture has none
  Tensor qk_norm;   // [1, columns of q and k], a head's weight for every head; or empty
  std::unique_ptr<gpu::Linear> qkv, o, gate_up, down;
};

}  // namespace

void Activations::Resize(int64_t rows) {
  Check(rows >= 0 && rows <= capacity, "Activations: more rows than they were made for");
  n = rows;
  for (Tensor* t :
       {&hidden, &qkv, &q, &k, &v, &attention, &normed, &projected, &gate_up, &ffn, &turns}) {
    t->rows = rows;
  }
}

struct Transformer::Impl {
  Impl(const ModelFile& model_file, gpu::Device& dev, Collectives& coll,
       const LoadProgress& progress)
      : file(model_file),
        device(dev),
        collectives(coll),
        config(model_file.config()),
        slice(SliceFor(config, coll.rank(), coll.size())),
        inv_freq(RopeInverseFrequencies(config)) {
    const int32_t most = device.info().max_head_dim;
    if (most > 0 && config.head_dim > most) {
      throw Error(ErrorClass::kModel, "head dimension: is " + std::to_string(config.head_dim) +
                                          "; expected at most " + std::to_string(most) + " on " +
                                          device.info().backend);
    }
    for (int r = 0; r < coll.size(); ++r) slices.push_back(SliceFor(config, r, coll.size()));
    Load(progress);
  }

  // Done with a weight of the file, of which this rank took so many elements. Its pages go at once:
  // the file and what is made of it need not both lie in memory.
  void Loaded(WeightId id, int64_t elements) {
    file.Release(id);
    loaded += static_cast<uint64_t>(elements) * sizeof(bf16);
  }

  Tensor NewTensor(DType type, int64_t rows, int64_t cols,
                   std::vector<std::unique_ptr<gpu::Buffer>>& memory) const {
    memory.push_back(device.Allocate(static_cast<size_t>(rows * cols) * SizeOf(type)));
    return {memory.back()->data(), type, rows, cols, cols};
  }

  // Appends columns [first, first + count) of a weight of one row.
  void ReadVector(WeightId id, int64_t first, int64_t count, std::vector<float>& to) {
    to.resize(to.size() + static_cast<size_t>(count));
    file.Read(id, 0, 1, first, count, to.data() + to.size() - static_cast<size_t>(count));
    Loaded(id, count);
  }

  Tensor Upload(const std::vector<float>& host) {
    Tensor t = NewTensor(DType::kF32, 1, static_cast<int64_t>(host.size()), weights);
    device.CopyToDevice(t.data, host.data(), host.size() * sizeof(float));
    device.Record()->Wait();  // before `host` goes
    return t;
  }

  Tensor LoadNorm(WeightId id) {
    std::vector<float> host;
    ReadVector(id, 0, config.hidden, host);
    return Upload(host);
  }

  Tensor LoadQkvBias(int32_t layer) {
    const int64_t dim = config.head_dim;
    std::vector<float> host;
    ReadVector({WeightKind::kQBias, layer}, slice.first_head * dim, slice.heads * dim, host);
    for (const WeightKind kind : {WeightKind::kKBias, WeightKind::kVBias}) {
      ReadVector({kind, layer}, slice.first_kv_head * dim, slice.kv_heads * dim, host);
    }
    return Upload(host);
  }

  // A head's weights once for every head, so that one operation does for q and k.
  Tensor LoadQkNorm(int32_t layer) {
    std::vector<float> host;
    for (const auto& [kind, heads] : {std::pair(WeightKind::kQNorm, slice.heads),
                                      std::pair(WeightKind::kKNorm, slice.kv_heads)}) {
      std::vector<float> head;
      ReadVector({kind, layer}, 0, config.head_dim, head);
      for (int32_t h = 0; h < heads; ++h) host.insert(host.end(), head.begin(), head.end());
    }
    return Upload(host);
  }

  // Rows of several weights, one after another, all columns.
  std::unique_ptr<gpu::Linear> LoadRows(const std::vector<RowSegment>& segments) {
    int64_t total = 0;
    for (const RowSegment& s : segments) total += s.rows;
    auto linear =
        device.MakeLinear(total, config.hidden, [&](int64_t begin, int64_t count, bf16* out) {
          int64_t base = 0;
          for (const RowSegment& s : segments) {
            const int64_t from = std::max(begin, base);
            const int64_t to = std::min(begin + count, base + s.rows);
            if (from < to) {
              file.Read(s.id, s.first + from - base, to - from, 0, config.hidden,
                        out + (from - begin) * config.hidden);
            }
            base += s.rows;
          }
        });
    for (const RowSegment& s : segments) Loaded(s.id, s.rows * config.hidden);
    return linear;
  }

  // Columns [first, first + cols) of a [hidden, …] weight.
  std::unique_ptr<gpu::Linear> LoadCols(WeightId id, int64_t first, int64_t cols) {
    auto linear =
        device.MakeLinear(config.hidden, cols, [&](int64_t begin, int64_t count, bf16* out) {
          file.Read(id, begin, count, first, cols, out);
        });
    Loaded(id, config.hidden * cols);
    return linear;
  }

  void Load(const LoadProgress& progress) {
    const int64_t dim = config.head_dim;
    if (progress) progress(0, 0);
    if (!config.tied_embeddings) {
      embedding = LoadRows({{{WeightKind::kTokenEmbedding}, slice.first_vocab, slice.vocab}});
    }
    output_norm = LoadNorm({WeightKind::kOutputNorm});
    output = LoadRows({{{WeightKind::kOutput}, slice.first_vocab, slice.vocab}});
    if (progress) progress(0, loaded);
    for (int32_t l = 0; l < config.layers; ++l) {
      Layer layer;
      layer.attn_norm = LoadNorm({WeightKind::kAttnNorm, l});
      layer.ffn_norm = LoadNorm({WeightKind::kFfnNorm, l});
      layer.qkv = LoadRows({
          {{WeightKind::kQ, l}, slice.first_head * dim, slice.heads * dim},
          {{WeightKind::kK, l}, slice.first_kv_head * dim, slice.kv_heads * dim},
          {{WeightKind::kV, l}, slice.first_kv_head * dim, slice.kv_heads * dim},
      });
      if (config.qkv_bias) layer.qkv_bias = LoadQkvBias(l);
      if (config.qk_norm) layer.qk_norm = LoadQkNorm(l);
      layer.o = LoadCols({WeightKind::kO, l}, slice.first_head * dim, slice.heads * dim);
      layer.gate_up = LoadRows({{{WeightKind::kGate, l}, slice.first_ffn, slice.ffn},
                                {{WeightKind::kUp, l}, slice.first_ffn, slice.ffn}});
      layer.down = LoadCols({WeightKind::kDown, l}, slice.first_ffn, slice.ffn);
      layers.push_back(std::move(layer));
      if (progress) progress(l + 1, loaded);
    }
  }

  // Sum over the ranks of an [n, cols] f32 tensor without gaps.
  void AllReduce(const Tensor& t) const {
    if (collectives.size() == 1) return;
    Check(t.stride == t.cols, "all-reduce of a tensor with gaps");
    collectives.AllReduceSum({static_cast<float*>(t.data), static_cast<size_t>(t.rows * t.cols)});
  }

  const ModelFile& file;
  gpu::Device& device;
  Collectives& collectives;
  const ModelConfig config;
  const TensorSlice slice;
  std::vector<TensorSlice> slices;  // of all ranks
  const std::vector<float> inv_freq;

  std::vector<std::unique_ptr<gpu::Buffer>> weights;
  Tensor output_norm;
  // [slice.vocab, hidden]; tied: `output` alone, which serves as both.
  std::unique_ptr<gpu::Linear> embedding, output;
  std::vector<Layer> layers;
  uint64_t loaded = 0;  // bytes of weights so far, as bf16
};

Transformer::Transformer(const ModelFile& file, gpu::Device& device, Collectives& collectives,
                         const LoadProgress& progress)
    : impl_(std::make_unique<Impl>(file, device, collectives, progress)) {}

Transformer::~Transformer() = default;

const ModelConfig& Transformer::config() const { return impl_->config; }
const TensorSlice& Transformer::slice() const { return impl_->slice; }

gpu::AttentionShape Transformer::attention_shape() const {
  const int32_t dim = impl_->config.head_dim;
  return {impl_->slice.heads, impl_->slice.kv_heads, dim,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)))};
}

std::unique_ptr<Activations> Transformer::MakeActivations(int64_t rows, bool with_logits,
                                                          int64_t logit_rows) const {
  const Impl& m = *impl_;
  Check(rows > 0 && logit_rows >= 0 && logit_rows <= rows, "MakeActivations: rows");
  const int64_t dim = m.config.head_dim;
  const int64_t q_cols = m.slice.heads * dim;
  const int64_t kv_cols = m.slice.kv_heads * dim;
  const DType type = m.device.activation_type();
  auto a = std::make_unique<Activations>();
  a->capacity = rows;
  const auto make = [&](DType t, int64_t count, int64_t cols) {
    return m.NewTensor(t, count, cols, a->memory);
  };
  a->hidden = make(DType::kF32, rows, m.config.hidden);
  a->qkv = make(DType::kF32, rows, q_cols + 2 * kv_cols);
  a->q = a->qkv.Cols(0, q_cols);
  a->k = a->qkv.Cols(q_cols, kv_cols);
  a->v = a->qkv.Cols(q_cols + kv_cols, kv_cols);
  a->attention = make(type, rows, q_cols);
  a->normed = make(type, rows, m.config.hidden);
  a->projected = make(DType::kF32, rows, m.config.hidden);
  a->gate_up = make(DType::kF32, rows, 2 * m.slice.ffn);
  a->ffn = make(type, rows, m.slice.ffn);
  a->turns = make(DType::kF32, rows, dim);
  if (with_logits) {
    a->logit_capacity = logit_rows > 0 ? logit_rows : rows;
    a->logits = make(DType::kF32, a->logit_capacity, m.config.vocab);
    if (m.collectives.size() > 1) {
      a->own_logits = make(DType::kF32, a->logit_capacity, m.slice.vocab);
      a->gathered_logits = make(DType::kF32, a->logit_capacity, m.config.vocab);
    }
  }
  a->Resize(0);
  return a;
}

void Transformer::Embed(Activations& a, std::span<const int32_t> ids) const {
  const Impl& m = *impl_;
  a.Resize(static_cast<int64_t>(ids.size()));
  std::vector<int32_t> own(ids.size());  // −1 where another rank holds the row
  for (size_t i = 0; i < ids.size(); ++i) {
    Check(ids[i] >= 0 && ids[i] < m.config.vocab, "Embed: token id beyond the vocabulary");
    const int32_t id = ids[i] - m.slice.first_vocab;
    own[i] = id >= 0 && id < m.slice.vocab ? id : -1;
  }
  m.device.Embed(m.embedding ? *m.embedding : *m.output, own, a.hidden);
  m.AllReduce(a.hidden);
}

void Transformer::SetPositions(Activations& a, std::span<const int64_t> positions) const {
  a.Resize(a.n);
  impl_->device.RopeTable(impl_->inv_freq, positions, a.turns);
}

void Transformer::BeforeAttention(int32_t layer, Activations& a) const {
  const Impl& m = *impl_;
  a.Resize(a.n);
  Check(layer >= 0 && layer < m.config.layers, "BeforeAttention: layer");
  const Layer& w = m.layers[static_cast<size_t>(layer)];
  m.device.NormMatMul(a.hidden, w.attn_norm, m.config.norm_eps, *w.qkv, a.qkv, a.normed);
  if (w.qkv_bias.data != nullptr) m.device.Add(a.qkv, w.qkv_bias);
  const Tensor qk = a.qkv.Cols(0, a.q.cols + a.k.cols);
  if (w.qk_norm.data != nullptr) {
    m.device.HeadRmsNorm(qk, m.config.head_dim, w.qk_norm, m.config.norm_eps);
  }
  m.device.Rope(qk, m.config.head_dim, a.turns);
}

void Transformer::AfterAttention(int32_t layer, Activations& a) const {
  const Impl& m = *impl_;
  a.Resize(a.n);
  Check(layer >= 0 && layer < m.config.layers, "AfterAttention: layer");
  const Layer& w = m.layers[static_cast<size_t>(layer)];
  m.device.MatMulSumAdd(*w.o, a.attention, a.hidden, a.projected, m.collectives);
  m.device.NormMatMulSilu(a.hidden, w.ffn_norm, m.config.norm_eps, *w.gate_up, a.ffn, a.normed,
                          a.gate_up);
  m.device.MatMulSumAdd(*w.down, a.ffn, a.hidden, a.projected, m.collectives);
}

void Transformer::Between(int32_t layer, Activations& a) const {
  const Impl& m = *impl_;
  a.Resize(a.n);
  Check(layer >= 0 && layer <= m.config.layers, "Between: layer");
  const auto issue = [&] {
    if (layer > 0) AfterAttention(layer - 1, a);
    if (layer < m.config.layers) BeforeAttention(layer, a);
  };
  // More rows keep a device busy for longer than issuing takes, and there are as many recordings as
  // numbers of rows.
  constexpr int64_t kMostRecordedRows = 32;
  if (a.n > kMostRecordedRows) return issue();
  m.device.Replay(a.recordings[{layer, a.n}], m.collectives, issue);
}

void Transformer::Logits(Activations& a, int64_t first, int64_t count) const {
  const Impl& m = *impl_;
  a.Resize(a.n);
  Check(count >= 0 && count <= a.logit_capacity, "Logits: more rows than they were made for");
  a.logits.rows = count;
  a.own_logits.rows = count;
  m.device.NormMatMul(a.hidden.Rows(first, count), m.output_norm, m.config.norm_eps, *m.output,
                      m.collectives.size() == 1 ? a.logits : a.own_logits,
                      a.normed.Rows(first, count));
  if (m.collectives.size() == 1) return;
  std::vector<size_t> counts;
  for (const TensorSlice& s : m.slices) counts.push_back(static_cast<size_t>(count * s.vocab));
  auto* gathered = static_cast<float*>(a.gathered_logits.data);
  m.collectives.AllGather({static_cast<const float*>(a.own_logits.data),
                           counts[static_cast<size_t>(m.collectives.rank())]},
                          counts, {gathered, static_cast<size_t>(count * m.config.vocab)});
  for (const TensorSlice& s : m.slices) {
    m.device.Convert({gathered, DType::kF32, count, s.vocab, s.vocab},
                     a.logits.Cols(s.first_vocab, s.vocab));
    gathered += count * s.vocab;
  }
}

}  // namespace passel::model
