#include "cluster/mpi_util.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "runtime/base/error.h"

namespace passel::cluster {

void CheckMpi(int code, const char* call, std::source_location where) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw Error(ErrorClass::kCluster,
              fmt::format("{} failed: {} ({}:{})", call, text, where.file_name(), where.line()));
}

void WaitMpi(MPI_Request* request, const char* call) {
  constexpr int kPolls = 200;
  constexpr int kYields = 2000;
  std::chrono::microseconds nap{20};
  for (int round = 0;; ++round) {
    int done = 0;
    CheckMpi(MPI_Test(request, &done, MPI_STATUS_IGNORE), call);
    if (done != 0) return;
    if (round < kPolls) continue;
    if (round < kPolls + kYields) {
      sched_yield();
      continue;
    }
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, std::chrono::microseconds{1000});
  }
}

void BroadcastBytes(std::span<std::byte> data, int root, MPI_Comm comm) {
  constexpr size_t kPiece = size_t{1} << 30;  // MPI counts are int
  for (size_t at = 0; at < data.size(); at += kPiece) {
    const int count = static_cast<int>(std::min(kPiece, data.size() - at));
    MPI_Request request;
    CheckMpi(MPI_Ibcast(data.data() + at, count, MPI_BYTE, root, comm, &request), "MPI_Ibcast");
    WaitMpi(&request, "MPI_Ibcast");
  }
}

}  // namespace passel::cluster
