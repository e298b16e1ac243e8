#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/e2e/run_passel.h"

// A rank dies or hangs in the middle of a run: the job ends in time, what was finished stays.
namespace passel::e2e {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr double kFailureTimeout = 4;
constexpr double kSlack = 20;  // for mpirun to end the ranks, on a busy machine

// /proc/PID/stat says whether it runs, and not as a zombie.
bool Alive(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  if (!std::getline(stat, text)) return false;
  const size_t name_end = text.rfind(')');
  return name_end != std::string::npos && name_end + 2 < text.size() && text[name_end + 2] != 'Z';
}

std::vector<json> Lines(const std::string& path) {
  std::vector<json> out;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line) && !file.eof();) {
    out.push_back(json::parse(line, nullptr, false));
  }
  return out;
}

class LostRank : public testing::Test {
 protected:
  // Runs a job of 3 ranks, sends `signal` to rank `rank` once the short requests are done and a
  // long one decodes, and checks what holds in every case.
  void RunAndHit(int rank, int signal) {
    if (!TestModel()) GTEST_SKIP() << "no test model: tools/setup.sh fetches it";
    Job job;
    job.hosts = 2;
    job.settings = {"cluster.failure_timeout_s=" + std::to_string(kFailureTimeout),
                    "engine.max_batch=2"};
    std::string words;
    for (int i = 0; i < 400; ++i) words += "word ";
    job.requests = {
        {{"custom_id", "first"}, {"prompt", "Hi"}, {"max_tokens", 2}},
        {{"custom_id", "second"}, {"prompt", "Hello"}, {"max_tokens", 2}},
        {{"custom_id", "long"}, {"prompt", words}, {"max_tokens", 7000}, {"ignore_eos", true}}};
    job.timeout = seconds(90);
    JobResult result;
    std::thread runner([&] { result = RunJob(directory_, job); });
    const std::string output = directory_.File("run.jsonl");
    const auto end = Clock::now() + seconds(60);
    const auto decoding = [&] {
      int starts = 0;
      for (const json& e : Lines(directory_.File("run/events.jsonl"))) {
        starts += e.is_object() && e.value("event", "") == "decode_start";
      }
      return starts == 3 && Lines(output).size() == 2;
    };
    bool reached = false;
    while (!(reached = decoding()) && Clock::now() < end) {
      std::this_thread::sleep_for(milliseconds(20));
    }
    std::vector<pid_t> pids;
    Clock::time_point hit;
    if (reached) {
      std::this_thread::sleep_for(milliseconds(300));  // into the decoding
      for (const json& r : json::parse(ReadFile(directory_.File("run/ranks.json")))) {
        pids.push_back(r["pid"].get<pid_t>());
      }
      hit = Clock::now();
      EXPECT_EQ(kill(pids.at(static_cast<size_t>(rank)), signal), 0);
    }
    // What counts is the end of the ranks: mpirun itself may stumble over a rank that was stopped.
    const auto left = [&] { return std::any_of(pids.begin(), pids.end(), Alive); };
    const auto in_time = hit + std::chrono::duration<double>(kFailureTimeout + kSlack);
    while (left() && Clock::now() < in_time) std::this_thread::sleep_for(milliseconds(20));
    took_ = std::chrono::duration<double>(Clock::now() - hit).count();
    EXPECT_FALSE(left()) << "a rank is left";
    runner.join();
    ASSERT_TRUE(reached) << result.process.err;
    err_ = result.process.err;
    exit_code_ = result.process.exit_code;

    EXPECT_NE(exit_code_, 0);
    ASSERT_EQ(result.lines.size(), 2u);
    EXPECT_EQ(result.Usage("first")["completion_tokens"], 2);
    EXPECT_EQ(result.Usage("second")["completion_tokens"], 2);
  }
  int Errors() const {
    int n = 0;
    for (size_t at = 0; (at = err_.find("passel: error:", at)) != std::string::npos; ++at) ++n;
    return n;
  }

  TempDirectory directory_;
  double took_ = 0;
  int exit_code_ = 0;
  std::string err_;
};

TEST_F(LostRank, AHostThatIsKilledEndsTheJob) {
  RunAndHit(1, SIGKILL);
  // mpirun may end the other ranks before they have noticed.
  EXPECT_LE(Errors(), 1) << err_;
}

TEST_F(LostRank, AHostThatHangsIsNamedInOneMessage) {
  RunAndHit(2, SIGSTOP);
  if (IsSkipped() || HasFatalFailure()) return;
  EXPECT_NE(err_.find("Exit code:    5"), std::string::npos) << err_;
  EXPECT_EQ(Errors(), 1) << err_;
  EXPECT_NE(err_.find("host rank 2 on "), std::string::npos) << err_;
  EXPECT_GE(took_, kFailureTimeout - 1);
}

TEST_F(LostRank, AModelRankThatIsKilledEndsTheHosts) {
  RunAndHit(0, SIGKILL);
  EXPECT_LE(Errors(), 1) << err_;  // what a host says, if mpirun lets it
}

}  // namespace
}  // namespace passel::e2e
