#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/collectives.h"
#include "runtime/base/error.h"
#include "runtime/base/ids.h"

namespace passel::cluster {

enum class Role : uint8_t { kModel, kHost };

// One rank, as all ranks know it after start.
struct RankInfo {
  RankId rank;
  Role role = Role::kModel;
  uint32_t index = 0;  // among the ranks of its role
  std::string node;    // host name
  int64_t pid = 0;
  uint32_t node_host_ranks = 0;    // host ranks on the same node
  RankId cpu_group;                // the first rank of its node that may use the same CPUs
  uint32_t threads = 0;            // that compute or communicate
  uint64_t memory_bytes = 0;       // budget: KV and tables (host), device memory (model)
  std::vector<std::byte> address;  // of its UCX worker
};

// MPI from MPI_Init_thread to MPI_Finalize. The only user of MPI but for MpiCollectives.
class Launch {
 public:
  // Initialises MPI (threads: as many as it grants). Without mpirun the job is a single rank.
  Launch(int* argc, char*** argv);
  // Finalises MPI, which waits for every rank: right after a clean end and after an error that
  // Agree shared.
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  int world_rank() const;
  int world_size() const;
  // Whether MPI_THREAD_SERIALIZED or more was granted: collectives may then be called from another
  // thread than this one, one at a time.
  bool any_thread() const;

  // After an abnormal end (a rank is lost, an error of this rank alone): the destructor no longer
  // finalises MPI, which would wait for ranks that never come. End the process with _exit then.
  void Abandon();

  // Runs `step` on every rank and compares how it ended. If it threw on any rank, every rank
  // throws: the lowest failing rank its own error, the others SilentError of the same class, so
  // that one message reaches the user. Every rank must call it.
  void Agree(const std::function<void()>& step);

  // Roles by `model_ranks`, or by `role` where given (MPMD: then on every rank). Throws (through
  // Agree) Error{kCluster} where the world is too small, Error{kUsage} where the ranks' config
  // hashes differ or --role is not on every rank, and names them. World rank 0 is always a model
  // rank: with --role, model ranks come first.
  // Fills everything of RankInfo but threads, memory_bytes and address.
  std::vector<RankInfo> AssignRoles(uint32_t model_ranks, std::optional<Role> role,
                                    uint64_t config_hash);
  // Gathers threads, memory_bytes and address from every rank into `ranks`, and a nonce that rank 0
  // drew.
  uint64_t Exchange(std::vector<RankInfo>& ranks, uint32_t threads, uint64_t memory_bytes,
                    std::span<const std::byte> address);

  // Collectives of the model ranks; null on host ranks. Every rank must call it.
  // Does not outlive the Launch.
  std::unique_ptr<Collectives> MakeModelCollectives(std::span<const RankInfo> ranks);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// An error that another rank reports; main exits with its code and prints nothing.
class SilentError : public Error {
 public:
  using Error::Error;
};

// "Open MPI v4.1.4, …"; also before MPI is initialised.
std::string MpiLibraryVersion();

}  // namespace passel::cluster
