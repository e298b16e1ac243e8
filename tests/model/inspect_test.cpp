#include "runtime/cli/inspect/inspect.h"

#include <gtest/gtest.h>

#include <sstream>

#include "runtime/base/error.h"
#include "tests/model/tiny_model.h"

namespace passel {
namespace {

std::string Inspect(const GgufWriter& writer) {
  const TempPath path(".gguf", writer.Encode());
  std::ostringstream out;
  EXPECT_EQ(RunInspect(path.str(), out), 0);
  return out.str();
}

void ExpectLine(const std::string& report, const std::string& line) {
  EXPECT_NE(("\n" + report).find("\n" + line + "\n"), std::string::npos)
      << "no line \"" << line << "\" in\n"
      << report;
}

TEST(Inspect, ReportsSizesAndWhatIsServed) {
  const std::string report = Inspect(TinyModel::Gguf(true));
  ExpectLine(report, "architecture        llama");
  // 11 · 16 + 16 of embedding and norm; 7 · 16² + 2 · 16 of the layer.
  ExpectLine(report, "parameters          2016");
  ExpectLine(report, "attention           1 heads, 1 KV heads, head dimension 16");
  ExpectLine(report, "vocabulary          11, output tied to the embedding");
  ExpectLine(report, "RoPE                base 1e+06, linear scaling by 2");
  ExpectLine(report, "sliding window      32 tokens: all KV stays on the model rank");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  ExpectLine(report, "KV of a context     4.0 KiB");
  ExpectLine(report, "tokenizer           11 tokens, SentencePiece BPE");
  ExpectLine(report, "begins with         1 \"<s>\"");
  ExpectLine(report, "stops at            2 \"</s>\"");
  EXPECT_NE(report.find("chat template       NOT SERVED: messages: the model has no chat template"),
            std::string::npos)
      << report;
}

TEST(Inspect, TellsOfBiasesAndHeadNorms) {
  std::string report = Inspect(TinyModel::Gguf(false, "qwen2"));
  ExpectLine(report, "architecture        qwen2");
  ExpectLine(report, "parameters          2064");  // three biases of 16 more
  ExpectLine(report, "attention           1 heads, 1 KV heads, head dimension 16, biases");
  ExpectLine(report, "sliding window      none");
  report = Inspect(TinyModel::Gguf(false, "qwen3"));
  ExpectLine(report, "architecture        qwen3");
  ExpectLine(report, "parameters          2048");
  ExpectLine(report,
             "attention           1 heads, 1 KV heads, head dimension 16, heads of q and k "
             "normalised");
}

TEST(Inspect, SaysWhyATokenizerIsNotServed) {
  GgufWriter writer = TinyModel::Gguf(false);
  for (std::string& value : writer.values) {
    const size_t at = value.find("llama-bpe");
    if (at != std::string::npos) value.replace(at, 9, "jina\nv2es");
  }
  const std::string report = Inspect(writer);
  EXPECT_NE(report.find("tokenizer           NOT SERVED: tokenizer: pre-tokeniser \"jina\\nv2es\""),
            std::string::npos)
      << report;
}

TEST(Inspect, RefusesWhatIsNoModel) {
  const TempPath path(".gguf", "GGUF");
  std::ostringstream out;
  EXPECT_THROW(RunInspect(path.str(), out), Error);
}

}  // namespace
}  // namespace passel
