#include "cluster/machine.h"

#include <fmt/format.h>
#include <hwloc.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <string_view>
#include <type_traits>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

std::string FirstLine(const char* path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// The value of "Key:   123 kB" in a /proc file, as text; empty where it is not there.
std::string ProcValue(const char* path, std::string_view key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t colon = line.find(':');
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return colon == std::string::npos || begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

// The number at the start of the text; nullopt for "max" and other words.
std::optional<uint64_t> Number(const std::string& text) {
  if (text.empty() || text[0] < '0' || text[0] > '9') return std::nullopt;
  return std::strtoull(text.c_str(), nullptr, 10);
}

uint64_t MemInfoBytes(std::string_view key) {
  return Number(ProcValue("/proc/meminfo", key)).value_or(0) * 1024;
}

// What the cgroup leaves of its memory limit; nullopt without a limit.
std::optional<uint64_t> CgroupFreeBytes() {
  struct Files {
    const char *limit, *used;
  };
  constexpr Files kVersions[] = {
      {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
      {"/sys/fs/cgroup/memory/memory.limit_in_bytes",
       "/sys/fs/cgroup/memory/memory.usage_in_bytes"},
  };
  for (const Files& files : kVersions) {
    const auto limit = Number(FirstLine(files.limit));
    const auto used = Number(FirstLine(files.used));
    if (limit && used) return *limit - std::min(*limit, *used);
  }
  return std::nullopt;
}

// "madvise" of "always [madvise] never".
std::string Bracketed(const std::string& line) {
  const size_t open = line.find('['), close = line.find(']');
  if (open == std::string::npos || close == std::string::npos) return line;
  return line.substr(open + 1, close - open - 1);
}

std::optional<uint64_t> Limit(__rlimit_resource_t resource) {
  rlimit limit{};
  if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  return limit.rlim_cur;
}

void ReadTopology(Machine& machine) {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return;
  const std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, void (*)(hwloc_topology_t)> owner(
      raw, hwloc_topology_destroy);
  if (hwloc_topology_load(raw) != 0) return;
  const auto count = [&](hwloc_obj_type_t type) {
    return static_cast<uint32_t>(std::max(0, hwloc_get_nbobjs_by_type(raw, type)));
  };
  machine.cores = count(HWLOC_OBJ_CORE);
  machine.cpus = count(HWLOC_OBJ_PU);
  machine.numa_nodes = count(HWLOC_OBJ_NUMANODE);
  hwloc_cpuset_t mask = hwloc_bitmap_alloc();
  if (mask != nullptr && hwloc_get_cpubind(raw, mask, HWLOC_CPUBIND_PROCESS) == 0) {
    machine.cpus_in_mask = static_cast<uint32_t>(
        std::max(0, hwloc_get_nbobjs_inside_cpuset_by_type(raw, mask, HWLOC_OBJ_PU)));
  }
  hwloc_bitmap_free(mask);
}

}  // namespace

Machine ReadMachine() {
  Machine machine;
  char name[256] = "";
  if (gethostname(name, sizeof(name) - 1) == 0) machine.host_name = name;
  machine.cpu_model = ProcValue("/proc/cpuinfo", "model name");
  ReadTopology(machine);
  machine.huge_pages = Bracketed(FirstLine("/sys/kernel/mm/transparent_hugepage/enabled"));
  machine.huge_page_pool_bytes = MemInfoBytes("Hugetlb:");
  machine.memory_bytes = MemInfoBytes("MemTotal:");
  machine.free_memory_bytes = MemInfoBytes("MemAvailable:");
  if (const auto cgroup = CgroupFreeBytes()) {
    machine.free_memory_bytes = std::min(machine.free_memory_bytes, *cgroup);
  }
  machine.locked_memory_limit_bytes = Limit(RLIMIT_MEMLOCK);
  machine.open_files_limit = Limit(RLIMIT_NOFILE);
  struct statvfs shm {};
  if (statvfs("/dev/shm", &shm) == 0) {
    machine.shm_bytes = uint64_t{shm.f_blocks} * shm.f_frsize;
    machine.free_shm_bytes = uint64_t{shm.f_bavail} * shm.f_frsize;
  }
  return machine;
}

std::string AffinityWarning(const Machine& machine, uint32_t wanted_threads,
                            uint32_t ranks_on_node) {
  if (machine.cpus_in_mask == 0) return "";  // unknown
  const uint32_t share = std::max(1u, machine.cpus / std::max(1u, ranks_on_node));
  const uint32_t wanted = wanted_threads == 0 ? share : wanted_threads;
  if (machine.cpus_in_mask >= wanted) return "";
  return fmt::format(
      "{}: the affinity mask leaves this rank {} of {} CPUs, {} {}; start mpirun with --bind-to "
      "none "
      "or give each rank its cores with a rankfile",
      machine.host_name, machine.cpus_in_mask, machine.cpus,
      wanted_threads == 0 ? "its share would be" : "it wants threads for", wanted);
}

uint32_t HostThreads(const config::Host& host, const Machine& machine, bool alone) {
  if (host.threads() > 0) return host.threads();
  return machine.cpus_in_mask > 1 && alone ? machine.cpus_in_mask - 1 : machine.cpus_in_mask;
}

std::chrono::microseconds SpinTime(const Machine& machine, uint32_t threads) {
  return std::chrono::microseconds(threads <= machine.cpus_in_mask ? 2000 : 20);
}

uint64_t HostMemoryBudget(const config::Host& host, const Machine& machine,
                          uint32_t node_host_ranks) {
  const uint64_t ranks = std::max(1u, node_host_ranks);
  if (host.memory_bytes() == 0) return machine.free_memory_bytes / 5 * 4 / ranks;
  const auto total = CheckedMul(host.memory_bytes(), ranks);
  if (!total || *total > machine.free_memory_bytes) {
    throw Error(
        ErrorClass::kMemory,
        fmt::format("{}: host.memory_bytes is {}, for each of {} host ranks on this node; "
                    "expected no more than its {} free bytes in all",
                    machine.host_name, host.memory_bytes(), ranks, machine.free_memory_bytes));
  }
  return host.memory_bytes();
}

}  // namespace passel::cluster
