#pragma once

#include <mpi.h>

#include <vector>

#include "runtime/base/collectives.h"

namespace passel::cluster {

// Collectives over host memory by MPI, on a communicator of the model ranks. One thread at a time.
// A failed MPI call throws Error{kCluster}.
class MpiCollectives final : public Collectives {
 public:
  // Does not own `comm`.
  explicit MpiCollectives(MPI_Comm comm);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string_view name() const override { return "MPI"; }
  // Each rank sums one slice over all ranks, in rank order, and the slices are gathered: 2n
  // elements of traffic a rank whatever the number of ranks, and one order of addition, so the same
  // bits everywhere (MPI_Allreduce promises neither).
  void AllReduceSum(std::span<float> data) override;
  void AllGather(std::span<const float> in, std::span<const size_t> counts,
                 std::span<float> out) override;
  void Broadcast(std::span<std::byte> host_data, int root) override;

 private:
  void AllReducePiece(std::span<float> data);

  MPI_Comm comm_;
  int rank_ = 0;
  int size_ = 1;
  std::vector<float> slices_;  // [size, slice]: this rank's slice of every rank's data
};

}  // namespace passel::cluster
