#include "runtime/engine/report.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"

namespace passel::engine {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

void WriteFile(const std::string& path, const json& content) {
  std::ofstream file(path + ".new", std::ios::trunc);
  file << content.dump(1) << '\n';
  file.close();
  std::error_code error;
  std::filesystem::rename(path + ".new", path, error);
  if (!file || error) {
    throw Error(ErrorClass::kIo,
                "run directory: " + path + " cannot be written: " + std::strerror(errno));
  }
}

}  // namespace

Report::Report(const std::string& directory, const std::vector<cluster::RankInfo>& ranks,
               bool progress)
    : directory_(directory),
      progress_(progress),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(Clock::now()),
      printed_(start_) {
  if (directory_.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  if (error) {
    throw Error(ErrorClass::kIo,
                "run directory " + directory_ + ": cannot be made: " + error.message());
  }
  json list = json::array();
  for (const auto& r : ranks) {
    list.push_back({{"rank", r.rank.value},
                    {"role", r.role == cluster::Role::kModel ? "model" : "host"},
                    {"node", r.node},
                    {"pid", r.pid}});
  }
  WriteFile(directory_ + "/ranks.json", list);
  events_.open(directory_ + "/events.jsonl", std::ios::app);
  if (!events_) {
    throw Error(ErrorClass::kIo,
                "run directory " + directory_ + ": events.jsonl cannot be written");
  }
}

void Report::Start() { start_ = printed_ = Clock::now(); }

double Report::Seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Report::Event(const char* event, int rank, RequestId request) {
  if (!events_.is_open()) return;
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  events_ << json{{"t", now}, {"event", event}, {"rank", rank}, {"request", request.value}}.dump()
          << std::endl;
}

double Report::sampled_fraction() const {
  return offloaded_ == 0 ? 1.0 : static_cast<double>(attended_) / static_cast<double>(offloaded_);
}

double Report::tokens_per_second() const {
  const double seconds = Seconds();
  return seconds > 0 ? static_cast<double>(generated_) / seconds : 0;
}

void Report::Progress(uint64_t running, double partly, std::optional<uint64_t> remaining) {
  if (!progress_) return;
  const auto now = Clock::now();
  if (now - printed_ < std::chrono::milliseconds(terminal_ ? 500 : 5000)) return;
  printed_ = now;
  std::string eta = "?";
  const uint64_t done = ok_ + failed_;
  const double requests = static_cast<double>(done) + partly;
  if (remaining && requests > 0) {
    const double left = static_cast<double>(*remaining + running) - partly;
    eta = fmt::format("{:.0f} s", left * Seconds() / requests);
  }
  fmt::print(stderr, "{}{} done, {} running, {} tokens, {:.1f} tokens/s, ETA {}{}",
             terminal_ ? "\r\033[K" : "", done, running, generated_, tokens_per_second(), eta,
             terminal_ ? "" : "\n");
  std::fflush(stderr);
}

void Report::Finish(int exit_code) {
  if (progress_) {
    fmt::print(stderr,
               "{}{} requests done, {} failed, {} tokens in {:.1f} s: {:.1f} tokens/s, sampled "
               "fraction {:.4f}\n",
               terminal_ ? "\r\033[K" : "", ok_, failed_, generated_, Seconds(),
               tokens_per_second(), sampled_fraction());
  }
  if (directory_.empty()) return;
  json hosts = json::array();
  for (const HostStats& h : hosts_) {
    hosts.push_back(
        {{"rank", h.rank.value}, {"kv_bytes", h.kv_bytes}, {"table_bytes", h.table_bytes}});
  }
  WriteFile(directory_ + "/summary.json", {{"exit_code", exit_code},
                                           {"requests_ok", ok_},
                                           {"requests_failed", failed_},
                                           {"tokens_per_second", tokens_per_second()},
                                           {"sampled_fraction", sampled_fraction()},
                                           {"hosts", hosts},
                                           {"recoveries", json::array()}});
}

}  // namespace passel::engine
