#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace passel {

// SplitMix64 (Steele, Lea, Flood 2014): a counter-based generator; equal seeds give equal streams
// on every machine, which the standard library's distributions do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, 1), 53 bits.
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1.0p-53; }
  // Standard normal (Box–Muller).
  double Normal();

 private:
  uint64_t state_;
  double spare_ = 0;
  bool has_spare_ = false;
};

// FNV-1a over bytes; for deriving seeds from names and for config hashes.
uint64_t HashBytes(const void* data, size_t size, uint64_t basis = 0xcbf29ce484222325u);

// The SimHash projections R: [head_dim, k·l] row-major, iid N(0, 1), the same for the same seed on
// every rank. Column t·k + b is bit b of table t.
std::vector<float> RandomProjections(uint64_t seed, size_t head_dim, size_t k, size_t l);

}  // namespace passel
