#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime/base/ids.h"

namespace passel::engine {

// How the next token is chosen. temperature 0 is greedy.
struct SamplingParams {
  double temperature = 1.0;
  double top_p = 1.0;
  uint64_t seed = 0;
  int32_t top_logprobs = -1;  // −1: no log-probabilities; n ≥ 0: of the chosen token and the n best
};

// One line of the input, checked. `error` set: the request is answered with it and never runs.
struct Request {
  RequestId id;
  std::string request_id;  // as the output names it: of this run alone
  std::string custom_id;
  bool chat = false;
  std::vector<int32_t> prompt;
  int64_t max_tokens = 0;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool return_token_ids = false;
  std::optional<std::string> error;
};

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;
};
// Log-probabilities at one generated position: the chosen token first, then the best, falling.
using PositionLogprobs = std::vector<TokenLogprob>;

enum class FinishReason : uint8_t { kStop, kLength };

// What became of a request.
struct Result {
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<PositionLogprobs> logprobs;
  FinishReason finish = FinishReason::kLength;
  // Offloaded tokens attended ÷ offloaded tokens, over sampled queries; 1 where none was sampled.
  double sampled_fraction = 1.0;
  double ttft_s = 0;    // time to first token, from admission
  double decode_s = 0;  // from the first token to the last
};

// Where requests come from (in order) and where their results go.
class RequestSource {
 public:
  virtual ~RequestSource() = default;
  // nullopt: none now; none ever again where exhausted().
  virtual std::optional<Request> Next() = 0;
  virtual bool exhausted() const = 0;
  // Requests still to come, where known, for the ETA.
  virtual std::optional<uint64_t> remaining() const = 0;
};
class ResultSink {
 public:
  virtual ~ResultSink() = default;
  // The job is set up: results may come. A sink that goes before leaves nothing behind.
  virtual void Started() {}
  virtual void Done(const Request& request, const Result& result) = 0;
  // HTTP-like status: 400 for what the request got wrong, 507 for what does not fit.
  virtual void Failed(const Request& request, int status, const std::string& message) = 0;
};

}  // namespace passel::engine
