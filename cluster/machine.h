#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "configs/config.pb.h"

namespace passel::cluster {

// What this process may use of the machine it runs on.
struct Machine {
  std::string host_name;
  std::string cpu_model;
  uint32_t cores = 0;         // physical
  uint32_t cpus = 0;          // hardware threads
  uint32_t cpus_in_mask = 0;  // of those, what the affinity mask and the cgroup leave
  uint32_t numa_nodes = 0;
  std::string huge_pages;             // transparent huge pages: "always", "madvise", "never"
  uint64_t huge_page_pool_bytes = 0;  // reserved explicit huge pages
  uint64_t memory_bytes = 0;
  uint64_t free_memory_bytes = 0;  // available without swapping, within the cgroup's limit
  std::optional<uint64_t> locked_memory_limit_bytes;  // nullopt: unlimited
  std::optional<uint64_t> open_files_limit;           // nullopt: unlimited
  uint64_t shm_bytes = 0;                             // size of /dev/shm; 0: there is none
  uint64_t free_shm_bytes = 0;
};

// Reads the machine. What cannot be read stays empty or 0; never throws for that.
Machine ReadMachine();

// A warning where the affinity mask leaves this rank fewer CPUs than it wants threads (0: than its
// share of the machine among `ranks_on_node` ranks), with what to do about it. Empty where all is
// well. Open MPI binds each rank to one core where a job has one or two.
std::string AffinityWarning(const Machine& machine, uint32_t wanted_threads,
                            uint32_t ranks_on_node);

// Attention threads of a host rank (config.proto: host.threads). 0 are all CPUs of its mask, but
// for one where no other rank shares them (`alone`): its own thread, which communicates, then has a
// CPU, and takes a share of the work. 0 where the mask is not known.
uint32_t HostThreads(const config::Host& host, const Machine& machine, bool alone);

// How long a thread with nothing to do looks for work before it sleeps, where `threads` threads of
// all ranks share this rank's CPUs: long where each has a CPU of its own, since being woken costs
// tens of microseconds several times a layer; short where a waiting thread keeps another from its
// work.
std::chrono::microseconds SpinTime(const Machine& machine, uint32_t threads);

// Memory budget of a host rank for KV cache and tables (config.proto: host.memory_bytes), where
// `node_host_ranks` host ranks share the node. Throws Error{kMemory} where the budgets of the node
// exceed its free memory.
uint64_t HostMemoryBudget(const config::Host& host, const Machine& machine,
                          uint32_t node_host_ranks);

}  // namespace passel::cluster
