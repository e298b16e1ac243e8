#include "runtime/engine/request_io.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::engine {
namespace {

using nlohmann::json;

// Wrong input of one request; becomes its error line.
struct BadRequest {
  std::string message;
};
[[noreturn]] void Bad(const std::string& field, const std::string& expected) {
  throw BadRequest{field + ": expected " + expected};
}

const json* Find(const json& body, const char* key) {
  const auto it = body.find(key);
  return it == body.end() || it->is_null() ? nullptr : &*it;
}

double Number(const json& body, const char* key, double fallback, double low, double high,
              const std::string& expected) {
  const json* v = Find(body, key);
  if (!v) return fallback;
  if (!v->is_number()) Bad(key, expected);
  const double x = v->get<double>();
  if (!(x >= low && x <= high)) Bad(key, expected);
  return x;
}

bool Flag(const json& body, const char* key) {
  const json* v = Find(body, key);
  if (!v) return false;
  if (!v->is_boolean()) Bad(key, "true or false");
  return v->get<bool>();
}

std::optional<int64_t> Count(const json& body, const char* key, int64_t low) {
  const json* v = Find(body, key);
  if (!v) return std::nullopt;
  const std::string expected = "a whole number from " + std::to_string(low) + " to 2^40";
  if (!v->is_number_integer()) Bad(key, expected);
  if (v->is_number_unsigned() && v->get<uint64_t>() > (uint64_t{1} << 40)) Bad(key, expected);
  if (v->get<int64_t>() < low) Bad(key, expected);
  return v->get<int64_t>();
}

std::vector<int32_t> Embeddable(const char* field, std::vector<int32_t> ids,
                                const Tokenizer& tokenizer) {
  for (const int32_t id : ids) {
    if (id < tokenizer.vocab_size()) continue;
    Bad(field, "no \"" + tokenizer.TokenBytes(id, true) + "\": its token id, " +
                   std::to_string(id) + ", is not below the model's " +
                   std::to_string(tokenizer.vocab_size()));
  }
  return ids;
}

std::vector<int32_t> PromptTokens(const json& body, const Tokenizer& tokenizer, bool* chat) {
  const json* prompt = Find(body, "prompt");
  const json* messages = Find(body, "messages");
  if ((prompt != nullptr) == (messages != nullptr)) {
    throw BadRequest{"body: expected either prompt or messages"};
  }
  *chat = messages != nullptr;
  if (prompt) {
    if (prompt->is_string()) {
      return Embeddable("prompt", tokenizer.Encode(prompt->get<std::string>(), true), tokenizer);
    }
    if (!prompt->is_array()) Bad("prompt", "a string or an array of token ids");
    std::vector<int32_t> ids;
    ids.reserve(prompt->size());
    for (const json& id : *prompt) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
          id.get<int64_t>() >= tokenizer.vocab_size()) {
        Bad("prompt[" + std::to_string(ids.size()) + "]",
            "a token id below " + std::to_string(tokenizer.vocab_size()));
      }
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }
  if (!messages->is_array() || messages->empty()) Bad("messages", "a non-empty array");
  std::vector<ChatMessage> list;
  for (const json& m : *messages) {
    const std::string at = "messages[" + std::to_string(list.size()) + "]";
    if (!m.is_object()) Bad(at, "an object");
    const json* role = Find(m, "role");
    const json* content = Find(m, "content");
    if (!role || !role->is_string()) Bad(at + ".role", "a string");
    if (!content || !content->is_string()) Bad(at + ".content", "a string");
    list.push_back({role->get<std::string>(), content->get<std::string>()});
  }
  return Embeddable("messages", tokenizer.EncodeMessages(list), tokenizer);
}

std::vector<std::string> StopStrings(const json& body) {
  const json* stop = Find(body, "stop");
  std::vector<std::string> out;
  if (!stop) return out;
  if (stop->is_string()) {
    out.push_back(stop->get<std::string>());
  } else if (stop->is_array()) {
    for (const json& s : *stop) {
      if (!s.is_string()) Bad("stop", "a string or an array of strings");
      out.push_back(s.get<std::string>());
    }
  } else {
    Bad("stop", "a string or an array of strings");
  }
  if (std::any_of(out.begin(), out.end(), [](const std::string& s) { return s.empty(); })) {
    Bad("stop", "strings that are not empty");
  }
  return out;
}

int32_t TopLogprobs(const json& body, bool chat) {
  const json* logprobs = Find(body, "logprobs");
  if (!logprobs) return -1;
  if (chat) {
    if (!Flag(body, "logprobs")) return -1;
    const auto top = Count(body, "top_logprobs", 0).value_or(0);
    if (top > 20) Bad("top_logprobs", "at most 20");
    return static_cast<int32_t>(top);
  }
  const auto top = Count(body, "logprobs", 0);
  if (*top > 20) Bad("logprobs", "at most 20");
  return static_cast<int32_t>(*top);
}

void FillBody(const json& body, const Tokenizer& tokenizer, const RequestDefaults& defaults,
              Request* r) {
  r->stop = StopStrings(body);
  r->sampling.temperature = Number(body, "temperature", 1.0, 0.0, 100.0, "a number from 0 to 100");
  r->sampling.top_p = Number(body, "top_p", 1.0, 1e-9, 1.0, "a number above 0, at most 1");
  if (const json* seed = Find(body, "seed")) {
    if (!seed->is_number_integer()) Bad("seed", "a whole number of 64 bits");
    r->sampling.seed = seed->get<uint64_t>();
  } else {
    r->sampling.seed = HashBytes(r->custom_id.data(), r->custom_id.size(),
                                 HashBytes(&defaults.seed, sizeof defaults.seed));
  }
  if (const auto n = Count(body, "n", 1); n && *n != 1) Bad("n", "1");
  r->ignore_eos = Flag(body, "ignore_eos");
  r->return_token_ids = Flag(body, "return_token_ids");
  auto max_tokens = Count(body, "max_tokens", 1);
  if (const auto other = Count(body, "max_completion_tokens", 1)) max_tokens = other;
  r->prompt = PromptTokens(body, tokenizer, &r->chat);
  r->sampling.top_logprobs = TopLogprobs(body, r->chat);
  if (r->prompt.empty()) Bad("prompt", "at least one token");

  const auto prompt = static_cast<int64_t>(r->prompt.size());
  const int64_t room = defaults.context_length - prompt;
  // OpenAI's defaults: 16 tokens for completions, what is left of the context for chats.
  r->max_tokens = max_tokens.value_or(r->chat ? std::max<int64_t>(room, 1) : 16);
  if (r->max_tokens > room) {
    throw BadRequest{"the prompt has " + std::to_string(prompt) + " tokens and max_tokens is " +
                     std::to_string(r->max_tokens) + ": expected a sum of at most " +
                     std::to_string(defaults.context_length) + ", the model's context"};
  }
}

json Envelope(const Request& request, const json& response, const json& error) {
  return {{"id", "passel-" + request.request_id},
          {"custom_id", request.custom_id},
          {"response", response},
          {"error", error}};
}

json LogprobsJson(const Result& result, const Tokenizer& tokenizer) {
  json content = json::array();
  for (const PositionLogprobs& position : result.logprobs) {
    auto one = [&](const TokenLogprob& t) {
      return json{
          {"token", tokenizer.TokenBytes(t.id, true)}, {"id", t.id}, {"logprob", t.logprob}};
    };
    json entry = one(position.front());
    entry["top_logprobs"] = json::array();
    for (size_t i = 1; i < position.size(); ++i) entry["top_logprobs"].push_back(one(position[i]));
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}};
}

}  // namespace

Request ParseRequest(const std::string& text, uint64_t line, const Tokenizer& tokenizer,
                     const RequestDefaults& defaults) {
  Request r;
  r.custom_id = "line-" + std::to_string(line);
  try {
    const json j = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (j.is_discarded() || !j.is_object()) throw BadRequest{"expected one JSON object a line"};
    if (const json* id = Find(j, "custom_id")) {
      if (!id->is_string() || id->get<std::string>().empty()) {
        Bad("custom_id", "a non-empty string");
      }
      r.custom_id = id->get<std::string>();
    }
    if (const json* method = Find(j, "method"); method && *method != "POST") {
      Bad("method", "POST");
    }
    if (const json* url = Find(j, "url");
        url && *url != "/v1/completions" && *url != "/v1/chat/completions") {
      Bad("url", "/v1/completions or /v1/chat/completions");
    }
    const json* body = Find(j, "body");
    if (body && !body->is_object()) Bad("body", "an object");
    FillBody(body ? *body : j, tokenizer, defaults, &r);
  } catch (const BadRequest& e) {
    r.error = "line " + std::to_string(line) + ": " + e.message;
  } catch (const Error& e) {  // the chat template
    r.error = "line " + std::to_string(line) + ": " + e.what();
  }
  return r;
}

std::string FormatResult(const Request& request, const Result& result, const Tokenizer& tokenizer) {
  json choice = {{"index", 0},
                 {"finish_reason", result.finish == FinishReason::kStop ? "stop" : "length"}};
  if (request.chat) {
    choice["message"] = {{"role", "assistant"}, {"content", result.text}};
  } else {
    choice["text"] = result.text;
  }
  if (request.return_token_ids) choice["token_ids"] = result.tokens;
  if (request.sampling.top_logprobs >= 0) {
    choice["logprobs"] = LogprobsJson(result, tokenizer);
  } else {
    choice["logprobs"] = nullptr;
  }
  const json body = {{"object", request.chat ? "chat.completion" : "text_completion"},
                     {"created", static_cast<int64_t>(std::time(nullptr))},
                     {"choices", json::array({std::move(choice)})},
                     {"usage",
                      {{"prompt_tokens", request.prompt.size()},
                       {"completion_tokens", result.tokens.size()},
                       {"total_tokens", request.prompt.size() + result.tokens.size()},
                       {"sampled_fraction", result.sampled_fraction}}}};
  return Envelope(request,
                  {{"status_code", 200},
                   {"request_id", "request-" + request.request_id},
                   {"body", body}},
                  nullptr)
      .dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string FormatError(const Request& request, int status, const std::string& message) {
  return Envelope(request,
                  {{"status_code", status},
                   {"request_id", "request-" + request.request_id},
                   {"body", nullptr}},
                  {{"code", status}, {"message", message}})
      .dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace passel::engine
