#include "cluster/mpi_collectives.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cluster/mpi_util.h"
#include "runtime/base/error.h"

namespace passel::cluster {

MpiCollectives::MpiCollectives(MPI_Comm comm) : comm_(comm) {
  CheckMpi(MPI_Comm_rank(comm, &rank_), "MPI_Comm_rank");
  CheckMpi(MPI_Comm_size(comm, &size_), "MPI_Comm_size");
}

void MpiCollectives::AllReduceSum(std::span<float> data) {
  if (size_ == 1) return;
  constexpr size_t kPiece = size_t{4} << 20;  // bounds the scratch; far below MPI's int counts
  for (size_t at = 0; at < data.size(); at += kPiece) {
    AllReducePiece(data.subspan(at, std::min(kPiece, data.size() - at)));
  }
}

void MpiCollectives::AllReducePiece(std::span<float> data) {
  const auto ranks = static_cast<size_t>(size_);
  const auto begin = [&](size_t r) { return data.size() * r / ranks; };
  const auto me = static_cast<size_t>(rank_);
  const size_t slice = begin(me + 1) - begin(me);
  std::vector<int> counts(ranks), offsets(ranks), my_counts(ranks, static_cast<int>(slice)),
      my_offsets(ranks);
  for (size_t r = 0; r < ranks; ++r) {
    offsets[r] = static_cast<int>(begin(r));
    counts[r] = static_cast<int>(begin(r + 1) - begin(r));
    my_offsets[r] = static_cast<int>(r * slice);
  }
  slices_.resize(ranks * slice);
  MPI_Request request;
  CheckMpi(MPI_Ialltoallv(data.data(), counts.data(), offsets.data(), MPI_FLOAT, slices_.data(),
                          my_counts.data(), my_offsets.data(), MPI_FLOAT, comm_, &request),
           "MPI_Ialltoallv");
  WaitMpi(&request, "MPI_Ialltoallv");
  float* sum = data.data() + begin(me);
  std::copy_n(slices_.data(), slice, sum);
  for (size_t r = 1; r < ranks; ++r) {
    const float* other = slices_.data() + r * slice;
    for (size_t i = 0; i < slice; ++i) sum[i] += other[i];
  }
  CheckMpi(MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, data.data(), counts.data(),
                           offsets.data(), MPI_FLOAT, comm_, &request),
           "MPI_Iallgatherv");
  WaitMpi(&request, "MPI_Iallgatherv");
}

void MpiCollectives::AllGather(std::span<const float> in, std::span<const size_t> counts,
                               std::span<float> out) {
  const auto ranks = static_cast<size_t>(size_);
  const auto me = static_cast<size_t>(rank_);
  Check(counts.size() == ranks, "AllGather: one count for each rank");
  Check(in.size() == counts[me], "AllGather: this rank gives its count");
  Check(std::accumulate(counts.begin(), counts.end(), size_t{0}) == out.size(),
        "AllGather: the counts fill the output");
  if (out.size() > static_cast<size_t>(std::numeric_limits<int>::max())) {
    // Beyond MPI's int offsets: rank by rank.
    size_t offset = 0;
    for (size_t r = 0; r < ranks; ++r) {
      const auto part = out.subspan(offset, counts[r]);
      if (r == me) std::copy(in.begin(), in.end(), part.begin());
      BroadcastBytes(std::as_writable_bytes(part), static_cast<int>(r), comm_);
      offset += counts[r];
    }
    return;
  }
  std::vector<int> int_counts(ranks), offsets(ranks);
  int offset = 0;
  for (size_t r = 0; r < ranks; ++r) {
    int_counts[r] = static_cast<int>(counts[r]);
    offsets[r] = offset;
    offset += int_counts[r];
  }
  MPI_Request request;
  CheckMpi(MPI_Iallgatherv(in.data(), int_counts[me], MPI_FLOAT, out.data(), int_counts.data(),
                           offsets.data(), MPI_FLOAT, comm_, &request),
           "MPI_Iallgatherv");
  WaitMpi(&request, "MPI_Iallgatherv");
}

void MpiCollectives::Broadcast(std::span<std::byte> host_data, int root) {
  Check(root >= 0 && root < size_, "Broadcast from a rank that exists");
  if (size_ > 1) BroadcastBytes(host_data, root, comm_);
}

}  // namespace passel::cluster
