#pragma once

#include <chrono>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

// Runs the real binary, under mpirun or alone, and reads what it left behind.
namespace passel::e2e {

// A directory of its own under the system's temporary one, removed with all it holds.
class TempDirectory {
 public:
  TempDirectory();
  ~TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // The path of `name` inside.
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// Reads a whole file; fails the test and returns "" where it cannot be read.
std::string ReadFile(const std::string& path);
void WriteFile(const std::string& path, const std::string& content);

// The test model's path: $PASSEL_TEST_MODEL, else where tools/setup.sh puts it. nullopt where
// there is no such file: tests that need it are skipped by name.
std::optional<std::string> TestModel();

struct ProcessResult {
  int exit_code = -1;  // −1 where a signal ended it
  int signal = 0;
  bool timed_out = false;
  double seconds = 0;
  std::string out;
  std::string err;
};

// Runs a command to its end, stdin empty. After `timeout` it is terminated (SIGTERM to its process
// group, so that mpirun ends its ranks, then SIGKILL) and timed_out is set. `terminal`: its stderr
// is one.
ProcessResult RunProcess(const std::vector<std::string>& command, std::chrono::seconds timeout,
                         bool terminal = false);

// Ranks that get the same arguments; more than one part is mpirun's MPMD form.
struct Part {
  int ranks = 1;
  std::vector<std::string> args;  // of passel: "run", "--config", …
};

// The command that runs `passel` with these arguments: under mpirun, or alone for one part of 0
// ranks. Works as root, on any number of cores, and on shared memory alone.
std::vector<std::string> PasselCommand(const std::vector<Part>& parts);

// One `passel run`. File names are relative to `directory`.
struct Job {
  std::vector<nlohmann::json> requests;  // a line each; none: input.jsonl is as it is
  std::vector<std::string> settings;     // "attention.k=8", on top of configs/local.textproto
  int model_ranks = 1;
  int hosts = 0;          // 0 with one model rank: no mpirun
  bool mpmd = false;      // roles by --role instead of by number
  bool terminal = false;  // stderr is one
  std::vector<std::string> extra_args;
  std::string name = "run";  // output is <name>.jsonl, the run directory <name>
  std::chrono::seconds timeout{180};
};

struct JobResult {
  ProcessResult process;
  // Lines of the output, whole and valid JSON, in the order written.
  std::vector<nlohmann::json> lines;
  std::map<std::string, nlohmann::json> by_id;
  nlohmann::json summary;  // null where there is none

  // The first choice of a request that succeeded; fails the test and returns null otherwise.
  nlohmann::json Choice(const std::string& custom_id) const;
  nlohmann::json Usage(const std::string& custom_id) const;
};

// Writes the input, runs the job with the test model (where there is one; a later setting of
// model.path wins) and reads the output. Judges nothing.
JobResult RunJob(const TempDirectory& directory, const Job& job);

// RunJob, and fails the test with the process's stderr where its exit code is not 0.
JobResult RunJobOk(const TempDirectory& directory, const Job& job);

}  // namespace passel::e2e
