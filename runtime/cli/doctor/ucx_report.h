#pragma once

#include <string>
#include <vector>

namespace passel {

struct UcxTransport {
  std::string name;                  // "tcp", "posix", "rc_mlx5"
  std::vector<std::string> devices;  // "eth0", "memory"
};

// Version of the UCX library that is loaded, which may be newer than the one compiled against.
std::string UcxVersion();

// Every transport that UCX offers on this machine, with its devices. What cannot be queried is left
// out.
std::vector<UcxTransport> UcxTransports();

}  // namespace passel
