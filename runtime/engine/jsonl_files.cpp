#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/engine/request_io.h"

namespace passel::engine {
namespace {

std::string Reason() { return std::strerror(errno); }

bool Blank(const std::string& line) { return line.find_first_not_of(" \t\r") == std::string::npos; }

constexpr const char* kUsedBefore = " was used before; expected a different one for each request";

// The message of an error line, "" for a result.
std::string ErrorMessage(const nlohmann::json& line) {
  const auto error = line.find("error");
  if (error == line.end() || !error->is_object()) return "";
  const auto message = error->find("message");
  return message == error->end() || !message->is_string() ? "" : message->get<std::string>();
}

// What is done, by the whole lines of an output file; `end` is the offset behind the last one.
std::unordered_set<std::string> ReadDone(const std::string& path, uint64_t* end) {
  std::unordered_set<std::string> done;
  std::ifstream file(path, std::ios::binary);
  std::string line;
  *end = 0;
  for (uint64_t number = 1; std::getline(file, line); ++number) {
    if (file.eof()) break;  // no newline: torn
    const auto j = nlohmann::json::parse(line, nullptr, false);
    if (j.is_discarded() || !j.is_object() || !j.contains("custom_id") ||
        !j["custom_id"].is_string()) {
      throw Error(ErrorClass::kIo, path + ":" + std::to_string(number) +
                                       ": not a result of ours; expected the output of the run to "
                                       "resume");
    }
    const auto id = j["custom_id"].get<std::string>();
    const std::string message = ErrorMessage(j);
    done.insert(message.ends_with(kUsedBefore) ? message : id);
    *end += line.size() + 1;
  }
  return done;
}

}  // namespace

std::string DuplicateError(uint64_t line, const std::string& custom_id) {
  return "line " + std::to_string(line) + ": custom_id \"" + Printable(custom_id) + "\"" +
         kUsedBefore;
}

JsonlSource::JsonlSource(const std::string& path, const Tokenizer& tokenizer,
                         RequestDefaults defaults, std::unordered_set<std::string> done)
    : path_(path),
      tokenizer_(tokenizer),
      defaults_(defaults),
      done_(std::move(done)),
      run_(fmt::format("{:08x}", std::random_device{}())) {
  std::error_code ignored;
  file_.open(path, std::ios::binary);
  if (!file_ || std::filesystem::is_directory(path, ignored)) {
    throw Error(ErrorClass::kIo, "input " + path + ": cannot be read: " + Reason());
  }
  std::string line;
  while (std::getline(file_, line)) lines_total_ += !Blank(line);
  file_.clear();
  file_.seekg(0);
}

std::optional<Request> JsonlSource::Next() {
  std::string text;
  while (std::getline(file_, text)) {
    ++line_;
    if (Blank(text)) continue;
    --lines_total_;
    Request r = ParseRequest(text, line_, tokenizer_, defaults_);
    r.request_id = run_ + "-" + std::to_string(line_);
    if (!seen_.insert(r.custom_id).second) {
      r.error = DuplicateError(line_, r.custom_id);
      if (done_.contains(*r.error)) continue;
    } else if (done_.contains(r.custom_id)) {
      continue;
    }
    return r;
  }
  if (file_.bad()) throw Error(ErrorClass::kIo, "input " + path_ + ": reading failed: " + Reason());
  exhausted_ = true;
  return std::nullopt;
}

std::optional<uint64_t> JsonlSource::remaining() const { return lines_total_; }

JsonlSink::JsonlSink(const std::string& path, bool resume, const Tokenizer& tokenizer,
                     std::unordered_set<std::string>* done)
    : path_(path), tokenizer_(tokenizer) {
  constexpr int kFlags = O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC;
  fd_ = open(path.c_str(), kFlags | O_EXCL, 0644);
  keep_ = fd_ < 0;
  if (fd_ < 0 && errno == EEXIST) fd_ = open(path.c_str(), kFlags, 0644);
  if (fd_ < 0) {
    throw Error(ErrorClass::kIo, "output " + path + ": cannot be written: " + Reason());
  }
  struct stat status {};
  if (fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(fd_);
    throw Error(ErrorClass::kIo, "output " + path + ": expected a regular file");
  }
  if (status.st_size == 0) return;
  if (!resume) {
    close(fd_);
    throw Error(ErrorClass::kIo, "output " + path +
                                     ": has results already; expected --resume, or a path that "
                                     "does not exist");
  }
  try {
    uint64_t end = 0;
    *done = ReadDone(path, &end);
    if (end != static_cast<uint64_t>(status.st_size) && ftruncate(fd_, static_cast<off_t>(end))) {
      throw Error(ErrorClass::kIo, "output " + path + ": cannot be repaired: " + Reason());
    }
  } catch (...) {
    close(fd_);
    throw;
  }
}

JsonlSink::~JsonlSink() {
  if (!keep_) unlink(path_.c_str());
  close(fd_);
}

void JsonlSink::Append(std::string line) {
  keep_ = true;
  line += '\n';
  size_t written = 0;
  while (written < line.size()) {
    const ssize_t n = write(fd_, line.data() + written, line.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error(ErrorClass::kIo, "output " + path_ + ": writing failed: " + Reason());
    written += static_cast<size_t>(n);
  }
  if (fsync(fd_) != 0 && errno != EINVAL) {
    throw Error(ErrorClass::kIo, "output " + path_ + ": fsync failed: " + Reason());
  }
}

void JsonlSink::Done(const Request& request, const Result& result) {
  Append(FormatResult(request, result, tokenizer_));
}

void JsonlSink::Failed(const Request& request, int status, const std::string& message) {
  Append(FormatError(request, status, message));
}

void CheckDistinct(const std::string& input, const std::string& output) {
  std::error_code error;
  if (std::filesystem::equivalent(input, output, error) && !error) {
    throw Error(ErrorClass::kIo, "output " + output + ": is the input file; expected another path");
  }
}

}  // namespace passel::engine
