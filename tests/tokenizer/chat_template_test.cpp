#include "runtime/tokenizer/chat_template.h"

#include <gtest/gtest.h>

#include "runtime/base/error.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel {
namespace {

using Messages = std::vector<ChatMessage>;

std::string Apply(const TokenizerData& data, const Messages& messages) {
  return Tokenizer::Make(data)->ApplyChatTemplate(messages);
}

void ExpectUsageError(const TokenizerData& data, const Messages& messages,
                      const std::string& part) {
  try {
    Apply(data, messages);
    FAIL() << "expected an error about " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kUsage);
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TokenizerData WithTemplate(const std::string& jinja) {
  TokenizerData data = ByteVocabulary({});
  data.chat_template = jinja;
  return data;
}

constexpr const char* kSmolLm2 =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}";

TEST(ChatTemplate, SmolLm2) {
  const TokenizerData data = WithTemplate(kSmolLm2);
  EXPECT_EQ(Apply(data, {{"user", " Hi "}}),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(Apply(data, {{"system", "S"}, {"user", "a"}, {"assistant", "b"}, {"user", "c"}}),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant"
            "\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, ChatMlWithoutADefaultSystemMessage) {
  const TokenizerData data = WithTemplate(
      "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
      "{% endfor %}{{ '<|im_start|>assistant\\n' }}");
  EXPECT_EQ(Apply(data, {{"user", "x"}}), "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, ChatMlWhereTheSystemMessageIsAVariable) {
  const TokenizerData data = WithTemplate(
      "{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}"
      "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}");
  EXPECT_EQ(Apply(data, {{"user", "x"}}),
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\n");
}

TEST(ChatTemplate, Llama3) {
  TokenizerData data = WithTemplate(
      "{{ bos_token }}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n<|eot_id|>");
  data.bos = AddToken(data, "<|begin_of_text|>", TokenizerData::TokenType::kSpecial);
  const std::string turns =
      "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\n";
  EXPECT_EQ(Apply(data, {{"user", " Hi\n"}}), "<|begin_of_text|>" + turns);
  data.add_bos = true;  // then encoding writes it
  EXPECT_EQ(Apply(data, {{"user", "Hi"}}), turns);
  data.chat_template += "Cutting Knowledge Date: December 2023";
  EXPECT_EQ(Apply(data, {{"user", "Hi"}}),
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
            "2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>" +
                turns);
  EXPECT_EQ(Apply(data, {{"system", "S"}, {"user", "Hi"}}),
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
            "2023\nToday Date: 26 Jul 2024\n\nS<|eot_id|>" +
                turns);
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnow) {
  ExpectUsageError(WithTemplate(""), {{"user", "x"}}, "no chat template");
  ExpectUsageError(WithTemplate("[INST] {{ x }} [/INST]"), {{"user", "x"}}, "not served");
  ExpectUsageError(WithTemplate(std::string(kSmolLm2) + "<think>"), {{"user", "x"}}, "not served");
  ExpectUsageError(WithTemplate(kSmolLm2), {}, "is empty");
  ExpectUsageError(WithTemplate(kSmolLm2), {{"user", "x"}, {"tool", "y"}}, "messages[1].role");
}

}  // namespace
}  // namespace passel
