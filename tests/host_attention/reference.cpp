#include "tests/host_attention/reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <future>
#include <numeric>

namespace passel::host::reference {

Data MakeData(uint64_t seed, uint64_t n, uint32_t d, uint32_t group, double shift) {
  Random random(seed);
  Data data;
  data.d = d;
  data.group = group;
  data.n = n;
  std::vector<double> offset(d);
  for (double& x : offset) x = shift * random.Normal();
  data.rows.resize(n * 2 * d);
  for (uint64_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < d; ++j) {
      data.rows[i * 2 * d + j] = ToBf16(static_cast<float>(random.Normal() + offset[j]));
      data.rows[i * 2 * d + d + j] = ToBf16(static_cast<float>(random.Normal()));
    }
  }
  data.q.resize(size_t{group} * d);
  for (float& x : data.q) x = static_cast<float>(random.Normal());
  ComputeMean(data);
  return data;
}

void ComputeMean(Data& data) {
  std::vector<double> sum(data.d);
  for (uint64_t i = 0; i < data.n; ++i) {
    for (uint32_t j = 0; j < data.d; ++j) sum[j] += ToFloat(data.rows[i * 2 * data.d + j]);
  }
  data.mean.clear();
  for (const double x : sum) data.mean.push_back(static_cast<float>(x / double(data.n)));
}

namespace {

// Codes of one vector; r: [d, k·l].
void HashOne(const std::vector<double>& x, const std::vector<float>& r, uint32_t k, uint32_t l,
             uint16_t* codes) {
  std::vector<double> sums(size_t{k} * l);
  for (size_t j = 0; j < x.size(); ++j) {
    for (size_t c = 0; c < sums.size(); ++c) sums[c] += x[j] * double(r[j * sums.size() + c]);
  }
  for (uint32_t t = 0; t < l; ++t) {
    uint32_t code = 0;
    for (uint32_t b = 0; b < k; ++b) code |= (sums[size_t{t} * k + b] > 0 ? 1u : 0u) << b;
    codes[t] = static_cast<uint16_t>(code);
  }
}

}  // namespace

Codes Hash(const Data& data, uint64_t seed, uint32_t k, uint32_t l) {
  const std::vector<float> r = RandomProjections(seed, data.d, k, l);
  Codes codes;
  codes.keys.resize(data.n * l);
  codes.queries.resize(size_t{data.group} * l);
  std::vector<double> x(data.d);
  for (uint64_t i = 0; i < data.n; ++i) {
    for (uint32_t j = 0; j < data.d; ++j) {
      x[j] = double(ToFloat(data.rows[i * 2 * data.d + j])) - double(data.mean[j]);
    }
    HashOne(x, r, k, l, &codes.keys[i * l]);
  }
  for (uint32_t h = 0; h < data.group; ++h) {
    for (uint32_t j = 0; j < data.d; ++j) x[j] = data.q[size_t{h} * data.d + j];
    HashOne(x, r, k, l, &codes.queries[size_t{h} * l]);
  }
  return codes;
}

long double Inclusion(long double cosine, uint32_t k, uint32_t l) {
  const long double c = std::clamp(cosine, -1.0L, 1.0L);
  const long double p = std::pow(std::acos(-c) / std::acos(-1.0L), static_cast<long double>(k));
  long double u = 0;
  for (uint32_t j = 2; j <= l; ++j) {
    const long double choose =
        std::lgamma(l + 1.0L) - std::lgamma(j + 1.0L) - std::lgamma(l - j + 1.0L);
    const long double rest = l == j ? 0 : (l - j) * std::log1p(-p);
    u += std::exp(choose + j * std::log(p) + rest);
  }
  return u;
}

Exact Attend(const Data& data, uint32_t h, const std::vector<uint64_t>& ids, uint32_t k,
             uint32_t l) {
  Exact e;
  e.num.resize(data.d);
  const float* q = &data.q[size_t{h} * data.d];
  std::vector<double> scores, weights;
  for (const uint64_t i : ids) {
    const bf16* key = &data.rows[i * 2 * data.d];
    double dot = 0, centred = 0, norm = 0, q_norm = 0;
    for (uint32_t j = 0; j < data.d; ++j) {
      const double x = ToFloat(key[j]), y = x - double(data.mean[j]);
      dot += q[j] * x;
      centred += q[j] * y;
      norm += y * y;
      q_norm += double(q[j]) * q[j];
    }
    scores.push_back(dot / std::sqrt(double(data.d)));
    weights.push_back(l == 0 ? 1.0
                             : double(1 / Inclusion(centred / std::sqrt(norm * q_norm), k, l)));
  }
  e.max = scores.empty() ? double(kEmptyMax) : *std::max_element(scores.begin(), scores.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    const double w = std::exp(scores[i] - e.max) * weights[i];
    e.den += w;
    for (uint32_t j = 0; j < data.d; ++j) {
      e.num[j] += w * double(ToFloat(data.rows[ids[i] * 2 * data.d + data.d + j]));
    }
  }
  return e;
}

std::vector<uint64_t> Range(uint64_t first, uint64_t last) {
  std::vector<uint64_t> ids(last - first);
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

std::vector<uint64_t> Sampled(const Codes& codes, uint32_t h, uint32_t l, uint64_t first,
                              uint64_t last) {
  std::vector<uint64_t> ids;
  for (uint64_t i = first; i < last; ++i) {
    uint32_t agreeing = 0;
    for (uint32_t t = 0; t < l; ++t) {
      agreeing += codes.keys[i * l + t] == codes.queries[size_t{h} * l + t];
    }
    if (agreeing >= 2) ids.push_back(i);
  }
  return ids;
}

double OutputError(const Exact& exact, const float* num, float den) {
  double difference = 0, size = 0;
  for (size_t j = 0; j < exact.num.size(); ++j) {
    const double want = exact.num[j] / exact.den;
    difference += std::pow(double(num[j]) / double(den) - want, 2);
    size += want * want;
  }
  return std::sqrt(difference / size);
}

double LseError(const Exact& exact, float max, float den) {
  return std::fabs(double(max) + std::log(double(den)) - exact.max - std::log(exact.den));
}

Options MakeOptions(const Data& data, Estimator estimator, uint32_t k, uint32_t l) {
  Options options;
  options.estimator = estimator;
  options.head_dim = data.d;
  options.group = data.group;
  options.k = k;
  options.l = l;
  options.memory_bytes = uint64_t{1} << 30;
  options.threads = 2;
  return options;
}

Data WithBf16Queries(Data data) {
  for (float& x : data.q) x = ToFloat(ToBf16(x));
  return data;
}

std::vector<PartialItem> Wait(HostAttention& host, AttendBatch batch) {
  std::mutex mutex;
  std::condition_variable arrived;
  bool done = false;
  std::vector<PartialItem> result;
  const Status status = host.Attend(std::move(batch), [&](std::vector<PartialItem> partials) {
    const std::lock_guard lock(mutex);
    result = std::move(partials);
    done = true;
    arrived.notify_one();
  });
  EXPECT_EQ(status, Status::kOk);
  if (status != Status::kOk) return {};
  std::unique_lock lock(mutex);
  arrived.wait(lock, [&] { return done; });
  return result;
}

Status WaitRead(HostAttention& host, std::vector<ReadSpan> spans) {
  std::promise<Status> done;
  const Status status = host.Read(std::move(spans), [&](Status read) { done.set_value(read); });
  return status == Status::kOk ? done.get_future().get() : status;
}

void OpenOne(HostAttention& host, const std::vector<SegmentSpec>& plan,
             std::vector<uint32_t> segments) {
  OpenSpec spec;
  spec.request = RequestId(1);
  spec.layers = 1;
  spec.layer_list = {0};
  if (segments.empty()) {
    segments.resize(plan.size());
    std::iota(segments.begin(), segments.end(), 0u);
  }
  for (const uint32_t s : segments) spec.parts.push_back({0, s, plan[s]});
  host.Open(spec);
}

void AppendAll(HostAttention& host, const Data& data, const Codes* codes, uint32_t l,
               const std::vector<SegmentSpec>& plan, uint64_t step,
               const std::vector<uint32_t>& segments) {
  ASSERT_EQ(host.SetMean({RequestId(1), 0, 0, data.mean}), Status::kOk);
  for (uint32_t s = 0; s < plan.size(); ++s) {
    if (!segments.empty() && std::find(segments.begin(), segments.end(), s) == segments.end()) {
      continue;
    }
    const uint64_t end = std::min(data.n, plan[s].first_token + plan[s].capacity);
    for (uint64_t at = plan[s].first_token; at < end; at += step) {
      AppendSpan span{RequestId(1),
                      0,
                      0,
                      at,
                      static_cast<uint32_t>(std::min(step, end - at)),
                      &data.rows[at * 2 * data.d],
                      codes == nullptr ? nullptr : &codes->keys[at * l]};
      ASSERT_EQ(host.Append(span), Status::kOk);
    }
  }
}

Sent::Sent(const Data& data, const Codes& all, uint32_t l, uint64_t first, uint32_t count) {
  const bf16* from = &data.rows[first * 2 * data.d];
  rows.assign(from, from + size_t{count} * 2 * data.d);
  const uint16_t* from_codes = &all.keys[first * l];
  codes.assign(from_codes, from_codes + size_t{count} * l);
}

Sent::~Sent() {
  std::fill(rows.begin(), rows.end(), ToBf16(1e30f));
  std::fill(codes.begin(), codes.end(), uint16_t{0xffff});
  if (gone != nullptr) ++*gone;
}

QueryItem ItemOf(const Data& data, const Codes* codes, uint64_t tokens) {
  return {RequestId(1),  0,
          tokens,        codes == nullptr,
          data.q.data(), codes == nullptr ? nullptr : codes->queries.data()};
}

}  // namespace passel::host::reference
