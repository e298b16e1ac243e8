// What a GPU model rank needs for a decode step of a Llama-3.1-8B-shaped model with random weights,
// beside what the GPU's memory allows; and its other kernels. One table; figures are defined in
// docs/performance.md. Under mpirun: the step alone, tensor-parallel, and as many sums over the
// ranks as it has, each a call of its own. Without a GPU it says so and ends.
#include <fmt/format.h>
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include "cluster/launch.h"
#include "cluster/mpi_collectives.h"
#include "gpu/cuda/bandwidth.h"
#include "gpu/device.h"
#include "runtime/base/random.h"
#include "runtime/model/transformer.h"

namespace passel {
namespace {

using Clock = std::chrono::steady_clock;
using gpu::DType;
using gpu::Tensor;

// Llama 3.1's and, for what bounds a small model, SmolLM2-135M's.
struct Shape {
  int32_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
};
const std::map<std::string, Shape> kShapes = {{"8b", {32, 4096, 32, 8, 128, 14336, 128256}},
                                              {"70b", {80, 8192, 64, 8, 128, 28672, 128256}},
                                              {"135m", {30, 576, 9, 3, 64, 1536, 49152}}};

model::ModelConfig Llama(const Shape& shape, int32_t layers) {
  model::ModelConfig c;
  c.architecture = "llama";
  c.layers = layers > 0 ? layers : shape.layers;
  c.hidden = shape.hidden;
  c.heads = shape.heads;
  c.kv_heads = shape.kv_heads;
  c.head_dim = shape.head_dim;
  c.ffn = shape.ffn;
  c.vocab = shape.vocab;
  c.rope_theta = 500000;
  c.context_length = 131072;
  return c;
}

// Weights that keep activations near 1, made as fast as they are copied.
class RandomWeights final : public model::ModelFile {
 public:
  explicit RandomWeights(model::ModelConfig config) : config_(std::move(config)) {}
  const model::ModelConfig& config() const override { return config_; }
  void Read(model::WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bf16* out) const override {
    Fill(id, row, rows, col, cols, bf16_, ToBf16, out);
  }
  void Read(model::WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            float* out) const override {
    Fill(
        id, row, rows, col, cols, floats_, [](float x) { return x; }, out);
  }
  const TokenizerData& tokenizer() const override { return tokenizer_; }
  uint64_t weight_bytes() const override { return 0; }

 private:
  // By scale: numbers that rows are cut from.
  template <typename T>
  using Numbers = std::map<float, std::vector<T>>;

  template <typename T, typename F>
  void Fill(model::WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            Numbers<T>& numbers, F convert, T* out) const {
    using model::WeightKind;
    if (id.kind == WeightKind::kAttnNorm || id.kind == WeightKind::kFfnNorm ||
        id.kind == WeightKind::kOutputNorm) {
      std::fill_n(out, rows * cols, convert(1.0f));
      return;
    }
    const float scale =
        id.kind == WeightKind::kTokenEmbedding ? 1.0f : 1.0f / std::sqrt(static_cast<float>(cols));
    const T* values = nullptr;
    {
      const std::lock_guard lock(mutex_);
      std::vector<T>& all = numbers[scale];
      if (all.empty()) {
        Random random(1);
        all.resize(kNumbers + static_cast<size_t>(config_.ffn));  // the longest row
        for (T& x : all) x = convert(static_cast<float>(random.Normal()) * scale);
      }
      values = all.data();
    }
    for (int64_t i = 0; i < rows; ++i) {
      const uint64_t name[] = {static_cast<uint64_t>(id.kind), static_cast<uint64_t>(id.layer),
                               static_cast<uint64_t>(row + i), static_cast<uint64_t>(col)};
      std::copy_n(values + HashBytes(name, sizeof name) % kNumbers, cols, out + i * cols);
    }
  }

  static constexpr size_t kNumbers = 65537;
  model::ModelConfig config_;
  TokenizerData tokenizer_;
  mutable std::mutex mutex_;  // several threads read
  mutable Numbers<bf16> bf16_;
  mutable Numbers<float> floats_;
};

// Seconds of one run of `work`, the median of `repeats`, each behind a wait for the device; and of
// one run among `repeats` issued one behind the other.
struct Times {
  double alone = 0, in_row = 0;
};
Times Measure(gpu::Device& device, int repeats, const std::function<void()>& work) {
  for (int i = 0; i < 3; ++i) work();
  device.Record()->Wait();
  std::vector<double> each;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    work();
    device.Record()->Wait();
    each.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::nth_element(each.begin(), each.begin() + repeats / 2, each.end());
  const auto start = Clock::now();
  for (int i = 0; i < repeats; ++i) work();
  device.Record()->Wait();
  return {each[static_cast<size_t>(repeats / 2)],
          std::chrono::duration<double>(Clock::now() - start).count() / repeats};
}

class Matrix {
 public:
  Matrix(gpu::Device& device, DType type, int64_t rows, int64_t cols, bool random = true)
      : memory_(device.Allocate(static_cast<size_t>(rows * cols) * SizeOf(type))),
        tensor{memory_->data(), type, rows, cols, cols} {
    if (!random) return;
    Random source(7);
    std::vector<std::byte> host(std::min<size_t>(memory_->bytes(), size_t{64} << 20));
    for (size_t i = 0; i < host.size() / SizeOf(type); ++i) {
      const auto x = static_cast<float>(source.Normal());
      const bf16 rounded = ToBf16(x);
      if (type == DType::kF32) std::memcpy(host.data() + i * 4, &x, 4);
      if (type == DType::kBf16) std::memcpy(host.data() + i * 2, &rounded, 2);
    }
    for (size_t at = 0; at < memory_->bytes(); at += host.size()) {
      device.CopyToDevice(static_cast<std::byte*>(memory_->data()) + at, host.data(),
                          std::min(host.size(), memory_->bytes() - at));
    }
    device.Record()->Wait();
  }

 private:
  std::unique_ptr<gpu::Buffer> memory_;

 public:
  Tensor tensor;
};

gpu::Partials MakePartials(std::vector<std::unique_ptr<Matrix>>& memory, gpu::Device& device,
                           int64_t rows, int64_t heads, int64_t dim) {
  for (const int64_t cols : {heads, heads, heads * dim}) {
    memory.push_back(std::make_unique<Matrix>(device, DType::kF32, rows, cols));
  }
  const size_t n = memory.size();
  return {memory[n - 3]->tensor, memory[n - 2]->tensor, memory[n - 1]->tensor};
}

void Line(const std::string& what, const Times& t, const std::string& note) {
  fmt::print("| {} | {:.4f} | {:.4f} | {} |\n", what, t.alone * 1e3, t.in_row * 1e3, note);
  std::fflush(stdout);
}

void Step(gpu::Device& device, Collectives& ranks, const model::ModelConfig& config,
          double bandwidth) {
  const RandomWeights file(config);
  const model::Transformer model(file, device, ranks, nullptr);
  const model::ModelConfig& c = model.config();
  const model::TensorSlice& slice = model.slice();
  // Of this rank.
  const double of_layer = 2.0 * c.hidden * c.head_dim * (2.0 * slice.heads + 2.0 * slice.kv_heads) +
                          2.0 * c.hidden * 3.0 * slice.ffn;
  const double bytes = c.layers * of_layer + 2.0 * c.hidden * slice.vocab;
  const auto line = [&](const std::string& what, const Times& t, const std::string& note) {
    if (ranks.rank() == 0) Line(what, t, note);
  };
  for (const int64_t n : {1, 8, 16, 32, 64}) {
    const auto a = model.MakeActivations(n, true);
    std::vector<int32_t> ids(static_cast<size_t>(n));
    std::iota(ids.begin(), ids.end(), 11);
    std::vector<int64_t> positions(static_cast<size_t>(n), 12345);
    // The first converts q where attention would be, a kernel that depends on the one before and
    // that the next depends on; what it leaves is then what all layers' attention has given.
    Times t;
    for (const bool convert : {true, false}) {
      t = Measure(device, 20, [&] {
        ++positions[0];
        model.Embed(*a, ids);
        model.SetPositions(*a, positions);
        model.Between(0, *a);
        for (int32_t l = 0; l < c.layers; ++l) {
          if (convert) device.Convert(a->q.Rows(0, n), a->attention.Rows(0, n));
          model.Between(l + 1, *a);
        }
        model.Logits(*a, 0, n);
      });
      line(fmt::format("step {} attention, {} layers, B={}",
                       convert ? "with a kernel for" : "without", c.layers, n),
           t,
           fmt::format("{:.3f} × (weight bytes of a GPU ÷ bandwidth)",
                       t.in_row * bandwidth / bytes));
    }
    if (ranks.size() == 1) continue;
    const Times sums = Measure(device, 20, [&] {
      for (int32_t i = 0; i < 2 * c.layers + 1; ++i) {
        ranks.AllReduceSum(
            {static_cast<float*>(a->hidden.data), static_cast<size_t>(n * c.hidden)});
      }
    });
    line(fmt::format("{} sums by themselves, over {} ranks, B={}", 2 * c.layers + 1, ranks.size(),
                     n),
         sums, fmt::format("{:.0f}% of the step's time", 100 * sums.in_row / t.in_row));
  }
  if (ranks.size() > 1) return;
  for (const int64_t n : {int64_t{2048}}) {
    const auto a = model.MakeActivations(n, false);
    std::vector<int32_t> ids(static_cast<size_t>(n), 5);
    std::vector<int64_t> positions(static_cast<size_t>(n));
    std::iota(positions.begin(), positions.end(), 0);
    const Times t = Measure(device, 5, [&] {
      model.Embed(*a, ids);
      model.SetPositions(*a, positions);
      for (int32_t l = 0; l < c.layers; ++l) {
        model.BeforeAttention(l, *a);
        model.AfterAttention(l, *a);
      }
    });
    line(fmt::format("prefill without attention, {} layers, chunk of {}", c.layers, n), t,
         fmt::format("{:.0f} TFLOP/s",
                     static_cast<double>(n) * c.layers * of_layer / t.in_row * 1e-12));
  }
}

void Attention(gpu::Device& device, double bandwidth) {
  const gpu::AttentionShape shape{32, 8, 128, 1 / std::sqrt(128.0f)};
  const double token_bytes = 2.0 * 2 * shape.kv_heads * shape.head_dim;
  const auto pages = static_cast<int32_t>(32 * 16384 / gpu::kKvPageTokens);
  device.CreateKvPool(shape, pages);
  {
    const int64_t rows = 16384;
    const Matrix k(device, DType::kBf16, rows, 1024), v(device, DType::kBf16, rows, 1024);
    std::vector<int64_t> slots(static_cast<size_t>(rows));
    std::iota(slots.begin(), slots.end(), 0);
    std::vector<int32_t> part(static_cast<size_t>(rows / gpu::kKvPageTokens));
    for (int32_t first = 0; first < pages; first += static_cast<int32_t>(part.size())) {
      std::iota(part.begin(), part.end(), first);
      device.StoreKv(part, slots, k.tensor, v.tensor);
    }
  }
  std::vector<int32_t> order(static_cast<size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  Random random(3);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Next() % i]);
  struct Case {
    int64_t batch, tokens;
  };
  for (const Case c : {Case{1, 16384}, Case{1, 98304}, Case{4, 98304}, Case{32, 16384}}) {
    const Matrix q(device, DType::kF32, c.batch, 4096);
    std::vector<std::unique_ptr<Matrix>> memory;
    const auto out = MakePartials(memory, device, c.batch, 32, 128);
    std::vector<gpu::KvView> views;
    for (int64_t b = 0; b < c.batch; ++b) {
      const auto each = static_cast<size_t>(c.tokens / gpu::kKvPageTokens);
      views.push_back({std::span(order).subspan(static_cast<size_t>(b) * each, each), c.tokens});
    }
    const Times t = Measure(device, 20, [&] { device.DecodeAttention(q.tensor, views, out); });
    const double rate = static_cast<double>(c.batch * c.tokens) * token_bytes / t.in_row;
    Line(fmt::format("decode attention of a layer, B={}, n={}", c.batch, c.tokens), t,
         fmt::format("{:.2f} TB/s, {:.0f}% of bandwidth", rate * 1e-12, rate / bandwidth * 100));
  }

  const int64_t batch = 64;
  const Matrix q(device, DType::kF32, batch, 4096), merged(device, DType::kBf16, batch, 4096);
  std::vector<std::unique_ptr<Matrix>> memory;
  const auto into = MakePartials(memory, device, batch, 32, 128);
  std::vector<gpu::KvView> views;
  for (size_t b = 0; b < static_cast<size_t>(batch); ++b) {
    views.push_back({std::span(order).subspan(b * 2, 2), 68});
  }
  const int64_t entries = batch * 8;
  const auto staging = device.AllocateStaging(static_cast<size_t>(entries * 4 * 66) * 4);
  auto* reply = static_cast<float*>(staging->data());
  // As host ranks' replies lie: max, den and num of a KV head, one behind the other.
  const int64_t stride = 2 * 4 + 4 * 128 / 2;
  for (int64_t i = 0; i < entries; ++i) {
    float* partial = reply + i * stride;
    for (int j = 0; j < 8; ++j) partial[j] = static_cast<float>(random.Uniform());
    auto* num = reinterpret_cast<bf16*>(partial + 8);
    for (int j = 0; j < 512; ++j) num[j] = ToBf16(static_cast<float>(random.Uniform()));
  }
  const gpu::Partials from{{reply, DType::kF32, entries, 4, stride},
                           {reply + 4, DType::kF32, entries, 4, stride},
                           {reply + 8, DType::kBf16, entries, 512, 2 * stride}};
  std::vector<int32_t> rows, heads;
  for (int64_t i = 0; i < entries; ++i) {
    rows.push_back(static_cast<int32_t>(i / 8));
    heads.push_back(static_cast<int32_t>(i % 8 * 4));
  }
  Line("window attention of a layer, B=64, 68 tokens",
       Measure(device, 100, [&] { device.DecodeAttention(q.tensor, views, into); }), "");
  Line("merge of a layer's replies from pinned memory, B=64, one partial a KV head",
       Measure(device, 100, [&] { device.MergePartials(into, from, rows, heads); }),
       fmt::format("{:.2f} MB", static_cast<double>(staging->bytes()) * 1e-6));
  Line("window attention, merge and normalisation, B=64",
       Measure(device, 100,
               [&] {
                 device.DecodeAttention(q.tensor, views, into);
                 device.MergePartials(into, from, rows, heads);
                 device.NormalizePartials(into, merged.tensor);
               }),
       "");

  device.SetProjections(RandomProjections(17, 128, 10, 150), 128, 10, 150);
  for (const int64_t n : {int64_t{1}, int64_t{8}, int64_t{16}, int64_t{32}, batch}) {
    const Matrix codes(device, DType::kU16, n, 32 * 150, false);
    Line(fmt::format("hashing of a layer's queries, 32 heads × B={}, 150 tables of 10 bits", n),
         Measure(device, 100,
                 [&] { device.HashCodes(q.tensor.Rows(0, n), Tensor{}, codes.tensor); }),
         "");
  }
  for (const int64_t n : {int64_t{1}, int64_t{8}, int64_t{16}, int64_t{32}, batch}) {
    const auto host = device.AllocateStaging(static_cast<size_t>(n * 4096) * sizeof(bf16));
    const auto host_codes = device.AllocateStaging(static_cast<size_t>(n * 32 * 150) * 2);
    const Tensor q_host{host->data(), DType::kBf16, n, 4096, 4096};
    const Tensor codes_host{host_codes->data(), DType::kU16, n, 32 * 150, 32 * 150};
    Line(fmt::format("hand-over to pinned memory, B={}: hash, queries and codes", n),
         Measure(device, 100,
                 [&] {
                   device.Convert(q.tensor.Rows(0, n), q_host);
                   device.HashCodes(q.tensor.Rows(0, n), Tensor{}, codes_host);
                 }),
         "");
  }
  for (const int64_t n : {int64_t{2048}, int64_t{32768}}) {
    const Matrix queries(device, DType::kF32, n, 4096), k(device, DType::kBf16, n, 1024),
        v(device, DType::kBf16, n, 1024), out(device, DType::kBf16, n, 4096, false);
    const Times t = Measure(device, 3, [&] {
      device.CausalAttention(shape, queries.tensor, k.tensor, v.tensor, 0, 0, out.tensor);
    });
    const double flops = 2.0 * static_cast<double>(n * n) * 4096;
    Line(fmt::format("causal attention of a layer, {} tokens", n), t,
         fmt::format("{:.0f} TFLOP/s", flops / t.in_row * 1e-12));
  }
}

int Run(int argc, char** argv) {
  cluster::Launch launch(&argc, &argv);
  CLI::App app("What a GPU model rank needs for a decode step, with random weights");
  std::string shape = "8b";
  int32_t layers = 0;
  app.add_option("--shape", shape, "Llama 3.1's or SmolLM2's")->check(CLI::IsMember(kShapes));
  app.add_option("--layers", layers, "fewer than the model has");
  CLI11_PARSE(app, argc, argv);

  const gpu::DeviceOptions options{.local_rank = launch.world_rank(),
                                   .local_ranks = launch.world_size()};
  std::string why;
  const auto device = gpu::MakeCudaDevice(options, &why);
  if (!device) {
    fmt::print("gpu_decode: {}\n", why);
    return 0;
  }
  const auto ranks =
      device->MakeCollectives(std::make_unique<cluster::MpiCollectives>(MPI_COMM_WORLD));
  const double bandwidth = gpu::CudaReadBandwidth();
  if (ranks->rank() == 0) {
    fmt::print("{}: {:.3f} TB/s read bandwidth; {} × {}\n\n", device->info().name,
               bandwidth * 1e-12, ranks->size(), ranks->name());
    fmt::print("| what | alone ms | in a row ms | |\n|---|---|---|---|\n");
  }
  if (ranks->size() == 1 && shape == "8b") Attention(*device, bandwidth);
  Step(*device, *ranks, Llama(kShapes.at(shape), layers), bandwidth);
  return 0;
}

}  // namespace
}  // namespace passel

int main(int argc, char** argv) { return passel::Run(argc, argv); }
