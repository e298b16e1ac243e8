#include "runtime/cli/inspect/inspect.h"

#include <fmt/ostream.h>

#include <array>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/outline.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {
namespace {

std::string Size(double bytes) {
  static constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 1, kUnits[unit]);
}

class Report {
 public:
  explicit Report(std::ostream& out) : out_(out) {}
  void Line(std::string_view name, const std::string& value) {
    fmt::print(out_, "{:<20}{}\n", name, Printable(value, value.size()));
  }

 private:
  std::ostream& out_;
};

std::string Rope(const model::ModelConfig& c) {
  std::string text = fmt::format("base {:g}", c.rope_theta);
  if (c.rope_scaling) {
    text += fmt::format(", {} scaling by {:g}", c.rope_scaling->type, c.rope_scaling->factor);
  }
  if (!c.rope_factors.empty()) text += ", a factor for each frequency";
  return text;
}

std::string Verdict(const std::string& error, const std::string& text) {
  return error.empty() ? "served: " + text : "NOT SERVED: " + error;
}

std::string Types(const model::Outline& outline) {
  std::string served, unserved;
  for (const auto& [name, type] : outline.types) {
    std::string& list = type.served ? served : unserved;
    list += fmt::format("{}{} {}", list.empty() ? "" : ", ", type.tensors, name);
  }
  if (unserved.empty()) return served.empty() ? "no tensors were found" : "served: " + served;
  return fmt::format("NOT SERVED: {}{}{}", unserved, served.empty() ? "" : "; served: ", served);
}

uint64_t Parameters(const model::Outline& outline) {
  uint64_t elements = 0;
  for (const auto& [name, type] : outline.types) elements += type.elements;
  if (!outline.error.empty()) return elements;
  // Files of a model that is served may hold a tied weight twice, or factors for RoPE.
  const model::ModelConfig& c = outline.config;
  const int64_t q = int64_t{c.heads} * c.head_dim, kv = int64_t{c.kv_heads} * c.head_dim;
  const int64_t layer = c.hidden * (2 * q + 2 * kv + 3 * int64_t{c.ffn} + 2) +
                        (c.qkv_bias ? q + 2 * kv : 0) + (c.qk_norm ? 2 * c.head_dim : 0);
  return static_cast<uint64_t>(c.layers * layer +
                               c.hidden * ((c.tied_embeddings ? 1 : 2) * int64_t{c.vocab} + 1));
}

// A number, "not given" for 0.
template <typename T>
std::string Given(T value) {
  return value == 0 ? "not given" : fmt::format("{}", value);
}

void ReportModel(const model::Outline& outline, Report& report) {
  const model::ModelConfig& c = outline.config;
  const uint64_t parameters = Parameters(outline);
  report.Line("architecture", Verdict(outline.architecture_error, c.architecture));
  report.Line("parameters", Given(parameters));
  report.Line("weights", fmt::format("{} in the file, {} as bf16",
                                     Size(static_cast<double>(outline.weight_bytes)),
                                     Size(2 * static_cast<double>(parameters))));
  report.Line("tensor types", Types(outline));
  report.Line("layers", Given(c.layers));
  report.Line("hidden size", Given(c.hidden));
  report.Line("feed-forward size", Given(c.ffn));
  report.Line("attention",
              fmt::format("{} heads, {} KV heads, head dimension {}{}{}", Given(c.heads),
                          Given(c.kv_heads), Given(c.head_dim), c.qkv_bias ? ", biases" : "",
                          c.qk_norm ? ", heads of q and k normalised" : ""));
  report.Line("vocabulary", fmt::format("{}{}", Given(c.vocab),
                                        c.tied_embeddings ? ", output tied to the embedding" : ""));
  report.Line("RoPE", Verdict(outline.rope_error, Rope(c)));
  report.Line("context", fmt::format("{} tokens", Given(c.context_length)));
  report.Line("sliding window",
              c.sliding_window == 0
                  ? "none"
                  : fmt::format("{} tokens{}", c.sliding_window,
                                outline.error.empty() ? ": all KV stays on the model rank" : ""));
  // K and V, bf16. In floating point: what is not served need not fit an integer.
  const double per_token = 4.0 * c.layers * c.kv_heads * c.head_dim;
  report.Line("KV per token",
              per_token > 0 ? fmt::format("{:.0f} bytes as bf16", per_token) : "not known");
  report.Line("KV of a context", per_token > 0
                                     ? Size(per_token * static_cast<double>(c.context_length))
                                     : "not known");
}

std::string Quoted(const Tokenizer& tokenizer, int32_t id) {
  return fmt::format("{} \"{}\"", id, tokenizer.TokenBytes(id, true));
}

// The pre-tokeniser, by its name or, where a file brings patterns without one, by those.
std::string PreTokenizerName(const TokenizerData& data) {
  if (data.kind == TokenizerData::Kind::kSentencePieceBpe) return "none: text is merged as one";
  if (data.patterns.empty()) return data.pre_tokenizer;
  const std::string name = PreTokenizer::Name(data.patterns);
  if (name != "own") return name;
  std::string text;
  for (const TokenizerData::Pattern& pattern : data.patterns) {
    text += fmt::format("{}\"{}\"{}", text.empty() ? "" : ", then ", Printable(pattern.regex, 200),
                        pattern.matches_only ? " (its matches alone)" : "");
  }
  return text;
}

// Returns why there is no tokenizer, or "".
std::string ReportTokenizer(const model::Outline& outline, Report& report) {
  const TokenizerData& data = outline.tokenizer;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string error = outline.tokenizer_error;
  try {
    if (error.empty()) tokenizer = Tokenizer::Make(data);
  } catch (const Error& e) {
    error = e.what();
  }
  if (!error.empty()) {
    report.Line("tokenizer", Verdict(error, ""));
    return error;
  }
  const bool pieces = data.kind == TokenizerData::Kind::kSentencePieceBpe;
  report.Line("tokenizer", fmt::format("served: {} tokens, {} BPE{}", tokenizer->vocab_size(),
                                       pieces ? "SentencePiece" : "byte-level",
                                       data.nfc ? ", text normalised to NFC" : ""));
  report.Line("pre-tokeniser", PreTokenizerName(data));
  report.Line("begins with", data.add_bos ? Quoted(*tokenizer, data.bos) : "no token of its own");
  std::string stops;
  for (const int32_t id : tokenizer->stop_ids()) {
    stops += fmt::format("{}{}", stops.empty() ? "" : ", ", Quoted(*tokenizer, id));
  }
  report.Line("stops at", stops.empty() ? "nothing: requests need a limit of tokens" : stops);
  try {
    const ChatMessage message{"user", "…"};
    report.Line("chat template",
                fmt::format("served: \"{}\"", tokenizer->ApplyChatTemplate({&message, 1})));
  } catch (const Error& e) {
    report.Line("chat template", fmt::format("NOT SERVED: {}", e.what()));
  }
  return "";
}

}  // namespace

int RunInspect(const std::string& path, std::ostream& out) {
  const model::Outline outline = model::ReadOutline(path);
  Report report(out);
  ReportModel(outline, report);
  const std::string tokenizer_error = ReportTokenizer(outline, report);
  const std::string& error = outline.error.empty() ? tokenizer_error : outline.error;
  report.Line("model", error.empty() ? "served" : "NOT SERVED: " + error);
  return error.empty() ? 0 : static_cast<int>(ErrorClass::kModel);
}

}  // namespace passel
