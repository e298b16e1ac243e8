#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "host_attention/host_attention.h"
#include "runtime/base/bf16.h"

namespace passel::bench {

// Llama-3.1-8B's attention layer.
inline constexpr uint32_t kKvHeads = 8, kGroup = 4, kHeads = kKvHeads * kGroup, kHeadDim = 128;

struct Shape {
  uint64_t n = 0;      // tokens of each request
  uint32_t batch = 1;  // requests
  uint32_t k = 10, l = 150;
  // q, k, v ~ N(0, 1); where clustered, 0.75% of the keys stand at cosine 0.3 … 0.8 to one of the
  // group's queries.
  bool clustered = true;
  bool operator==(const Shape&) const = default;
};

// Zeroed memory in huge pages where allowed, as host attention's own is.
class Buffer {
 public:
  explicit Buffer(size_t bytes = 0);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// The keys, values, queries and codes of a shape. A stream is one KV head of one request.
class Layer {
 public:
  explicit Layer(const Shape& shape);

  const Shape& shape() const { return shape_; }
  uint32_t streams() const { return shape_.batch * kKvHeads; }
  // [n, 2, kHeadDim]; aligned to a page.
  const bf16* rows(uint32_t stream) const {
    return reinterpret_cast<const bf16*>(rows_[stream].data());
  }
  const uint16_t* codes(uint32_t stream) const { return codes_[stream].data(); }  // [n, l]
  const float* q(uint32_t stream) const;               // [kGroup, kHeadDim], exact in bf16
  const uint16_t* query_codes(uint32_t stream) const;  // [kGroup, l]
  const std::vector<float>& mean(uint32_t stream) const { return means_[stream]; }

 private:
  void Generate(uint32_t stream);

  const Shape shape_;
  std::vector<Buffer> rows_;
  std::vector<std::vector<uint16_t>> codes_;
  std::vector<float> q_;
  std::vector<uint16_t> query_codes_;
  std::vector<std::vector<float>> means_;
};

// Whether so many threads are all that the machine runs at once: one of them is then the caller,
// who takes a share of the work, as a host rank's own thread does.
bool CallerHelps(uint32_t threads);
// A host rank that holds all of a layer; request r is RequestId(r + 1), everything is layer 0.
std::unique_ptr<host::HostAttention> MakeHost(const Layer& layer, host::KvType type,
                                              uint32_t threads);
// Queries of every stream. `exact`: attended as FULL.
host::AttendBatch MakeBatch(const Layer& layer, bool exact);
// Waits for the answer, or helps with it; ms: from the call until the partials are delivered.
std::vector<host::PartialItem> Attend(host::HostAttention& host, const host::AttendBatch& batch,
                                      bool help = false, double* ms = nullptr);
// The same time while the threads look for work, as a host rank's do between the layers of a step:
// they have run a small query just before.
double TimeAwake(host::HostAttention& host, const Layer& layer, const host::AttendBatch& batch,
                 bool help);

}  // namespace passel::bench
