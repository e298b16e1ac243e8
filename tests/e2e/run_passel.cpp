#include "tests/e2e/run_passel.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace passel::e2e {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

struct Pipe {
  int read = -1;
  int write = -1;
  // `terminal`: what is written goes to one, whose other end is read.
  explicit Pipe(bool terminal = false) {
    if (terminal) {
      read = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
      if (read < 0 || grantpt(read) != 0 || unlockpt(read) != 0) {
        throw std::runtime_error("no terminal is to be had");
      }
      write = open(ptsname(read), O_RDWR | O_NOCTTY | O_CLOEXEC);
      return;
    }
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) throw std::runtime_error("pipe2 failed");
    read = fds[0];
    write = fds[1];
  }
  ~Pipe() {
    close(read);
    CloseWrite();
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  void CloseWrite() {
    if (write >= 0) close(write);
    write = -1;
  }
};

// The test's environment, and what Open MPI needs to run as root.
std::vector<std::string> Environment() {
  std::vector<std::string> out;
  for (char** e = environ; *e; ++e) out.emplace_back(*e);
  out.emplace_back("OMPI_ALLOW_RUN_AS_ROOT=1");
  out.emplace_back("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1");
  return out;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (std::string& s : strings) out.push_back(s.data());
  out.push_back(nullptr);
  return out;
}

pid_t Spawn(std::vector<std::string> command, const Pipe& out, const Pipe& err) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, out.write, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, err.write, STDERR_FILENO);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  posix_spawnattr_setpgroup(&attributes, 0);
  std::vector<std::string> environment = Environment();
  pid_t pid = -1;
  const int code = posix_spawnp(&pid, command.front().c_str(), &actions, &attributes,
                                Pointers(command).data(), Pointers(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (code != 0) throw std::runtime_error(command.front() + ": cannot be started");
  return pid;
}

// Appends what there is to read. Returns false at the pipe's end.
bool Drain(int fd, std::string* into) {
  std::array<char, 4096> buffer;
  ssize_t n;
  while ((n = read(fd, buffer.data(), buffer.size())) > 0) {
    into->append(buffer.data(), static_cast<size_t>(n));
  }
  return n < 0;
}

}  // namespace

TempDirectory::TempDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "passel-e2e-XXXXXX").string();
  if (!mkdtemp(name.data())) throw std::runtime_error(name + ": cannot be made");
  path_ = name;
}

TempDirectory::~TempDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path << " cannot be read";
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
  file.close();
  ASSERT_TRUE(file) << path << " cannot be written";
}

std::optional<std::string> TestModel() {
  const char* named = std::getenv("PASSEL_TEST_MODEL");
  std::string path =
      named ? named : PASSEL_SOURCE_DIR "/.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return std::nullopt;
  return path;
}

ProcessResult RunProcess(const std::vector<std::string>& command, std::chrono::seconds timeout,
                         bool terminal) {
  ProcessResult result;
  Pipe out, err(terminal);
  const auto start = Clock::now();
  const pid_t pid = Spawn(command, out, err);
  out.CloseWrite();
  err.CloseWrite();
  for (const Pipe* p : {&out, &err}) fcntl(p->read, F_SETFL, O_NONBLOCK);

  // SIGTERM, five seconds to obey, SIGKILL.
  auto deadline = start + timeout;
  int status = 0;
  std::array<pollfd, 2> fds{pollfd{out.read, POLLIN, 0}, pollfd{err.read, POLLIN, 0}};
  while (true) {
    poll(fds.data(), fds.size(), 20);
    // poll skips negative descriptors: an ended pipe would wake it at once, always.
    if (!Drain(out.read, &result.out)) fds[0].fd = -1;
    if (!Drain(err.read, &result.err)) fds[1].fd = -1;
    if (waitpid(pid, &status, WNOHANG) == pid) break;
    if (Clock::now() < deadline) continue;
    kill(-pid, result.timed_out ? SIGKILL : SIGTERM);
    result.timed_out = true;
    deadline = Clock::now() + std::chrono::seconds(5);
  }
  Drain(out.read, &result.out);
  Drain(err.read, &result.err);
  result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
  return result;
}

std::vector<std::string> PasselCommand(const std::vector<Part>& parts) {
  std::vector<std::string> command;
  const bool alone = parts.size() == 1 && parts.front().ranks == 0;
  if (!alone) {
    command = {PASSEL_MPIEXEC,
               "--oversubscribe",
               "--bind-to",
               "none",
               "--mca",
               "pml",
               "ob1",
               "--mca",
               "btl",
               "self,vader",
               "--mca",
               "mpi_yield_when_idle",
               "1"};
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) command.emplace_back(":");
    if (!alone) {
      command.emplace_back("-np");
      command.push_back(std::to_string(parts[i].ranks));
    }
    command.emplace_back(PASSEL_BINARY);
    command.insert(command.end(), parts[i].args.begin(), parts[i].args.end());
  }
  return command;
}

json JobResult::Choice(const std::string& custom_id) const {
  const auto it = by_id.find(custom_id);
  if (it == by_id.end() || !it->second["error"].is_null()) {
    ADD_FAILURE() << custom_id << ": no result" << (it == by_id.end() ? "" : it->second.dump());
    return nullptr;
  }
  return it->second["response"]["body"]["choices"][0];
}

json JobResult::Usage(const std::string& custom_id) const {
  const auto it = by_id.find(custom_id);
  if (it == by_id.end() || !it->second["error"].is_null()) {
    ADD_FAILURE() << custom_id << ": no result";
    return nullptr;
  }
  return it->second["response"]["body"]["usage"];
}

JobResult RunJob(const TempDirectory& directory, const Job& job) {
  const std::string input = directory.File("input.jsonl");
  const std::string output = directory.File(job.name + ".jsonl");
  const std::string run_directory = directory.File(job.name);
  if (!job.requests.empty()) {
    std::string text;
    for (const json& request : job.requests) text += request.dump() + "\n";
    WriteFile(input, text);
  }
  std::vector<std::string> args = {"run", "--config", PASSEL_SOURCE_DIR "/configs/local.textproto",
                                   "--set",
                                   "cluster.model_ranks=" + std::to_string(job.model_ranks)};
  if (const auto model = TestModel()) {
    args.insert(args.end(), {"--set", "model.path=" + *model});
  }
  for (const std::string& setting : job.settings) args.insert(args.end(), {"--set", setting});
  args.insert(args.end(), {"-i", input, "-o", output, "--run-dir", run_directory});
  args.insert(args.end(), job.extra_args.begin(), job.extra_args.end());

  std::vector<Part> parts;
  if (job.mpmd) {
    parts = {{job.model_ranks, args}, {job.hosts, args}};
    parts[0].args.insert(parts[0].args.end(), {"--role", "model"});
    parts[1].args.insert(parts[1].args.end(), {"--role", "host"});
  } else {
    const int ranks = job.model_ranks + job.hosts;
    parts = {{ranks == 1 ? 0 : ranks, args}};
  }
  JobResult result;
  result.process = RunProcess(PasselCommand(parts), job.timeout, job.terminal);
  std::ifstream lines(output, std::ios::binary);
  for (std::string line; std::getline(lines, line) && !lines.eof();) {
    json parsed = json::parse(line, nullptr, false);
    if (parsed.is_discarded() || !parsed.contains("custom_id")) continue;
    result.by_id[parsed["custom_id"].get<std::string>()] = parsed;
    result.lines.push_back(std::move(parsed));
  }
  if (std::ifstream summary(run_directory + "/summary.json"); summary) {
    result.summary = json::parse(summary, nullptr, false);
  }
  return result;
}

JobResult RunJobOk(const TempDirectory& directory, const Job& job) {
  JobResult result = RunJob(directory, job);
  EXPECT_EQ(result.process.exit_code, 0)
      << job.name << (result.process.timed_out ? " ran out of time" : "") << "\n"
      << result.process.err;
  return result;
}

}  // namespace passel::e2e
