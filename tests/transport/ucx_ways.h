#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "transport/frame.h"

namespace passel::transport {

inline constexpr uint64_t kNonce = 0xabcdef;
inline constexpr uint64_t kMiB = 1u << 20;
inline constexpr std::chrono::milliseconds kCloseTimeout{5000};

// What UCX is let to use.
struct Way {
  const char* name;
  std::map<std::string, std::string> environment;
  const char* described;  // what Describe must contain
};
inline const Way kTcp{"tcp", {{"UCX_TLS", "tcp,self"}, {"UCX_NET_DEVICES", "lo"}}, "tcp (lo)"};
inline const Way kMemory{"memory", {{"UCX_TLS", "posix,self"}}, "shared memory (posix)"};
inline const Way kSysv{"sysv", {{"UCX_TLS", "sysv,self"}}, "shared memory (sysv)"};

inline FrameHeader Header(FrameType type, uint32_t count = 0, uint64_t step = 0) {
  FrameHeader h;
  h.type = type;
  h.count = count;
  h.step = step;
  return h;
}

// Bytes that depend on the seed.
inline std::vector<std::byte> Payload(uint64_t seed, uint64_t bytes) {
  std::vector<std::byte> out(bytes);
  uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
  for (uint64_t i = 0; i < bytes; i += 8) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    std::memcpy(&out[i], &x, std::min<uint64_t>(8, bytes - i));
  }
  return out;
}

}  // namespace passel::transport
