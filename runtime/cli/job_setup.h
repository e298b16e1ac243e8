#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cluster/launch.h"
#include "runtime/engine/job.h"
#include "runtime/engine/report.h"
#include "runtime/engine/request.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// What `run` and `bench` share on the command line.
struct JobOptions {
  std::string config_path;
  std::vector<std::string> overrides;
  std::string role;  // "", "model" or "host" (MPMD)
  std::string run_directory;
  bool dry_run = false;
  std::string usage_error;  // what is wrong with this rank's command line; ends the job
};

// What rank 0 serves: requests, where results go, and what to do when all are done. Made on rank 0
// alone, before weights are loaded, so that bad input is told at once.
struct Work {
  std::unique_ptr<engine::RequestSource> source;
  std::unique_ptr<engine::ResultSink> sink;
  std::function<void(const engine::Job&, const engine::Report&)> finished;
  bool progress = true;
};
using WorkMaker = std::function<Work(const engine::Job&, const Tokenizer&)>;

// Runs one job from MPI's start to its end, on every rank. Returns the process's exit code; errors
// are printed by one rank.
int RunJob(int* argc, char*** argv, const JobOptions& options, const WorkMaker& make_work);

}  // namespace passel
