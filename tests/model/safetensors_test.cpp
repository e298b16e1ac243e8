// The safetensors container.

#include "runtime/model/safetensors.h"

#include <gtest/gtest.h>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "tests/model/gguf_writer.h"

namespace passel::model {
namespace {

std::string WithHeader(const std::string& header, const std::string& data) {
  return Bytes().Text(header).str() + data;
}

// Expects Error{kModel} of a file with this header and data.
void ExpectHeaderRefused(const std::string& header, const std::string& data,
                         const std::string& part) {
  const TempPath path(".safetensors", WithHeader(header, data));
  try {
    SafetensorsFile file(path.str());
    FAIL() << "expected an error with \"" << part << "\"";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

std::string Entry(const std::string& shape, const std::string& offsets,
                  const std::string& dtype = "F32") {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

TEST(Safetensors, RefusesHostileHeaders) {
  const std::string data(16, 'x');
  const auto one = [](const std::string& entry) { return "{\"a\":" + entry + "}"; };
  ExpectHeaderRefused("[]", "", "JSON object");
  ExpectHeaderRefused("{", "", "expected JSON");
  ExpectHeaderRefused("{} {}", "", "expected JSON");
  ExpectHeaderRefused(one(Entry("[4]", "[0,16]", "F33")), data, "F33");
  ExpectHeaderRefused(one(Entry("[-4]", "[0,16]")), data, "shape");
  ExpectHeaderRefused(one(Entry("[4.0]", "[0,16]")), data, "shape");
  ExpectHeaderRefused(one(Entry("[1,1,1,1,1,1,1,1,4]", "[0,16]")), data, "shape");
  ExpectHeaderRefused(one(Entry("[5]", "[0,16]")), data, "spans 16 bytes");
  ExpectHeaderRefused(one(Entry("[4]", "[0,17]")), data, "within");
  ExpectHeaderRefused(one(Entry("[4]", "[16,0]")), data, "within");
  ExpectHeaderRefused(one(Entry("[4]", "[0]")), data, "two sizes");
  ExpectHeaderRefused(one(Entry("[3]", "[4,16]")), data, "begins at 4");
  ExpectHeaderRefused(one(Entry("[3]", "[0,12]")), data, "16 bytes of data");
  // 2^62 · 4 and 2^32 · 2^32 wrap to 0.
  ExpectHeaderRefused(one(Entry("[4611686018427387904]", "[0,0]")), "", "spans");
  ExpectHeaderRefused(one(Entry("[4294967296,4294967296]", "[0,0]")), "", "spans");
  ExpectHeaderRefused("{\"a\":" + Entry("[2]", "[0,8]") + ",\"b\":" + Entry("[3]", "[4,16]") + "}",
                      data, "begins at 4");
  ExpectHeaderRefused("{\"a\":" + Entry("[4]", "[0,16]") + ",\"a\":" + Entry("[4]", "[0,16]") + "}",
                      data, "given twice");
  for (const uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, ~uint64_t{0}}) {
    const TempPath path(".safetensors", Bytes().Put(length).str());
    EXPECT_THROW(SafetensorsFile file(path.str()), Error);
  }
}

TEST(Safetensors, TruncatedAndCorruptFilesNeverCrash) {
  const std::string whole = WithHeader(
      "{\"a\":" + Entry("[2,2]", "[0,16]") + ",\"b\":" + Entry("[1]", "[16,18]", "F16") + "}",
      std::string(18, 'x'));
  {
    const TempPath path(".safetensors", whole);
    EXPECT_EQ(SafetensorsFile(path.str()).tensors().at("a").rows, 2);
  }
  for (size_t size = 0; size < whole.size(); ++size) {
    const TempPath path(".safetensors", whole.substr(0, size));
    EXPECT_THROW(SafetensorsFile file(path.str()), Error) << size;
  }
  Random random(8);
  for (int trial = 0; trial < 3000; ++trial) {
    std::string bytes = whole;
    bytes[random.Next() % bytes.size()] = static_cast<char>(random.Next());
    const TempPath path(".safetensors", bytes);
    try {
      const SafetensorsFile file(path.str());
      EXPECT_EQ(file.tensor_bytes(), 18u);
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    }
  }
}

}  // namespace
}  // namespace passel::model
