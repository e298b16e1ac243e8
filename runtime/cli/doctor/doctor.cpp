#include "runtime/cli/doctor/doctor.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <string>

#include "cluster/launch.h"
#include "cluster/machine.h"
#include "gpu/device.h"
#include "runtime/cli/doctor/ucx_report.h"

namespace passel {
namespace {

// UCX's posix shared memory takes about 4.3 MB of /dev/shm for each rank.
constexpr uint64_t kShmBytesPerRank = 4'300'000;
constexpr uint64_t kPlentyOfShmRanks = 8;

void Line(std::ostream& out, std::string_view name, const std::string& text) {
  out << fmt::format("{:<13}{}\n", name, text);
}

void Advice(std::ostream& out, const std::string& text) {
  out << fmt::format("{:<11}! {}\n", "", text);
}

std::string Bytes(uint64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes >= uint64_t{1} << 30) return fmt::format("{:.1f} GiB", value / (1u << 30));
  return fmt::format("{:.1f} MiB", value / (1u << 20));
}

std::string BytesOrUnlimited(std::optional<uint64_t> bytes) {
  return bytes ? Bytes(*bytes) : "unlimited";
}

// Whether there is an RDMA transport.
bool ReportUcx(std::ostream& out) {
  Line(out, "UCX", UcxVersion());
  bool network = false;
  bool rdma = false;
  for (const UcxTransport& transport : UcxTransports()) {
    std::string devices;
    const std::string family = transport.name.substr(0, 2);
    rdma |= family == "rc" || family == "ud" || family == "dc";
    for (const std::string& device : transport.devices) {
      devices += (devices.empty() ? "" : ", ") + device;
      // Loopback reaches no other node.
      network |= transport.name != "self" && device != "memory" && device != "lo";
    }
    Line(out, "", fmt::format("{}: {}", transport.name, devices));
  }
  if (!network) Advice(out, "no network device: ranks can only run on this machine");
  return rdma;
}

void ReportCuda(std::ostream& out) {
  std::string why;
  const auto device = gpu::MakeCudaDevice({}, &why);
  if (device == nullptr) {
    Line(out, "CUDA", "none: " + why + "; model ranks compute on the CPU");
    return;
  }
  const gpu::DeviceInfo info = device->info();
  Line(out, "CUDA", fmt::format("{}, {}", info.name, Bytes(info.memory_bytes)));
}

// Looked up by name, so that this works in builds without NCCL.
void ReportNccl(std::ostream& out) {
  void* library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL);
  using GetVersion = int (*)(int*);
  const auto get_version =
      library == nullptr ? nullptr : reinterpret_cast<GetVersion>(dlsym(library, "ncclGetVersion"));
  int version = 0;
  if (get_version == nullptr || get_version(&version) != 0) {
    Line(out, "NCCL", "none: needed for more than one model rank with GPUs");
  } else if (version >= 10000) {
    Line(out, "NCCL", fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100));
  } else {
    Line(out, "NCCL", fmt::format("{}.{}.{}", version / 1000, version / 100 % 10, version % 100));
  }
  if (library != nullptr) dlclose(library);
}

void ReportMachine(std::ostream& out, const cluster::Machine& machine) {
  Line(out, "CPU", machine.cpu_model.empty() ? "unknown" : machine.cpu_model);
  Line(out, "",
       fmt::format("{} cores, {} CPUs, {} of them usable by this process", machine.cores,
                   machine.cpus, machine.cpus_in_mask));
  if (const auto warning = cluster::AffinityWarning(machine, 0, 1); !warning.empty()) {
    Advice(out, warning);
  }
  Line(out, "NUMA",
       fmt::format("{} node{}{}", machine.numa_nodes, machine.numa_nodes == 1 ? "" : "s",
                   machine.numa_nodes > 1 ? ": run one host rank on each" : ""));
  Line(out, "Memory",
       fmt::format("{}, {} free", Bytes(machine.memory_bytes), Bytes(machine.free_memory_bytes)));
  Line(out, "Huge pages",
       fmt::format("{}; {} reserved", machine.huge_pages.empty() ? "unknown" : machine.huge_pages,
                   Bytes(machine.huge_page_pool_bytes)));
  if (machine.huge_pages == "never") {
    Advice(out, "transparent huge pages are off: host attention reads memory with more TLB misses");
  }
}

void ReportLimits(std::ostream& out, const cluster::Machine& machine, bool rdma) {
  Line(out, "Limits",
       fmt::format(
           "locked memory {}, open files {}", BytesOrUnlimited(machine.locked_memory_limit_bytes),
           machine.open_files_limit ? fmt::to_string(*machine.open_files_limit) : "unlimited"));
  if (rdma && machine.locked_memory_limit_bytes) {
    Advice(out, "RDMA registers memory: set the locked-memory limit to unlimited (ulimit -l)");
  }
  if (machine.shm_bytes == 0) {
    Line(out, "/dev/shm", "none");
    Advice(out, "without /dev/shm ranks of one machine talk over TCP");
    return;
  }
  Line(out, "/dev/shm",
       fmt::format("{}, {} free", Bytes(machine.shm_bytes), Bytes(machine.free_shm_bytes)));
  if (machine.free_shm_bytes < kShmBytesPerRank * kPlentyOfShmRanks) {
    Advice(out, fmt::format("room for {} ranks ({} each)",
                            machine.free_shm_bytes / kShmBytesPerRank, Bytes(kShmBytesPerRank)));
  }
}

}  // namespace

int RunDoctor(std::ostream& out) {
  const cluster::Machine machine = cluster::ReadMachine();
  Line(out, "Host", machine.host_name);
  Line(out, "MPI", cluster::MpiLibraryVersion());
  const bool rdma = ReportUcx(out);
  ReportCuda(out);
  ReportNccl(out);
  ReportMachine(out, machine);
  ReportLimits(out, machine, rdma);
  return 0;
}

}  // namespace passel
