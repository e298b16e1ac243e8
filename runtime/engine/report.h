#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "cluster/launch.h"
#include "runtime/base/ids.h"

namespace passel::engine {

struct HostStats {
  RankId rank;
  uint64_t kv_bytes = 0, table_bytes = 0;  // at their highest
};

// What a run tells of itself: the run directory (DESIGN: interfaces) and the progress line.
class Report {
 public:
  // An empty directory name writes no files. Throws Error{kIo} where it cannot be written.
  Report(const std::string& directory, const std::vector<cluster::RankInfo>& ranks, bool progress);

  // The clock of every figure starts: the first request is about to be read.
  void Start();
  void Event(const char* event, int rank, RequestId request);
  void Generated(uint64_t tokens) { generated_ += tokens; }
  void Sampled(uint64_t attended, uint64_t offloaded) {
    attended_ += attended;
    offloaded_ += offloaded;
  }
  void RequestDone(bool ok) { ++(ok ? ok_ : failed_); }
  void Host(const HostStats& stats) { hosts_.push_back(stats); }
  // Prints a line every five seconds (twice a second on a terminal).
  // `running` requests have begun or are next, and are done but for `running` − `partly` of them;
  // `remaining` have not been read.
  void Progress(uint64_t running, double partly, std::optional<uint64_t> remaining);
  // Writes summary.json and prints the totals.
  void Finish(int exit_code);

  uint64_t ok() const { return ok_; }
  uint64_t failed() const { return failed_; }
  double sampled_fraction() const;
  double tokens_per_second() const;
  const std::vector<HostStats>& hosts() const { return hosts_; }

 private:
  double Seconds() const;

  std::string directory_;
  bool progress_;
  bool terminal_;
  std::ofstream events_;
  std::chrono::steady_clock::time_point start_, printed_;
  uint64_t generated_ = 0, attended_ = 0, offloaded_ = 0, ok_ = 0, failed_ = 0;
  std::vector<HostStats> hosts_;
};

}  // namespace passel::engine
