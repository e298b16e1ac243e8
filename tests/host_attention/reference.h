#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "host_attention/host_attention.h"
#include "host_attention/kernels.h"
#include "runtime/base/bf16.h"
#include "runtime/base/random.h"

namespace passel::host::reference {

// Keys and values of one KV head, and the group's queries; values are exact in bf16.
struct Data {
  uint32_t d = 0, group = 0;
  uint64_t n = 0;
  std::vector<bf16> rows;   // [n, 2, d]
  std::vector<float> q;     // [group, d]
  std::vector<float> mean;  // [d], of the keys
};
// q, k, v ~ N(0, 1), keys shifted by a vector of about `shift` an element.
Data MakeData(uint64_t seed, uint64_t n, uint32_t d, uint32_t group, double shift = 0.3);
void ComputeMean(Data& data);

// SimHash codes from float64 dot products.
struct Codes {
  std::vector<uint16_t> keys;     // [n, l]
  std::vector<uint16_t> queries;  // [group, l]
};
Codes Hash(const Data& data, uint64_t seed, uint32_t k, uint32_t l);

// A partial in float64, relative to `max`.
struct Exact {
  double max = 0, den = 0;
  std::vector<double> num;  // [d]
};
// Tokens `ids` for head h; weighted by 1/u (k, l, data.mean), or not where l = 0.
Exact Attend(const Data& data, uint32_t h, const std::vector<uint64_t>& ids, uint32_t k,
             uint32_t l);
std::vector<uint64_t> Range(uint64_t first, uint64_t last);
// Tokens of [first, last) that share ≥ 2 codes with query head h.
std::vector<uint64_t> Sampled(const Codes& codes, uint32_t h, uint32_t l, uint64_t first,
                              uint64_t last);
// u by summing the binomial tail in long double.
long double Inclusion(long double cosine, uint32_t k, uint32_t l);

// Relative L2 distance of num/den, and relative difference of max + ln den from the reference.
double OutputError(const Exact& exact, const float* num, float den);
double LseError(const Exact& exact, float max, float den);

// For `data`'s shape: 1 GiB, 2 threads.
Options MakeOptions(const Data& data, Estimator estimator, uint32_t k, uint32_t l);

// Its queries as they travel to a host rank: in bf16.
Data WithBf16Queries(Data data);

// A HostAttention call, waited for.
std::vector<PartialItem> Wait(HostAttention& host, AttendBatch batch);
// What it was done with or, where nothing was started, what it returned.
Status WaitRead(HostAttention& host, std::vector<ReadSpan> spans);

// Opens request 1, layer 0, KV head 0 with these segments of the plan (all where empty).
void OpenOne(HostAttention& host, const std::vector<SegmentSpec>& plan,
             std::vector<uint32_t> segments = {});
// Appends tokens [first, last) of `data` in spans of `step`, those whose segment is in `segments`
// (all where empty).
void AppendAll(HostAttention& host, const Data& data, const Codes* codes, uint32_t l,
               const std::vector<SegmentSpec>& plan, uint64_t step = 100,
               const std::vector<uint32_t>& segments = {});
// Tokens [first, first + count) as a sender has them, overwritten when they are let go.
struct Sent {
  std::vector<bf16> rows;
  std::vector<uint16_t> codes;
  std::atomic<int>* gone = nullptr;  // counts
  Sent(const Data& data, const Codes& all, uint32_t l, uint64_t first, uint32_t count);
  Sent(const Sent&) = delete;
  Sent& operator=(const Sent&) = delete;
  ~Sent();
};
QueryItem ItemOf(const Data& data, const Codes* codes, uint64_t tokens);

}  // namespace passel::host::reference
