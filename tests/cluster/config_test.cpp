#include "cluster/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "cluster/config_fields.h"
#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

// A config file that lasts as long as the test.
class ConfigTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            ("passel_config_" + std::to_string(getpid()) + ".textproto");
  }
  void TearDown() override { std::filesystem::remove(path_); }

  config::Config Load(const std::string& text, std::vector<std::string> overrides = {}) {
    std::ofstream(path_) << text;
    return LoadConfig(path_.string(), overrides);
  }
  // The message of the error that loading throws, with the file's name replaced by FILE.
  std::string ErrorOf(const std::string& text, std::vector<std::string> overrides = {}) {
    try {
      Load(text, std::move(overrides));
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kUsage);
      std::string message = e.what();
      const size_t at = message.find(path_.string());
      if (at != std::string::npos) message.replace(at, path_.string().size(), "FILE");
      return message;
    }
    return "(no error)";
  }

  std::filesystem::path path_;
};

TEST_F(ConfigTest, DefaultsFillEveryField) {
  const config::Config config = LoadConfig("", {});
  EXPECT_EQ(config.cluster().model_ranks(), 1u);
  EXPECT_EQ(config.cluster().placement(), config::AUTO);
  EXPECT_EQ(config.cluster().replicas(), 1u);
  EXPECT_EQ(config.cluster().failure_timeout_s(), 30);
  EXPECT_EQ(config.attention().estimator(), config::LSH);
  EXPECT_EQ(config.attention().k(), 10u);
  EXPECT_EQ(config.attention().l(), 150u);
  EXPECT_EQ(config.attention().seed(), 1u);
  EXPECT_EQ(config.attention().sinks(), 4u);
  EXPECT_EQ(config.attention().window(), 64u);
  EXPECT_EQ(config.attention().exact_below(), 2048u);
  EXPECT_EQ(config.attention().dense_layers_size(), 0);
  EXPECT_EQ(config.attention().baseline_fraction(), 0.02);
  EXPECT_EQ(config.host().block_tokens(), 49152u);
  EXPECT_EQ(config.gpu().backend(), config::Gpu::AUTO);
  EXPECT_EQ(config.engine().max_batch(), 64u);
  EXPECT_EQ(config.engine().max_inflight(), 1024u);
  EXPECT_EQ(config.engine().prefill_chunk(), 512u);
  const auto* top = config.GetDescriptor();
  for (int s = 0; s < top->field_count(); ++s) {
    const auto& section = config.GetReflection()->GetMessage(config, top->field(s));
    const auto* type = section.GetDescriptor();
    for (int f = 0; f < type->field_count(); ++f) {
      if (type->field(f)->is_repeated()) continue;
      EXPECT_TRUE(section.GetReflection()->HasField(section, type->field(f)))
          << type->field(f)->full_name();
    }
  }
}

TEST_F(ConfigTest, EveryFieldOfTheSchemaHasOneRule) {
  std::vector<std::string> schema;
  const auto* top = config::Config::descriptor();
  for (int s = 0; s < top->field_count(); ++s) {
    const auto* type = top->field(s)->message_type();
    for (int f = 0; f < type->field_count(); ++f) {
      schema.push_back(top->field(s)->name() + "." + type->field(f)->name());
    }
  }
  std::vector<std::string> rules;
  for (const FieldRule& rule : FieldRules()) rules.emplace_back(rule.path);
  std::sort(schema.begin(), schema.end());
  std::sort(rules.begin(), rules.end());
  EXPECT_EQ(schema, rules);
}

TEST_F(ConfigTest, FileThenOverridesInOrder) {
  const auto config =
      Load("attention { k: 9 l: 120 dense_layers: 0 dense_layers: 16 }\nhost { threads: 2 }",
           {"attention.k=8", "attention.k=7", "attention.dense_layers=3,1", "model.path=a=b c",
            "attention.estimator=TOPK", "gpu.backend=CPU", "engine.deterministic=true",
            "cluster.failure_timeout_s=1.5", "attention.seed=18446744073709551615"});
  EXPECT_EQ(config.attention().k(), 7u);
  EXPECT_EQ(config.attention().l(), 120u);
  ASSERT_EQ(config.attention().dense_layers_size(), 2);
  EXPECT_EQ(config.attention().dense_layers(0), 3u);
  EXPECT_EQ(config.model().path(), "a=b c");
  EXPECT_EQ(config.attention().estimator(), config::TOPK);
  EXPECT_EQ(config.gpu().backend(), config::Gpu::CPU);
  EXPECT_TRUE(config.engine().deterministic());
  EXPECT_EQ(config.cluster().failure_timeout_s(), 1.5);
  EXPECT_EQ(config.attention().seed(), 18446744073709551615u);
  EXPECT_EQ(config.host().threads(), 2u);
}

TEST_F(ConfigTest, AnEmptyListClears) {
  EXPECT_EQ(Load("attention { dense_layers: 5 }", {"attention.dense_layers="})
                .attention()
                .dense_layers_size(),
            0);
}

TEST_F(ConfigTest, SyntaxAndNamesAreReportedWithTheirPlace) {
  EXPECT_EQ(ErrorOf("attention {\n  kk: 3\n}").rfind("FILE:2:", 0), 0u);
  EXPECT_NE(ErrorOf("attention {\n  kk: 3\n}").find("Expected estimator, k, l"), std::string::npos);
  EXPECT_NE(ErrorOf("attention { estimator: LHS }").find("Expected LSH, FULL, TOPK or"),
            std::string::npos);
  EXPECT_EQ(ErrorOf("attention { estimator: LHS }").rfind("FILE:1:", 0), 0u);
  EXPECT_EQ(ErrorOf("attention { k: -1 }").rfind("FILE:1:16: ", 0), 0u);
  EXPECT_EQ(ErrorOf("attention { k: 1 k: 2 }").rfind("FILE:1:", 0), 0u);
  EXPECT_EQ(ErrorOf("attention {").rfind("FILE:1:12: ", 0), 0u);
  EXPECT_EQ(ErrorOf("attention { k: 99999999999 }").rfind("FILE:1:16: ", 0), 0u);
  EXPECT_EQ(ErrorOf("\x01\xff\x00zz").rfind("FILE:1:1: ", 0), 0u);
  EXPECT_NE(ErrorOf("engine { deterministic: 3 }"), "(no error)");
}

TEST_F(ConfigTest, AnEnumsNumberMustExist) {
  EXPECT_EQ(Load("attention { estimator: 1 }").attention().estimator(), config::FULL);
  EXPECT_EQ(ErrorOf("attention { estimator: 9 }"),
            "FILE:1:13: attention.estimator is 9; expected LSH, FULL, TOPK or ORACLE_SAMPLE");
}

TEST_F(ConfigTest, RangesNameTheFieldAndItsPlace) {
  EXPECT_EQ(ErrorOf("host { threads: 1 }\nattention {\n  k: 17\n}"),
            "FILE:3:3: attention.k is 17; expected 1 … 16");
  EXPECT_EQ(ErrorOf("", {"attention.k=0"}),
            "--set attention.k=0: attention.k is 0; expected 1 … 16");
  EXPECT_NE(ErrorOf("cluster { failure_timeout_s: nan }").find("expected 1 … 3600"),
            std::string::npos);
  EXPECT_NE(ErrorOf("attention { baseline_fraction: -inf }").find("expected 0 … 1"),
            std::string::npos);
}

// Each documented range: its ends pass, one step outside does not.
TEST_F(ConfigTest, RangesEndWhereTheyAreDocumentedTo) {
  struct Range {
    const char* path;
    const char *below, *low, *high, *above;
  };
  const Range ranges[] = {
      {"cluster.model_ranks", "0", "1", "1024", "1025"},
      {"cluster.failure_timeout_s", "0.999", "1", "3600", "3600.5"},
      {"attention.k", "0", "1", "16", "17"},
      {"attention.l", "1", "2", "1024", "1025"},
      {"attention.sinks", "-1", "0", "4096", "4097"},
      {"attention.window", "0", "1", "65536", "65537"},
      {"attention.baseline_fraction", "-0.01", "0", "1", "1.01"},
      {"host.block_tokens", "255", "256", "65536", "65537"},
      {"host.threads", "-1", "0", "4096", "4097"},
      {"gpu.threads", "-1", "0", "4096", "4097"},
      {"engine.micro_batches", "-1", "0", "16", "17"},
      {"engine.max_batch", "0", "1", "65536", "65537"},
      {"engine.max_inflight", "0", "1", "1048576", "1048577"},
      {"engine.prefill_chunk", "15", "16", "65536", "65537"},
  };
  for (const Range& range : ranges) {
    const std::string set = std::string(range.path) + "=";
    EXPECT_NE(ErrorOf("", {set + range.below}), "(no error)") << range.path;
    EXPECT_EQ(ErrorOf("", {set + range.low}), "(no error)") << range.path;
    EXPECT_EQ(ErrorOf("", {set + range.high}), "(no error)") << range.path;
    EXPECT_NE(ErrorOf("", {set + range.above}), "(no error)") << range.path;
  }
}

TEST_F(ConfigTest, WhatIsNotServedYetIsRefused) {
  for (const char* set :
       {"cluster.replicas=2", "attention.max_attention_error=0.5", "engine.prefix_sharing=true"}) {
    EXPECT_NE(ErrorOf("", {set}).find("is served so far"), std::string::npos) << set;
  }
  EXPECT_NE(ErrorOf("", {"cluster.replicas=3"}).find("expected 1 … 2"), std::string::npos);
}

TEST_F(ConfigTest, BadOverridesSayWhatWasExpected) {
  const auto expect = [&](const char* set, const char* part) {
    const std::string message = ErrorOf("", {set});
    EXPECT_EQ(message.rfind("--set " + std::string(set) + ": ", 0), 0u) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect("attention.k", "expected section.field=value");
  expect("attention.kk=1", "unknown field 'kk' in 'attention.kk'; expected estimator, k, l");
  expect("attn.k=1", "expected model, cluster, attention, host, gpu or engine");
  expect("attention=1", "is a section");
  expect("attention.k.x=1", "is not a section");
  expect("=1", "unknown field ''");
  expect("attention.k=ten", "expected a whole number");
  expect("attention.k=10 l: 3", "expected a whole number");
  expect("attention.k=", "expected a whole number");
  expect("attention.k=99999999999", "expected a whole number below 2^32");
  expect("attention.estimator=lsh", "expected LSH, FULL, TOPK or ORACLE_SAMPLE");
  expect("engine.deterministic=yes", "expected true or false");
  expect("attention.dense_layers=1,x", "expected whole numbers");
  expect("attention.dense_layers=1,", "after the last comma");
  expect("attention.baseline_fraction=nan", "expected 0 … 1");
}

TEST_F(ConfigTest, UnreadableFiles) {
  try {
    LoadConfig("/nonexistent/c.textproto", {});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kUsage);
    EXPECT_STREQ(e.what(), "config /nonexistent/c.textproto: No such file or directory");
  }
  EXPECT_THROW(LoadConfig("/tmp", {}), Error);
  EXPECT_NE(ErrorOf(std::string((1u << 20) + 1, ' ')).find("1 MiB"), std::string::npos);
}

TEST_F(ConfigTest, EqualSettingsHaveEqualTextAndHash) {
  const auto a = Load("attention { k: 9 }\nengine { max_batch: 4 }");
  const auto b = Load("engine { max_batch: 4 }", {"attention.k=9"});
  EXPECT_EQ(CanonicalText(a), CanonicalText(b));
  EXPECT_EQ(ConfigHash(a), ConfigHash(b));
  EXPECT_NE(ConfigHash(a), ConfigHash(Load("attention { k: 8 }\nengine { max_batch: 4 }")));
  EXPECT_EQ(ConfigHash(Load(CanonicalText(a))), ConfigHash(a));
}

TEST_F(ConfigTest, DenseLayers) {
  using Layers = std::vector<uint32_t>;
  EXPECT_EQ(DenseLayers(Load("").attention(), 33), (Layers{0, 16, 32}));
  EXPECT_EQ(DenseLayers(Load("").attention(), 16), (Layers{0}));
  EXPECT_EQ(DenseLayers(Load("attention { no_dense_layers: true }").attention(), 33), Layers{});
  const auto named = Load("", {"attention.dense_layers=7,2,7"});
  EXPECT_EQ(DenseLayers(named.attention(), 8), (Layers{2, 7}));
  EXPECT_THROW(DenseLayers(named.attention(), 7), Error);
  EXPECT_EQ(ErrorOf("attention {\n dense_layers: 1\n no_dense_layers: true }")
                .rfind("FILE:3:2: attention.no_dense_layers is true", 0),
            0u);
}

TEST_F(ConfigTest, ShippedConfigsLoad) {
  size_t count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(PASSEL_SOURCE_DIR) + "/configs")) {
    if (entry.path().extension() != ".textproto") continue;
    EXPECT_NO_THROW(LoadConfig(entry.path().string(), {})) << entry.path();
    ++count;
  }
  EXPECT_GE(count, 2u);
}

}  // namespace
}  // namespace passel::cluster
