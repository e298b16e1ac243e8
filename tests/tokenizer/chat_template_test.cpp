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

TokenizerData WithBosAndEos(const std::string& jinja, bool add_bos) {
  TokenizerData data = WithTemplate(jinja);
  data.bos = AddToken(data, "<s>", TokenizerData::TokenType::kSpecial);
  data.eos = AddToken(data, "</s>", TokenizerData::TokenType::kSpecial);
  data.add_bos = add_bos;
  return data;
}

constexpr const char* kLlama2 =
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set "
    "system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] "
    "== 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != "
    "false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% "
    "endfor %}";

TEST(ChatTemplate, Llama2) {
  const Messages turns = {{"system", "S"}, {"user", " a "}, {"assistant", " b"}, {"user", "c"}};
  EXPECT_EQ(Apply(WithBosAndEos(kLlama2, false), turns),
            "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n a [/INST] b </s><s>[INST] c [/INST]");
  EXPECT_EQ(Apply(WithBosAndEos(kLlama2, true), turns),  // encoding writes the first <s>
            "[INST] <<SYS>>\nS\n<</SYS>>\n\n a [/INST] b </s><s>[INST] c [/INST]");
  EXPECT_EQ(Apply(WithBosAndEos(kLlama2, false), {{"user", "x"}}), "<s>[INST] x [/INST]");
}

// The three shapes that Mistral's instruct models have.
std::string MistralTemplate(const std::string& user, const std::string& assistant) {
  return "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ " +
         user + " }}{% elif message['role'] == 'assistant' %}{{ " + assistant +
         " }}{% endif %}{% endfor %}";
}

TEST(ChatTemplate, Mistral) {
  const Messages turns = {{"user", "a"}, {"assistant", "b"}, {"user", "c"}};
  const std::string v1 = MistralTemplate("'[INST] ' + message['content'] + ' [/INST]'",
                                         "message['content'] + eos_token + ' '");
  EXPECT_EQ(Apply(WithBosAndEos(v1, false), turns), "<s>[INST] a [/INST]b</s> [INST] c [/INST]");
  const std::string v2 = MistralTemplate("\"[INST] \" + message[\"content\"] + \" [/INST]\"",
                                         "message[\"content\"] + eos_token");
  EXPECT_EQ(Apply(WithBosAndEos(v2, true), turns), "[INST] a [/INST]b</s>[INST] c [/INST]");
  const std::string v3 =
      "{%- if messages[0][\"role\"] == \"system\" %}{% set system_message = "
      "messages[0][\"content\"] %}{% endif %}" +
      MistralTemplate("\"[INST] \" + message[\"content\"] + \"[/INST]\"",
                      "\" \" + message[\"content\"] + eos_token");
  const std::string last = v3 +
                           "{% if loop.last and system_message is defined %}{{ \"[INST] \" + "
                           "system_message + \"\\n\\n\" + message[\"content\"] }}";
  EXPECT_EQ(Apply(WithBosAndEos(last, false), turns), "<s>[INST] a[/INST] b</s>[INST] c[/INST]");
  Messages with_system = turns;
  with_system.insert(with_system.begin(), {"system", "S"});
  EXPECT_EQ(Apply(WithBosAndEos(last, false), with_system),
            "<s>[INST] a[/INST] b</s>[INST] S\n\nc[/INST]");
  std::string first = last;
  first.replace(first.find("loop.last"), 9, "loop.first");
  EXPECT_EQ(Apply(WithBosAndEos(first, false), with_system),
            "<s>[INST] S\n\na[/INST] b</s>[INST] c[/INST]");
  // Where it writes the system message is not seen: refused rather than left out.
  ExpectUsageError(WithBosAndEos(v3, false), turns, "not served");
}

TEST(ChatTemplate, InstTemplatesTakeTurns) {
  const TokenizerData llama2 = WithBosAndEos(kLlama2, true);
  ExpectUsageError(llama2, {{"user", "a"}, {"user", "b"}}, "messages[1].role");
  ExpectUsageError(llama2, {{"system", "a"}}, "messages[1].role");
  ExpectUsageError(llama2, {{"system", "a"}, {"assistant", "b"}}, "messages[1].role");
  ExpectUsageError(llama2, {{"user", "a"}, {"assistant", "b"}}, "user's last");
  const std::string v1 = MistralTemplate("'[INST] ' + message['content'] + ' [/INST]'",
                                         "message['content'] + eos_token + ' '");
  ExpectUsageError(WithBosAndEos(v1, true), {{"system", "a"}, {"user", "b"}}, "messages[0].role");
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
