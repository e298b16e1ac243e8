#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "configs/config.pb.h"

namespace passel::cluster {

// Reads a config file, applies `--set a.b=c` overrides in order, fills every default and checks
// every range (configs/config.proto documents both). Throws Error{kUsage} naming file, line and
// field, and what was expected. An empty path means defaults and overrides alone.
config::Config LoadConfig(const std::string& path, std::span<const std::string> overrides);

// The same text for the same settings; what --dry-run prints and ranks compare the hash of.
std::string CanonicalText(const config::Config& config);
uint64_t ConfigHash(const config::Config& config);

// Dense layers of a model with this many layers, rising. Throws Error{kUsage} where one is named
// that does not exist.
std::vector<uint32_t> DenseLayers(const config::Attention& attention, uint32_t layers);

}  // namespace passel::cluster
