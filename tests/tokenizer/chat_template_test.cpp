// Chat templates against Jinja; see tests/fixtures/README.md. $PASSEL_CHAT_FIXTURE names another
// file that the script wrote, of models' own templates.

#include "runtime/tokenizer/chat_template.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel {
namespace {

using nlohmann::json;
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

struct Case {
  std::string name, jinja;
  std::vector<Messages> messages;
  std::vector<json> texts;  // null where the template refuses the messages
};

std::vector<Case> Cases() {
  const char* other = std::getenv("PASSEL_CHAT_FIXTURE");
  std::ifstream file(other != nullptr ? other
                                      : PASSEL_SOURCE_DIR "/tests/fixtures/chat_templates.jsonl");
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    const json entry = json::parse(line);
    Case c{entry["name"], entry["template"], {}, entry["texts"]};
    for (const json& list : entry["messages"]) {
      Messages& messages = c.messages.emplace_back();
      for (const json& m : list) messages.push_back({m["role"], m["content"]});
    }
    cases.push_back(std::move(c));
  }
  return cases;
}

TokenizerData WithBosAndEos(const std::string& jinja) {
  TokenizerData data = WithTemplate(jinja);
  data.bos = AddToken(data, "<s>", TokenizerData::TokenType::kSpecial);
  data.eos = AddToken(data, "</s>", TokenizerData::TokenType::kSpecial);
  return data;
}

bool SystemInTheMiddle(const Messages& messages) {
  return std::any_of(messages.begin() + 1, messages.end(),
                     [](const ChatMessage& m) { return m.role == "system"; });
}

// Nothing but what Jinja renders; what is refused is refused as the model's or the messages' fault.
TEST(ChatTemplate, TextsAreTheReferences) {
  const bool own = std::getenv("PASSEL_CHAT_FIXTURE") == nullptr;
  const std::vector<Case> cases = Cases();
  ASSERT_FALSE(cases.empty());
  for (const Case& c : cases) {
    const auto tokenizer = Tokenizer::Make(WithBosAndEos(c.jinja));
    size_t same = 0;
    bool served = true;
    for (size_t i = 0; i < c.messages.size(); ++i) {
      try {
        const std::string text = tokenizer->ApplyChatTemplate(c.messages[i]);
        EXPECT_EQ(json(text), c.texts[i]) << c.name << ", messages " << i;
        ++same;
      } catch (const Error& e) {
        EXPECT_EQ(e.error_class(), ErrorClass::kUsage);
        served = std::string(e.what()).find("not served") == std::string::npos;
        // Though Jinja renders it, what does not end with the user's message may be refused, and a
        // system message in the middle, which Llama 2's template leaves out, and reasoning before a
        // tool's answer.
        if (own && served && !c.texts[i].is_null() && !SystemInTheMiddle(c.messages[i])) {
          const ChatMessage& last = c.messages[i].back();
          EXPECT_TRUE(last.role != "user" || last.content.starts_with("<tool_response>"))
              << c.name << ": " << e.what();
        }
      }
    }
    if (own) {
      EXPECT_EQ(served, !c.name.starts_with("not: ")) << c.name;
    }
    if (served) {
      EXPECT_GE(same, 5u) << c.name;
    } else {
      EXPECT_EQ(same, 0u) << c.name;
    }
    if (!own) std::cout << (served ? "served      " : "not served  ") << c.name << "\n";
  }
  if (own) {
    EXPECT_GE(cases.size(), 20u);
  }
}

// As zlib counts it.
uint32_t Crc32(const std::string& text) {
  uint32_t crc = ~uint32_t{0};
  for (const char c : text) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc;
}

// A template of those above changed in one place, so that it writes something else: it is not
// served, or gives what Jinja renders (chat_mutants.jsonl).
TEST(ChatTemplate, ChangedTemplatesAreNotTakenForWhatTheyWere) {
  if (std::getenv("PASSEL_CHAT_FIXTURE") != nullptr) GTEST_SKIP() << "for our own templates";
  std::map<std::string, json> mutants;
  std::ifstream file(PASSEL_SOURCE_DIR "/tests/fixtures/chat_mutants.jsonl");
  for (std::string line; std::getline(file, line);) {
    const json entry = json::parse(line);
    mutants[entry["name"]] = entry["mutants"];
  }
  size_t changed = 0, served = 0;
  for (const Case& c : Cases()) {
    if (c.name.starts_with("not: ")) continue;
    for (const json& mutant : mutants.at(c.name)) {
      std::string jinja = c.jinja;
      jinja.replace(mutant[0].get<size_t>(), mutant[1].get<size_t>(), mutant[2].get<std::string>());
      const auto tokenizer = Tokenizer::Make(WithBosAndEos(jinja));
      ++changed;
      bool any = false;
      for (size_t i = 0; i < c.messages.size(); ++i) {
        std::string text;
        try {
          text = tokenizer->ApplyChatTemplate(c.messages[i]);
        } catch (const Error&) {
          continue;
        }
        any = true;
        const json& expected = mutant[3].is_null() ? mutant[3] : mutant[3][i];
        EXPECT_EQ(expected, Crc32(text)) << c.name << ", messages " << i << ": " << jinja;
      }
      served += any;
    }
  }
  std::cout << changed << " changed templates, " << served << " of them served\n";
  EXPECT_GE(changed, 2000u);
  EXPECT_LT(served, changed / 10);
}

// The text's ids as it stands; in front of them bos, where a GGUF file asks for it and the template
// does not write it.
TEST(ChatTemplate, BosOfMessages) {
  size_t written = 0, put = 0;
  for (const Case& c : Cases()) {
    if (c.name.starts_with("not: ")) continue;
    TokenizerData data = WithBosAndEos(c.jinja);
    const std::string text = Apply(data, c.messages[0]);
    const std::vector<int32_t> ids = Tokenizer::Make(data)->Encode(text, true);
    ASSERT_EQ(text.starts_with("<s>"), ids[0] == data.bos) << c.name;
    std::vector<int32_t> begun = ids;
    if (ids[0] != data.bos) begun.insert(begun.begin(), data.bos);
    ++(ids[0] == data.bos ? written : put);
    for (const bool gguf : {false, true}) {
      for (const bool add : {false, true}) {
        data.messages_add_bos = gguf;
        data.add_bos = add;
        const auto tokenizer = Tokenizer::Make(data);
        EXPECT_EQ(tokenizer->ApplyChatTemplate(c.messages[0]), text) << c.name;
        EXPECT_EQ(tokenizer->EncodeMessages(c.messages[0]), gguf && add ? begun : ids) << c.name;
      }
    }
  }
  EXPECT_GE(written, 5u);
  EXPECT_GE(put, 5u);
}

// Python's strip() knows Unicode's white space, at both ends, and leaves what is within.
TEST(ChatTemplate, TrimsAllWhiteSpace) {
  size_t trimming = 0;
  for (const Case& c : Cases()) {
    if (c.name != "Llama 2" && c.name != "Llama 3") continue;
    ++trimming;
    const TokenizerData data = WithBosAndEos(c.jinja);
    const std::string text = Apply(data, {{"user", "a\u3000b"}});
    for (const char* space : {" ", "\x1c", "\u0085", "\u00a0", "\u1680", "\u2003", "\u200a",
                              "\u2028", "\u202f", "\u205f", "\u3000"}) {
      const std::string content = std::string(space) + "\ta\u3000b\n" + space;
      EXPECT_EQ(Apply(data, {{"user", content}}), text) << c.name;
    }
    // Not white space to Python: zero width space, and half a character.
    EXPECT_NE(Apply(data, {{"user", "a\u3000b\u200b"}}), text) << c.name;
    EXPECT_NE(Apply(data, {{"user", "a\u3000b\x80"}}), text) << c.name;
  }
  EXPECT_EQ(trimming, 2u);
}

TEST(ChatTemplate, SaysWhichRoleIsOutOfTurn) {
  for (const Case& c : Cases()) {
    const TokenizerData data = WithBosAndEos(c.jinja);
    if (c.name == "Llama 2" || c.name == "Mistral 0.3") {
      ExpectUsageError(data, {{"user", "a"}, {"user", "b"}}, "messages[1].role");
      ExpectUsageError(data, {{"system", "a"}}, "messages[1].role");
      ExpectUsageError(data, {{"system", "a"}, {"assistant", "b"}}, "messages[1].role");
      ExpectUsageError(data, {{"user", "a"}, {"assistant", "b"}}, "user's last");
    }
    if (c.name == "Mistral 0.1") {
      ExpectUsageError(data, {{"system", "a"}, {"user", "b"}}, "messages[0].role");
    }
  }
}

TEST(ChatTemplate, RefusesWhatReadsAlikeWithoutSpaces) {
  size_t changed = 0;
  for (const Case& c : Cases()) {
    if (c.name.starts_with("not: ")) continue;
    for (const auto& [from, to] :
         {std::pair("loop.last and ", "loop.lastand"),
          {"loop.first and ", "loop.firstand"},
          {"if not ", "if not"},
          {"message.role == 'user' and not(",
           "message.role == 'user' and message.contentis string and not("},
          {"{% for message in messages %}", "{#+ #}{% for message in messages %}"},
          {"Be kind to", "Be kind\rto"}}) {
      std::string jinja = c.jinja;
      const size_t at = jinja.find(from);
      if (at == std::string::npos) continue;
      ++changed;
      ExpectUsageError(WithBosAndEos(jinja.replace(at, std::string(from).size(), to)),
                       {{"user", "x"}}, "not served");
    }
    const std::string tools = "{% if tools %}";
    ExpectUsageError(
        WithBosAndEos(tools + "{% raw %}{% endif %}" + c.jinja + tools + "{% endraw %}{% endif %}"),
        {{"user", "x"}}, "not served");
    ExpectUsageError(WithBosAndEos("{% if message.tool_calls %}{% endif %}" + c.jinja),
                     {{"user", "x"}}, "not served");
  }
  EXPECT_GE(changed, 15u);
}

TEST(ChatTemplate, KeepsQuotedNames) {
  std::string jinja = kSmolLm2;
  const std::string known = "You are a helpful AI assistant";
  const size_t at = jinja.find(known);
  ASSERT_NE(at, std::string::npos);
  const std::string text = "See message.content or messages[0].role here";
  const std::string rendered =
      Apply(WithTemplate(jinja.replace(at, known.size(), text)), {{"user", "x"}});
  EXPECT_NE(rendered.find(text), std::string::npos) << rendered;
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnow) {
  ExpectUsageError(WithTemplate(""), {{"user", "x"}}, "no chat template");
  ExpectUsageError(WithTemplate("[INST] {{ x }} [/INST]"), {{"user", "x"}}, "not served");
  ExpectUsageError(WithTemplate(kSmolLm2 + std::string(100'000, ' ')), {{"user", "x"}},
                   "not served");
  ExpectUsageError(WithTemplate(kSmolLm2), {}, "is empty");
  ExpectUsageError(WithTemplate(kSmolLm2), {{"user", "x"}, {"tool", "y"}}, "messages[1].role");
}

}  // namespace
}  // namespace passel
