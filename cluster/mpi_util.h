#pragma once

#include <mpi.h>

#include <cstddef>
#include <source_location>
#include <span>
#include <vector>

namespace passel::cluster {

// Throws Error{kCluster} naming the call, MPI's own text and the place, unless code is MPI_SUCCESS.
void CheckMpi(int code, const char* call,
              std::source_location where = std::source_location::current());

// Waits for a non-blocking operation: polls for a short while, then yields, then sleeps in growing
// naps, so that a rank that waits for minutes (others load a model) leaves its core to others.
void WaitMpi(MPI_Request* request, const char* call);

// Broadcast of any size.
void BroadcastBytes(std::span<std::byte> data, int root, MPI_Comm comm);

// One fixed-size value of each rank, in rank order, on every rank.
template <typename T>
std::vector<T> AllGatherValues(const T& mine, int size, MPI_Comm comm) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<T> all(static_cast<size_t>(size));
  MPI_Request request;
  CheckMpi(
      MPI_Iallgather(&mine, sizeof(T), MPI_BYTE, all.data(), sizeof(T), MPI_BYTE, comm, &request),
      "MPI_Iallgather");
  WaitMpi(&request, "MPI_Iallgather");
  return all;
}

}  // namespace passel::cluster
