#include "runtime/cli/inspect/inspect.h"

#include <fmt/ostream.h>

#include <algorithm>
#include <array>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/model_file.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {
namespace {

std::string Size(uint64_t bytes) {
  static constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
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

void ReportConfig(const model::ModelFile& file, Report& report) {
  const model::ModelConfig& c = file.config();
  const int64_t q = int64_t{c.heads} * c.head_dim, kv = int64_t{c.kv_heads} * c.head_dim;
  const int64_t layer = c.hidden * (2 * q + 2 * kv + 3 * int64_t{c.ffn} + 2) +
                        (c.qkv_bias ? q + 2 * kv : 0) + (c.qk_norm ? 2 * c.head_dim : 0);
  const int64_t parameters =
      c.layers * layer + c.hidden * ((c.tied_embeddings ? 1 : 2) * int64_t{c.vocab} + 1);
  report.Line("architecture", c.architecture);
  report.Line("parameters", fmt::format("{}", parameters));
  report.Line("weights", fmt::format("{} in the file, {} as bf16", Size(file.weight_bytes()),
                                     Size(2 * static_cast<uint64_t>(parameters))));
  report.Line("layers", fmt::format("{}", c.layers));
  report.Line("hidden size", fmt::format("{}", c.hidden));
  report.Line("feed-forward size", fmt::format("{}", c.ffn));
  report.Line("attention", fmt::format("{} heads, {} KV heads, head dimension {}{}{}", c.heads,
                                       c.kv_heads, c.head_dim, c.qkv_bias ? ", biases" : "",
                                       c.qk_norm ? ", heads of q and k normalised" : ""));
  report.Line("vocabulary", fmt::format("{}{}", c.vocab,
                                        c.tied_embeddings ? ", output tied to the embedding" : ""));
  report.Line("RoPE", Rope(c));
  report.Line("context", fmt::format("{} tokens", c.context_length));
  report.Line("sliding window",
              c.sliding_window == 0
                  ? "none"
                  : fmt::format("{} tokens: all KV stays on the model rank", c.sliding_window));
  // K and V, bf16.
  const auto per_token = static_cast<uint64_t>(c.layers) * static_cast<uint64_t>(4 * kv);
  report.Line("KV per token", fmt::format("{} bytes as bf16", per_token));
  report.Line(
      "KV of a context",
      Size(per_token * static_cast<uint64_t>(std::min(c.context_length, int64_t{1} << 32))));
}

std::string Quoted(const Tokenizer& tokenizer, int32_t id) {
  return fmt::format("{} \"{}\"", id, tokenizer.TokenBytes(id, true));
}

void ReportTokenizer(const TokenizerData& data, Report& report) {
  std::unique_ptr<Tokenizer> tokenizer;
  try {
    tokenizer = Tokenizer::Make(data);
  } catch (const Error& e) {
    report.Line("tokenizer", fmt::format("NOT SERVED: {}", e.what()));
    return;
  }
  const bool pieces = data.kind == TokenizerData::Kind::kSentencePieceBpe;
  report.Line("tokenizer", fmt::format("{} tokens, {} BPE{}", tokenizer->vocab_size(),
                                       pieces ? "SentencePiece" : "byte-level",
                                       data.nfc ? ", text normalised to NFC" : ""));
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
}

}  // namespace

int RunInspect(const std::string& path, std::ostream& out) {
  const auto file = model::ModelFile::Open(path);
  Report report(out);
  ReportConfig(*file, report);
  ReportTokenizer(file->tokenizer(), report);
  return 0;
}

}  // namespace passel
