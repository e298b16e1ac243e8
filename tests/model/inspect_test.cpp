#include "runtime/cli/inspect/inspect.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "tests/model/tiny_model.h"

namespace passel {
namespace {

struct Inspected {
  int code = -1;
  std::string report;
};

Inspected Inspect(const std::string& path) {
  std::ostringstream out;
  const int code = RunInspect(path, out);
  return {code, out.str()};
}

Inspected Inspect(const GgufWriter& writer) {
  const TempPath path(".gguf", writer.Encode());
  return Inspect(path.str());
}

// A line that begins and ends so.
void ExpectLine(const Inspected& inspected, const std::string& begin, const std::string& end) {
  std::istringstream lines(inspected.report);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(begin) && line.ends_with(end)) return;
  }
  ADD_FAILURE() << "no line \"" << begin << "…" << end << "\" in\n" << inspected.report;
}

void ExpectLine(const Inspected& inspected, const std::string& line) {
  EXPECT_NE(("\n" + inspected.report).find("\n" + line + "\n"), std::string::npos)
      << "no line \"" << line << "\" in\n"
      << inspected.report;
}

TEST(Inspect, ReportsSizesAndWhatIsServed) {
  const Inspected report = Inspect(TinyModel::Gguf(true));
  EXPECT_EQ(report.code, 0);
  ExpectLine(report, "architecture        served: llama");
  // 11 · 16 + 16 of embedding and norm; 7 · 16² + 2 · 16 of the layer.
  ExpectLine(report, "parameters          2016");
  ExpectLine(report, "attention           1 heads, 1 KV heads, head dimension 16");
  ExpectLine(report, "vocabulary          11, output tied to the embedding");
  ExpectLine(report, "RoPE                served: base 1e+06, linear scaling by 2");
  ExpectLine(report, "sliding window      32 tokens: all KV stays on the model rank");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  ExpectLine(report, "KV of a context     4.0 KiB");
  ExpectLine(report, "tensor types        served: 11 F32");
  ExpectLine(report, "tokenizer           served: 11 tokens, SentencePiece BPE");
  ExpectLine(report, "pre-tokeniser       none: text is merged as one");
  ExpectLine(report, "begins with         1 \"<s>\"");
  ExpectLine(report, "stops at            2 \"</s>\"");
  ExpectLine(report, "chat template       NOT SERVED: messages: the model has no chat template",
             "");
  ExpectLine(report, "model               served");
}

TEST(Inspect, TellsOfBiasesAndHeadNorms) {
  Inspected report = Inspect(TinyModel::Gguf(false, "qwen2"));
  ExpectLine(report, "architecture        served: qwen2");
  ExpectLine(report, "parameters          2064");  // three biases of 16 more
  ExpectLine(report, "attention           1 heads, 1 KV heads, head dimension 16, biases");
  ExpectLine(report, "sliding window      none");
  report = Inspect(TinyModel::Gguf(false, "qwen3"));
  ExpectLine(report, "architecture        served: qwen3");
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
  const Inspected report = Inspect(writer);
  EXPECT_EQ(report.code, 3);
  const std::string why = "NOT SERVED: tokenizer: pre-tokeniser \"jina\\nv2es\" is not served";
  ExpectLine(report, "tokenizer           " + why, "");
  ExpectLine(report, "model               " + why, "");
  ExpectLine(report, "architecture        served: llama");
}

// What is not served is told line by line; the rest is reported all the same.
TEST(Inspect, ReportsAGgufThatIsNotServed) {
  GgufWriter writer = TinyModel::Gguf(false, "gemma9");
  for (std::string& value : writer.values) {
    const size_t at = value.find("linear");
    if (at != std::string::npos) value.replace(at, 6, "spiral");
  }
  writer.tensors[3].type = 99;
  const Inspected report = Inspect(writer);
  EXPECT_EQ(report.code, 3);
  ExpectLine(report, "architecture        NOT SERVED: \"gemma9\"; expected llama, qwen2, qwen3");
  ExpectLine(report, "parameters          2016");
  ExpectLine(report, "tensor types        NOT SERVED: 1 type 99; served: 10 F32");
  ExpectLine(report, "attention           1 heads, 1 KV heads, head dimension 16");
  ExpectLine(report, "vocabulary          11, output tied to the embedding");
  ExpectLine(report, "RoPE                NOT SERVED: ",
             "RoPE scaling: is \"spiral\"; expected \"linear\" or \"llama3\"");
  ExpectLine(report, "sliding window      32 tokens");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  ExpectLine(report, "tokenizer           served: 11 tokens, byte-level BPE");
  ExpectLine(report, "pre-tokeniser       llama-bpe");
  ExpectLine(report, "model               NOT SERVED: ", "Q4_K, Q5_K, Q6_K");
}

// The types that are not served have names and sizes all the same.
TEST(Inspect, NamesAndSizesElementTypesThatAreNotServed) {
  GgufWriter writer = TinyModel::Gguf(false);
  GgufWriter::Tensor& tensor = writer.tensors.back();
  tensor.dims = {256, 64};
  tensor.type = 11;
  tensor.data.assign(64 * 110, '\0');
  const Inspected report = Inspect(writer);
  EXPECT_EQ(report.code, 3);
  ExpectLine(report, "tensor types        NOT SERVED: 1 Q3_K; served: 10 F32");
  ExpectLine(report, "weights             ", "13.8 KiB in the file, 35.4 KiB as bf16");
  ExpectLine(report, "model               NOT SERVED: ", "");
  EXPECT_NE(report.report.find("has element type Q3_K; expected one of F32"), std::string::npos);
}

// A Hugging Face directory of the tiny model, to be changed before it is inspected.
struct HfDirectory {
  nlohmann::json config = TinyModel::Config(), tokenizer = TinyModel::Tokenizer(),
                 header = TinyModel::SafetensorsHeader();
  std::string chat_template =
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
      "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
      "{{ '<|im_start|>assistant\\n' }}{% endif %}";

  Inspected Run() const {
    const TempPath path;
    std::filesystem::create_directory(path.str());
    const auto write = [&](const char* name, const std::string& content) {
      std::ofstream(path.str() + "/" + name, std::ios::binary) << content;
    };
    write("config.json", config.dump());
    write("tokenizer.json", tokenizer.dump());
    write("tokenizer_config.json",
          nlohmann::json{
              {"bos_token", "<s>"}, {"eos_token", "</s>"}, {"chat_template", chat_template}}
              .dump());
    write("model.safetensors", Bytes().Text(header.dump()).str() + TinyModel::SafetensorsData());
    return Inspect(path.str());
  }
};

TEST(Inspect, ReportsAHuggingFaceDirectory) {
  const Inspected report = HfDirectory().Run();
  EXPECT_EQ(report.code, 0);
  ExpectLine(report, "architecture        served: mistral");
  ExpectLine(report, "parameters          2016");
  ExpectLine(report, "weights             3.9 KiB in the file, 3.9 KiB as bf16");
  ExpectLine(report, "tensor types        served: 11 BF16");
  ExpectLine(report, "RoPE                served: base 1e+06, llama3 scaling by 8");
  ExpectLine(report, "KV of a context     4.0 KiB");
  ExpectLine(report, "tokenizer           served: 7 tokens, byte-level BPE");
  ExpectLine(report, R"(pre-tokeniser       "\s+|\S+")");
  ExpectLine(report, "begins with         1 \"<s>\"");
  ExpectLine(report,
             "chat template       served: "
             R"("<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n")");
  ExpectLine(report, "model               served");
}

TEST(Inspect, ReportsADirectoryWhoseArchitectureIsNotServed) {
  HfDirectory directory;
  directory.config["model_type"] = "gemma9";
  directory.config["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  directory.config.erase("sliding_window");
  directory.config["intermediate_size"] = "wide";
  directory.header["model.norm.weight"]["dtype"] = "I16";
  const Inspected report = directory.Run();
  EXPECT_EQ(report.code, 3);
  ExpectLine(report,
             "architecture        NOT SERVED: \"gemma9\"; expected llama, mistral, qwen2, qwen3");
  ExpectLine(report, "tensor types        NOT SERVED: 1 I16; served: 10 BF16");
  ExpectLine(report, "layers              1");
  ExpectLine(report, "feed-forward size   not given");
  ExpectLine(report, "RoPE                NOT SERVED: ",
             "RoPE scaling: is \"yarn\"; expected \"linear\" or \"llama3\"");
  ExpectLine(report, "sliding window      none");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  ExpectLine(report, "tokenizer           served: 7 tokens, byte-level BPE");
  ExpectLine(report, "model               NOT SERVED: ",
             "is \"gemma9\"; expected \"llama\", \"mistral\", \"qwen2\" or \"qwen3\"");
}

TEST(Inspect, ReportsTheTextPartOfAConfig) {
  HfDirectory directory;
  directory.config = {{"model_type", "sees"}, {"text_config", TinyModel::Config()}};
  const Inspected report = directory.Run();
  EXPECT_EQ(report.code, 3);
  ExpectLine(report, "layers              1");
  ExpectLine(report, "KV per token        64 bytes as bf16");
}

TEST(Inspect, ReportsADirectoryWhoseTokenizerIsNotServed) {
  HfDirectory directory;
  directory.tokenizer["model"]["type"] = "Unigram";
  const Inspected report = directory.Run();
  EXPECT_EQ(report.code, 3);
  ExpectLine(report, "architecture        served: mistral");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  for (const std::string line : {"tokenizer           ", "model               "}) {
    ExpectLine(report, line + "NOT SERVED: ",
               "tokenizer.json: model: type: is \"Unigram\"; expected \"BPE\"");
  }
}

// Prompts are answered all the same.
TEST(Inspect, ReportsAnUnknownChatTemplate) {
  HfDirectory directory;
  directory.chat_template = "{{ messages | tojson }}";
  const Inspected report = directory.Run();
  EXPECT_EQ(report.code, 0);
  ExpectLine(report, "chat template       NOT SERVED: messages: ", "");
  ExpectLine(report, "model               served");
}

// What there is of a directory that lacks the weights.
TEST(Inspect, ReportsAConfigAlone) {
  const TempPath path;
  std::filesystem::create_directory(path.str());
  std::ofstream(path.str() + "/config.json") << TinyModel::Config().dump();
  const Inspected report = Inspect(path.str());
  EXPECT_EQ(report.code, 3);
  ExpectLine(report, "tensor types        no tensors were found");
  ExpectLine(report, "KV per token        64 bytes as bf16");
  ExpectLine(report, "tokenizer           NOT SERVED: tokenizer: the model has no tokenizer", "");
  ExpectLine(report, "model               NOT SERVED: ", "No such file or directory");
}

// Less is demanded of the files than ModelFile demands: nothing may be taken on trust for that.
TEST(Inspect, DamagedFilesGiveAReportOrAnError) {
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/model.safetensors", std::ios::binary)
      << Bytes().Text(TinyModel::SafetensorsHeader().dump()).str() + TinyModel::SafetensorsData();
  const TempPath gguf(".gguf");
  const std::pair<std::string, std::string> files[] = {
      {gguf.str(), TinyModel::Gguf(false).Encode()},
      {directory.str() + "/config.json", TinyModel::QwenConfig("qwen2").dump()},
      {directory.str() + "/tokenizer.json", TinyModel::Tokenizer().dump()}};
  Random random(12);
  int reports = 0, errors = 0;
  for (const auto& [name, whole] : files) {
    for (int trial = 0; trial < 500; ++trial) {
      std::string bytes = whole;
      for (int i = 0; i <= trial % 3; ++i) {
        bytes[random.Next() % bytes.size()] = static_cast<char>(random.Next());
      }
      std::ofstream(name, std::ios::binary) << bytes;
      try {
        const int code = Inspect(name == gguf.str() ? name : directory.str()).code;
        EXPECT_TRUE(code == 0 || code == 3) << code;
        ++reports;
      } catch (const Error& e) {
        EXPECT_EQ(e.error_class(), ErrorClass::kModel) << e.what();
        ++errors;
      }
    }
    std::ofstream(name, std::ios::binary) << whole;
  }
  EXPECT_GT(reports, 200);
  EXPECT_GT(errors, 200);
}

TEST(Inspect, RefusesWhatIsNoModel) {
  const TempPath cut(".gguf", "GGUF"), empty, absent;
  std::filesystem::create_directory(empty.str());
  for (const TempPath* path : {&cut, &empty, &absent}) {
    std::ostringstream out;
    EXPECT_THROW(RunInspect(path->str(), out), Error);
    EXPECT_EQ(out.str(), "");
  }
}

}  // namespace
}  // namespace passel
