#pragma once

#include <fstream>
#include <optional>
#include <string>
#include <unordered_set>

#include "runtime/engine/request.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel::engine {

struct RequestDefaults {
  uint64_t seed = 1;           // of the config
  int64_t context_length = 0;  // of the model
};

// Turns one input line (DESIGN: interfaces) into a Request. Never throws: whatever is wrong with
// the line becomes Request::error, naming the field and what was expected. `line`: 1, 2, …
Request ParseRequest(const std::string& text, uint64_t line, const Tokenizer& tokenizer,
                     const RequestDefaults& defaults);

// The output line of a result or an error, without the newline.
std::string FormatResult(const Request& request, const Result& result, const Tokenizer& tokenizer);
std::string FormatError(const Request& request, int status, const std::string& message);

// Requests of a JSONL file, read as they are asked for. Blank lines are skipped; a custom_id that
// came before is that request's error; those in `done` (by custom_id, or DuplicateError) are left
// out.
class JsonlSource : public RequestSource {
 public:
  // Throws Error{kIo} where the file cannot be read.
  JsonlSource(const std::string& path, const Tokenizer& tokenizer, RequestDefaults defaults,
              std::unordered_set<std::string> done);
  std::optional<Request> Next() override;
  bool exhausted() const override { return exhausted_; }
  std::optional<uint64_t> remaining() const override;

 private:
  std::string path_;
  std::ifstream file_;
  const Tokenizer& tokenizer_;
  RequestDefaults defaults_;
  std::unordered_set<std::string> done_;
  std::string run_;  // names this run among those of one output
  std::unordered_set<std::string> seen_;
  bool exhausted_ = false;
  uint64_t line_ = 0;
  uint64_t lines_total_ = 0;
};

// The error of a custom_id that came before. It is also what a resumed run knows that error by: the
// custom_id alone stands for the request that had it first.
std::string DuplicateError(uint64_t line, const std::string& custom_id);

// Results appended to a JSONL file, each flushed to disk before Done returns. The other sinks'
// results are never rewritten.
class JsonlSink : public ResultSink {
 public:
  // Opens `path`. A file with results in it is an error unless `resume`; then a torn last line is
  // cut off and `done` receives what JsonlSource is to leave out. Throws Error{kIo} naming the
  // path.
  JsonlSink(const std::string& path, bool resume, const Tokenizer& tokenizer,
            std::unordered_set<std::string>* done);
  ~JsonlSink() override;
  JsonlSink(const JsonlSink&) = delete;
  JsonlSink& operator=(const JsonlSink&) = delete;

  void Started() override { keep_ = true; }
  void Done(const Request& request, const Result& result) override;
  void Failed(const Request& request, int status, const std::string& message) override;

 private:
  void Append(std::string line);

  std::string path_;
  int fd_ = -1;
  bool keep_ = true;  // false: made by us, and nothing has come of the job yet
  const Tokenizer& tokenizer_;
};

// Throws Error{kIo} where input and output are the same file.
void CheckDistinct(const std::string& input, const std::string& output);

}  // namespace passel::engine
