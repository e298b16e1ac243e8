#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "runtime/base/random.h"
#include "runtime/engine/request_io.h"
#include "tests/engine/test_tokenizer.h"

namespace passel::engine {
namespace {

using nlohmann::json;

class RequestParsing : public testing::Test {
 protected:
  Request Parse(const std::string& text, uint64_t line = 7) const {
    return ParseRequest(text, line, *tokenizer_, {.seed = 5, .context_length = 100});
  }
  // Parses a request that must be wrong; the error.
  std::string ErrorOf(const std::string& text) const {
    const Request r = Parse(text);
    if (!r.error) {
      ADD_FAILURE() << "taken: " << text;
      return "";
    }
    EXPECT_EQ(r.error->find('\n'), std::string::npos) << *r.error;
    EXPECT_EQ(r.error->rfind("line 7: ", 0), 0u) << *r.error;
    return *r.error;
  }

  const std::unique_ptr<Tokenizer> tokenizer_ = ByteTokenizer();
};

TEST_F(RequestParsing, BarePromptGetsTheDefaults) {
  const Request r = Parse(R"({"prompt": "abc"})");
  ASSERT_FALSE(r.error) << *r.error;
  EXPECT_EQ(r.custom_id, "line-7");
  EXPECT_FALSE(r.chat);
  EXPECT_EQ(r.prompt, (std::vector<int32_t>{'a', 'b', 'c'}));
  EXPECT_EQ(r.max_tokens, 16);
  EXPECT_EQ(r.sampling.temperature, 1.0);
  EXPECT_EQ(r.sampling.top_p, 1.0);
  EXPECT_EQ(r.sampling.top_logprobs, -1);
  EXPECT_TRUE(r.stop.empty());
  EXPECT_FALSE(r.ignore_eos);
  EXPECT_FALSE(r.return_token_ids);
}

TEST_F(RequestParsing, BatchFormWithEveryField) {
  const Request r = Parse(R"({"custom_id": "x", "method": "POST", "url": "/v1/completions",
    "body": {"model": "any", "prompt": [1, 2, 257], "max_tokens": 9, "temperature": 0.25,
    "top_p": 0.5, "seed": 12, "stop": ["a", "b"], "logprobs": 3, "ignore_eos": true,
    "return_token_ids": true, "n": 1}})");
  ASSERT_FALSE(r.error) << *r.error;
  EXPECT_EQ(r.custom_id, "x");
  EXPECT_EQ(r.prompt, (std::vector<int32_t>{1, 2, 257}));
  EXPECT_EQ(r.max_tokens, 9);
  EXPECT_EQ(r.sampling.temperature, 0.25);
  EXPECT_EQ(r.sampling.top_p, 0.5);
  EXPECT_EQ(r.sampling.seed, 12u);
  EXPECT_EQ(r.sampling.top_logprobs, 3);
  EXPECT_EQ(r.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(r.ignore_eos);
  EXPECT_TRUE(r.return_token_ids);
}

TEST_F(RequestParsing, NullsAreAbsent) {
  const Request r = Parse(R"({"custom_id": null, "body": null, "prompt": "a", "max_tokens": null,
    "seed": null, "stop": null, "temperature": null, "messages": null, "logprobs": null})");
  ASSERT_FALSE(r.error) << *r.error;
  EXPECT_EQ(r.custom_id, "line-7");
  EXPECT_EQ(r.max_tokens, 16);
}

TEST_F(RequestParsing, ChatGoesThroughTheTemplateAndMayFillTheContext) {
  const Request r = Parse(R"({"custom_id": "c", "url": "/v1/chat/completions", "body":
    {"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 4,
     "stop": "x"}})");
  ASSERT_FALSE(r.error) << *r.error;
  EXPECT_TRUE(r.chat);
  const std::string text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
  EXPECT_EQ(r.prompt, tokenizer_->Encode(text, true));
  EXPECT_EQ(r.prompt.front(), 256);
  EXPECT_EQ(r.max_tokens, 100 - static_cast<int64_t>(r.prompt.size()));
  EXPECT_EQ(r.sampling.top_logprobs, 4);
  EXPECT_EQ(r.stop, std::vector<std::string>{"x"});
  const Request off = Parse(R"({"messages": [{"role": "user", "content": "hi"}],
    "logprobs": false, "top_logprobs": 4, "max_completion_tokens": 3, "max_tokens": 2})");
  ASSERT_FALSE(off.error) << *off.error;
  EXPECT_EQ(off.sampling.top_logprobs, -1);
  EXPECT_EQ(off.max_tokens, 3);
}

TEST_F(RequestParsing, AMissingSeedDerivesFromConfigAndCustomId) {
  const auto seed = [&](const std::string& id, uint64_t config_seed) {
    const json line = {{"custom_id", id}, {"prompt", "a"}};
    return ParseRequest(line.dump(), 1, *tokenizer_, {config_seed, 100}).sampling.seed;
  };
  EXPECT_EQ(seed("a", 1), seed("a", 1));
  EXPECT_NE(seed("a", 1), seed("b", 1));
  EXPECT_NE(seed("a", 1), seed("a", 2));
}

TEST_F(RequestParsing, SeedsOfAll64Bits) {
  EXPECT_EQ(Parse(R"({"prompt": "a", "seed": 18446744073709551615})").sampling.seed,
            std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(Parse(R"({"prompt": "a", "seed": -1})").sampling.seed,
            std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(Parse(R"({"prompt": "a", "seed": 0})").sampling.seed, 0u);
}

TEST_F(RequestParsing, LinesThatAreNoRequests) {
  for (const char* text : {"{", "[]", "3", "null", "\"x\"", "{\"prompt\": \"a\"} x", "\x80",
                           "{\"prompt\": \"\xff\xfe\"}"}) {
    EXPECT_NE(ErrorOf(text).find("expected one JSON object a line"), std::string::npos) << text;
  }
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  EXPECT_NE(ErrorOf(deep).find("expected one JSON object"), std::string::npos);
}

TEST_F(RequestParsing, EveryBadFieldIsNamedWithWhatWasExpected) {
  struct Case {
    const char* extra;  // beside the prompt
    const char* field;
  };
  for (const Case& c : std::vector<Case>{{R"("custom_id": 3)", "custom_id: expected a non-empty"},
                                         {R"("custom_id": "")", "custom_id: expected a non-empty"},
                                         {R"("method": "GET")", "method: expected POST"},
                                         {R"("method": 1)", "method: expected POST"},
                                         {R"("url": "/v1/embeddings")", "url: expected /v1/"},
                                         {R"("body": [])", "body: expected an object"},
                                         {R"("max_tokens": 0)", "max_tokens: expected a whole"},
                                         {R"("max_tokens": -5)", "max_tokens: expected a whole"},
                                         {R"("max_tokens": 1.5)", "max_tokens: expected a whole"},
                                         {R"("max_tokens": "9")", "max_tokens: expected a whole"},
                                         {R"("max_tokens": 18446744073709551615)", "max_tokens: "},
                                         {R"("max_tokens": 9223372036854775807)", "max_tokens: "},
                                         {R"("max_tokens": 1e99)", "max_tokens: expected a whole"},
                                         {R"("max_completion_tokens": 0)", "max_completion_tokens"},
                                         {R"("temperature": -0.1)", "temperature: expected a num"},
                                         {R"("temperature": 101)", "temperature: expected a num"},
                                         {R"("temperature": "1")", "temperature: expected a num"},
                                         {R"("top_p": 0)", "top_p: expected a number above 0"},
                                         {R"("top_p": 1.01)", "top_p: expected a number above 0"},
                                         {R"("seed": 1.5)", "seed: expected a whole number"},
                                         {R"("seed": "1")", "seed: expected a whole number"},
                                         {R"("stop": 3)", "stop: expected a string or an array"},
                                         {R"("stop": ["a", 3])", "stop: expected a string or"},
                                         {R"("stop": "")", "stop: expected strings that are not"},
                                         {R"("stop": ["a", ""])", "stop: expected strings that"},
                                         {R"("logprobs": 21)", "logprobs: expected at most 20"},
                                         {R"("logprobs": -1)", "logprobs: expected a whole number"},
                                         {R"("logprobs": "x")", "logprobs: expected a whole"},
                                         {R"("ignore_eos": 1)", "ignore_eos: expected true or"},
                                         {R"("return_token_ids": 0)", "return_token_ids: expected"},
                                         {R"("n": 2)", "n: expected 1"},
                                         {R"("messages": [])", "expected either prompt or mess"}}) {
    const std::string text = R"({"prompt": "a", )" + std::string(c.extra) + "}";
    EXPECT_NE(ErrorOf(text).find(c.field), std::string::npos)
        << text << " gave: " << Parse(text).error.value_or("no error");
  }
}

TEST_F(RequestParsing, BadPrompts) {
  const auto expect = [&](const std::string& text, const std::string& part) {
    EXPECT_NE(ErrorOf(text).find(part), std::string::npos)
        << text << " gave: " << Parse(text).error.value_or("no error");
  };
  expect("{}", "expected either prompt or messages");
  expect(R"({"prompt": 3})", "prompt: expected a string or an array of token ids");
  expect(R"({"prompt": ""})", "prompt: expected at least one token");
  expect(R"({"prompt": []})", "prompt: expected at least one token");
  expect(R"({"prompt": [1, 258]})", "prompt[1]: expected a token id below 258");
  const char* pad = "expected no \"[PAD]\": its token id, 258, is not below the model's 258";
  expect(R"({"prompt": "a[PAD]"})", std::string("prompt: ") + pad);
  expect(R"({"messages": [{"role": "user", "content": "[PAD]"}]})",
         std::string("messages: ") + pad);
  expect(R"({"prompt": [-1]})", "prompt[0]: expected a token id");
  expect(R"({"prompt": [18446744073709551615]})", "prompt[0]: expected a token id");
  expect(R"({"prompt": [4294967297]})", "prompt[0]: expected a token id");
  expect(R"({"prompt": [1, 1.5]})", "prompt[1]: expected a token id");
  expect(R"({"prompt": ["a"]})", "prompt[0]: expected a token id");
  expect(R"({"messages": "hi"})", "messages: expected a non-empty array");
  expect(R"({"messages": []})", "messages: expected a non-empty array");
  expect(R"({"messages": [3]})", "messages[0]: expected an object");
  expect(R"({"messages": [{"content": "a"}]})", "messages[0].role: expected a string");
  expect(R"({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]})",
         "messages[1].content: expected a string");
  expect(R"({"messages": [{"role": "wizard", "content": "a"}]})", "wizard");
  expect(R"({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 21,
          "logprobs": true})",
         "top_logprobs: expected at most 20");
}

TEST_F(RequestParsing, PromptAndOutputMustFitTheContext) {
  const auto with = [&](size_t prompt, int64_t max_tokens) {
    return Parse(json{{"prompt", std::string(prompt, 'a')}, {"max_tokens", max_tokens}}.dump());
  };
  EXPECT_FALSE(with(90, 10).error);
  const Request over = with(90, 11);
  ASSERT_TRUE(over.error);
  EXPECT_NE(over.error->find("90 tokens and max_tokens is 11"), std::string::npos) << *over.error;
  EXPECT_NE(over.error->find("at most 100"), std::string::npos) << *over.error;
  EXPECT_TRUE(with(200, 1).error);
  EXPECT_TRUE(with(1, int64_t{1} << 40).error);
  const json chat = {
      {"messages", json::array({{{"role", "user"}, {"content", std::string(200, 'a')}}})}};
  EXPECT_TRUE(Parse(chat.dump()).error);
}

TEST_F(RequestParsing, RandomMutationsNeverThrow) {
  const std::string valid =
      R"({"custom_id":"x","method":"POST","url":"/v1/completions","body":{"prompt":[1,2],)"
      R"("max_tokens":9,"temperature":0.5,"top_p":0.5,"seed":12,"stop":["a"],"logprobs":3}})";
  ASSERT_FALSE(Parse(valid).error);
  Random random(1);
  int taken = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = valid;
    for (uint64_t i = 0; i <= random.Next() % 3; ++i) {
      text[random.Next() % text.size()] = static_cast<char>(random.Next());
    }
    if (random.Next() % 8 == 0) text.resize(random.Next() % text.size());
    taken += !Parse(text).error;
  }
  EXPECT_GT(taken, 100);
  EXPECT_LT(taken, 15000);
}

TEST_F(RequestParsing, ResultsAreOneValidLineWhateverTheBytes) {
  Request request = Parse(R"({"custom_id": "x\ny", "prompt": "ab", "logprobs": 1})");
  ASSERT_FALSE(request.error);
  request.id = RequestId(4);
  request.return_token_ids = true;
  Result result;
  result.text = "bad \xff bytes\n";
  result.tokens = {0xff, 'a'};
  result.logprobs = {{{0xff, -0.5f}, {'a', -1.0f}}, {{'a', 0.0f}, {'b', -9.0f}}};
  result.finish = FinishReason::kStop;
  result.sampled_fraction = 0.25;
  const std::string line = FormatResult(request, result, *tokenizer_);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const json j = json::parse(line);
  EXPECT_EQ(j["custom_id"], "x\ny");
  EXPECT_TRUE(j["error"].is_null());
  EXPECT_EQ(j["response"]["status_code"], 200);
  const json& body = j["response"]["body"];
  EXPECT_EQ(body["choices"][0]["text"], "bad \xef\xbf\xbd bytes\n");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(body["choices"][0]["token_ids"], (std::vector<int>{0xff, 'a'}));
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"].size(), 2u);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 2);
  EXPECT_EQ(body["usage"]["completion_tokens"], 2);
  EXPECT_EQ(body["usage"]["total_tokens"], 4);
  EXPECT_EQ(body["usage"]["sampled_fraction"], 0.25);

  const json failed = json::parse(FormatError(request, 507, "no room \xff"));
  EXPECT_EQ(failed["custom_id"], "x\ny");
  EXPECT_EQ(failed["response"]["status_code"], 507);
  EXPECT_EQ(failed["error"]["code"], 507);
  EXPECT_EQ(failed["error"]["message"], "no room \xef\xbf\xbd");
}

}  // namespace
}  // namespace passel::engine
