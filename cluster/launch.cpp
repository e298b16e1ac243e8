#include "cluster/launch.h"

#include <fmt/format.h>
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <random>

#include "cluster/mpi_collectives.h"
#include "cluster/mpi_util.h"
#include "runtime/base/random.h"

namespace passel::cluster {
namespace {

constexpr uint64_t kMaxAddressBytes = uint64_t{64} << 10;
constexpr int32_t kNoRole = -1;

// What a rank tells the others when roles are given out.
struct Introduction {
  uint64_t config_hash;
  int64_t pid;
  uint64_t cpus;        // that it may use
  int32_t role;         // Role, or kNoRole without --role
  int32_t node_leader;  // lowest world rank that shares memory with this one: names the node
  char node[MPI_MAX_PROCESSOR_NAME];
};

// "1", "1 and 4", "1, 2 and 4"; from the eighth on they are counted.
std::string ListRanks(const std::vector<int>& ranks) {
  constexpr size_t kNamed = 8;
  std::string out;
  const size_t named = std::min(ranks.size(), kNamed);
  for (size_t i = 0; i < named; ++i) {
    if (i > 0) out += i + 1 == ranks.size() ? " and " : ", ";
    out += std::to_string(ranks[i]);
  }
  if (ranks.size() > named) out += fmt::format(" and {} more", ranks.size() - named);
  return (ranks.size() == 1 ? "rank " : "ranks ") + out;
}

void CheckHashes(const std::vector<Introduction>& all) {
  std::vector<int> different;
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].config_hash != all[0].config_hash) different.push_back(static_cast<int>(r));
  }
  if (different.empty()) return;
  const Introduction& first = all[static_cast<size_t>(different[0])];
  throw Error(
      ErrorClass::kUsage,
      fmt::format("the config of {} (node {}) differs from rank 0's (node {}); expected the "
                  "same --config and --set on every rank",
                  ListRanks(different), first.node, all[0].node));
}

// Throws what is wrong with the roles that the ranks were given on their command lines.
void CheckGivenRoles(const std::vector<Introduction>& all) {
  std::vector<int> without;
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].role == kNoRole) without.push_back(static_cast<int>(r));
  }
  if (without.size() == all.size()) return;
  if (!without.empty()) {
    throw Error(ErrorClass::kUsage,
                fmt::format("{} started without --role, others with it; expected --role model or "
                            "--role host on every rank or on none",
                            ListRanks(without)));
  }
  if (all[0].role != static_cast<int32_t>(Role::kModel)) {
    throw Error(ErrorClass::kUsage,
                "rank 0 started with --role host; expected the model ranks first on mpirun's "
                "command line: mpirun -np 1 passel … --role model : -np 2 passel … --role host");
  }
}

// Equal for equal affinity masks.
uint64_t CpusOfThisProcess() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return 0;
  return HashBytes(&mask, sizeof(mask));
}

void CheckWorldSize(size_t world, uint32_t model_ranks, bool roles_given) {
  if (roles_given || world >= model_ranks) return;
  throw Error(ErrorClass::kCluster,
              fmt::format("mpirun started {} rank{}; expected at least {} (cluster.model_ranks is "
                          "{}): mpirun -np {} or more, the ranks above that hold KV cache",
                          world, world == 1 ? "" : "s", model_ranks, model_ranks, model_ranks));
}

}  // namespace

struct Launch::Impl {
  int rank = 0;
  int size = 1;
  int thread_level = MPI_THREAD_SINGLE;
  bool abandoned = false;
  MPI_Comm model_comm = MPI_COMM_NULL;

  Introduction Introduce(std::optional<Role> role, uint64_t config_hash) const;
};

Introduction Launch::Impl::Introduce(std::optional<Role> role, uint64_t config_hash) const {
  Introduction mine{};
  mine.config_hash = config_hash;
  mine.pid = getpid();
  mine.cpus = CpusOfThisProcess();
  mine.role = role ? static_cast<int32_t>(*role) : kNoRole;
  int length = 0;
  CheckMpi(MPI_Get_processor_name(mine.node, &length), "MPI_Get_processor_name");
  MPI_Comm node = MPI_COMM_NULL;
  CheckMpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node),
           "MPI_Comm_split_type");
  int leader = rank;  // of rank 0 of the node's communicator, which is ordered by world rank
  CheckMpi(MPI_Bcast(&leader, 1, MPI_INT, 0, node), "MPI_Bcast");
  CheckMpi(MPI_Comm_free(&node), "MPI_Comm_free");
  mine.node_leader = leader;
  return mine;
}

Launch::Launch(int* argc, char*** argv) : impl_(std::make_unique<Impl>()) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  Check(initialized == 0, "MPI is initialised once");
  CheckMpi(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &impl_->thread_level),
           "MPI_Init_thread");
  // Errors come back as codes and become exceptions; the default handler ends the job in silence.
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  CheckMpi(MPI_Comm_rank(MPI_COMM_WORLD, &impl_->rank), "MPI_Comm_rank");
  CheckMpi(MPI_Comm_size(MPI_COMM_WORLD, &impl_->size), "MPI_Comm_size");
}

Launch::~Launch() {
  if (impl_->abandoned) return;
  if (impl_->model_comm != MPI_COMM_NULL) MPI_Comm_free(&impl_->model_comm);
  MPI_Finalize();
}

int Launch::world_rank() const { return impl_->rank; }
int Launch::world_size() const { return impl_->size; }
bool Launch::any_thread() const { return impl_->thread_level >= MPI_THREAD_SERIALIZED; }
void Launch::Abandon() { impl_->abandoned = true; }

void Launch::Agree(const std::function<void()>& step) {
  // An error that another rank reports counts only where no rank has one of its own.
  struct Outcome {
    int32_t error_class = 0;  // 0: none
    int32_t silent = 0;
  };
  Outcome mine;
  std::exception_ptr error;
  try {
    step();
  } catch (const Error& e) {
    error = std::current_exception();
    mine = {static_cast<int32_t>(e.error_class()), dynamic_cast<const SilentError*>(&e) != nullptr};
  } catch (const std::bad_alloc&) {
    error = std::make_exception_ptr(Error(
        ErrorClass::kMemory, fmt::format("rank {} ran out of memory while starting", impl_->rank)));
    mine.error_class = static_cast<int32_t>(ErrorClass::kMemory);
  } catch (const std::exception& e) {
    error = std::make_exception_ptr(Error(ErrorClass::kBug, e.what()));
    mine.error_class = static_cast<int32_t>(ErrorClass::kBug);
  }
  const auto all = AllGatherValues(mine, impl_->size, MPI_COMM_WORLD);
  int reporter = -1;
  for (int r = impl_->size - 1; r >= 0; --r) {
    const Outcome& outcome = all[static_cast<size_t>(r)];
    if (outcome.error_class == 0) continue;
    const bool better =
        reporter < 0 || outcome.silent == 0 || all[static_cast<size_t>(reporter)].silent != 0;
    if (better) reporter = r;
  }
  if (reporter < 0) return;
  if (reporter == impl_->rank) std::rethrow_exception(error);
  throw SilentError(static_cast<ErrorClass>(all[static_cast<size_t>(reporter)].error_class),
                    fmt::format("rank {} reports an error", reporter));
}

std::vector<RankInfo> Launch::AssignRoles(uint32_t model_ranks, std::optional<Role> role,
                                          uint64_t config_hash) {
  const auto all =
      AllGatherValues(impl_->Introduce(role, config_hash), impl_->size, MPI_COMM_WORLD);
  const bool roles_given = all[0].role != kNoRole;
  Agree([&] {
    if (impl_->rank != 0) return;  // every rank sees the same; one says so
    CheckHashes(all);
    CheckGivenRoles(all);
    CheckWorldSize(all.size(), model_ranks, roles_given);
  });
  std::vector<RankInfo> ranks(all.size());
  uint32_t count[2] = {0, 0};  // ranks of each role so far
  for (size_t r = 0; r < all.size(); ++r) {
    RankInfo& info = ranks[r];
    info.rank = RankId(static_cast<int32_t>(r));
    info.role = roles_given       ? static_cast<Role>(all[r].role)
                : r < model_ranks ? Role::kModel
                                  : Role::kHost;
    info.index = count[static_cast<size_t>(info.role)]++;
    info.node = all[r].node;
    info.pid = all[r].pid;
  }
  for (size_t r = 0; r < all.size(); ++r) {
    size_t first = 0;
    while (all[first].node_leader != all[r].node_leader || all[first].cpus != all[r].cpus) ++first;
    ranks[r].cpu_group = RankId(static_cast<int32_t>(first));
    for (size_t other = 0; other < all.size(); ++other) {
      ranks[r].node_host_ranks +=
          all[other].node_leader == all[r].node_leader && ranks[other].role == Role::kHost;
    }
  }
  return ranks;
}

uint64_t Launch::Exchange(std::vector<RankInfo>& ranks, uint32_t threads, uint64_t memory_bytes,
                          std::span<const std::byte> address) {
  Check(ranks.size() == static_cast<size_t>(impl_->size), "Exchange follows AssignRoles");
  Check(address.size() <= kMaxAddressBytes, "a worker address of at most 64 KiB");
  struct Sizes {
    uint64_t memory_bytes;
    uint64_t address_bytes;
    uint64_t nonce;  // of rank 0
    uint64_t threads;
  };
  Sizes mine{memory_bytes, address.size(), 0, threads};
  if (impl_->rank == 0) {
    std::random_device random;
    while (mine.nonce == 0) mine.nonce = (uint64_t{random()} << 32) | random();
  }
  const auto all = AllGatherValues(mine, impl_->size, MPI_COMM_WORLD);
  // Padded to the longest: one collective, and no int offsets that many ranks could overflow.
  uint64_t longest = 0;
  for (const Sizes& sizes : all) longest = std::max(longest, sizes.address_bytes);
  std::vector<std::byte> padded(longest);
  std::copy(address.begin(), address.end(), padded.begin());
  std::vector<std::byte> addresses(longest * all.size());
  MPI_Request request;
  CheckMpi(MPI_Iallgather(padded.data(), static_cast<int>(longest), MPI_BYTE, addresses.data(),
                          static_cast<int>(longest), MPI_BYTE, MPI_COMM_WORLD, &request),
           "MPI_Iallgather");
  WaitMpi(&request, "MPI_Iallgather");
  for (size_t r = 0; r < all.size(); ++r) {
    ranks[r].memory_bytes = all[r].memory_bytes;
    ranks[r].threads = static_cast<uint32_t>(all[r].threads);
    const auto* begin = addresses.data() + r * longest;
    ranks[r].address.assign(begin, begin + all[r].address_bytes);
  }
  return all[0].nonce;
}

std::unique_ptr<Collectives> Launch::MakeModelCollectives(std::span<const RankInfo> ranks) {
  Check(ranks.size() == static_cast<size_t>(impl_->size), "MakeModelCollectives gets all ranks");
  Check(impl_->model_comm == MPI_COMM_NULL, "MakeModelCollectives is called once");
  const RankInfo& me = ranks[static_cast<size_t>(impl_->rank)];
  const bool model = me.role == Role::kModel;
  CheckMpi(MPI_Comm_split(MPI_COMM_WORLD, model ? 0 : MPI_UNDEFINED, static_cast<int>(me.index),
                          &impl_->model_comm),
           "MPI_Comm_split");
  if (!model) return nullptr;
  return std::make_unique<MpiCollectives>(impl_->model_comm);
}

std::string MpiLibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  CheckMpi(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  const std::string version(text, static_cast<size_t>(length));
  const std::string line = version.substr(0, version.find('\n'));
  return line.substr(0, line.find_last_not_of(' ') + 1);
}

}  // namespace passel::cluster
