// Every tensor type against gguf-py; tests/fixtures/README.md.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/model/element_type.h"

namespace passel::model {
namespace {

std::vector<uint8_t> FromHex(const std::string& hex) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoul(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

TEST(Dequantize, EveryTypeMatchesTheReferenceBitByBit) {
  std::ifstream file(PASSEL_SOURCE_DIR "/tests/fixtures/dequantize.json");
  ASSERT_TRUE(file.is_open());
  int types = 0;
  const nlohmann::json fixture = nlohmann::json::parse(file);
  for (const auto& [name, entry] : fixture.items()) {
    const ElementLayout* layout = FindLayout(entry["type"].get<uint32_t>());
    ASSERT_NE(layout, nullptr) << name;
    EXPECT_EQ(layout->name, name);
    const std::vector<uint8_t> bytes = FromHex(entry["hex"]), values = FromHex(entry["values"]);
    std::vector<float> expected(values.size() / sizeof(float));
    std::memcpy(expected.data(), values.data(), values.size());
    const auto blocks = static_cast<int64_t>(bytes.size()) / layout->bytes;
    ASSERT_EQ(blocks * layout->block, static_cast<int64_t>(expected.size())) << name;
    ASSERT_GE(expected.size(), 64u);
    std::vector<float> out(expected.size());
    Dequantize(layout->type, bytes.data(), blocks, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(expected[i]))
          << name << " " << i << ": " << out[i] << " and " << expected[i];
    }
    ++types;
  }
  EXPECT_EQ(types, 11);
}

TEST(Dequantize, HalfPrecisionExtremes) {
  const uint16_t bits[] = {0x0001, 0x8001, 0x03ff, 0x0400, 0x7bff, 0x7c00, 0xfc00, 0x7e00, 0x8000};
  float out[9];
  Dequantize(ElementType::kF16, reinterpret_cast<const uint8_t*>(bits), 9, out);
  EXPECT_EQ(out[0], 0x1p-24f);
  EXPECT_EQ(out[1], -0x1p-24f);
  EXPECT_EQ(out[2], 1023 * 0x1p-24f);
  EXPECT_EQ(out[3], 0x1p-14f);
  EXPECT_EQ(out[4], 65504.0f);
  EXPECT_EQ(out[5], std::numeric_limits<float>::infinity());
  EXPECT_EQ(out[6], -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(out[7]));
  EXPECT_TRUE(out[8] == 0 && std::signbit(out[8]));
}

TEST(Dequantize, UnknownTypesHaveNoLayout) {
  EXPECT_EQ(FindLayout(4), nullptr);
  EXPECT_EQ(FindLayout(~0u), nullptr);
}

}  // namespace
}  // namespace passel::model
