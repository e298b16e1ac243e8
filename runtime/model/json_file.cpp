#include "runtime/model/json_file.h"

#include <fmt/format.h>

#include <limits>
#include <set>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/mapped_file.h"

namespace passel::model {
namespace {

constexpr size_t kMaxDepth = 64;
// A value takes up to some 100 bytes of memory, in text as few as two. The largest tokenizer.json
// known has 2.3 million values; the header of a million safetensors, 7 million.
constexpr uint64_t kMaxValues = uint64_t{1} << 23;

// Reads JSON without keeping it, and throws where it is not what ParseJson returns.
class Checker final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Checker(const std::string& where) : where_(where) {}

  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) {
      Fail(fmt::format("key \"{}\" is given twice", Printable(name)));
    }
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& e) override {
    Fail(fmt::format("expected JSON: {}", Printable(e.what(), 300)));
  }

 private:
  bool Value() {
    if (++values_ > kMaxValues) Fail(fmt::format("has more than {} values", kMaxValues));
    return true;
  }
  bool Open() {
    if (keys_.size() >= kMaxDepth) Fail(fmt::format("nests deeper than {} levels", kMaxDepth));
    keys_.emplace_back();
    return Value();
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }
  [[noreturn]] void Fail(const std::string& what) const {
    throw Error(ErrorClass::kModel, fmt::format("{}: {}", where_, what));
  }

  const std::string& where_;
  std::vector<std::set<std::string>> keys_;  // of the open objects and arrays
  uint64_t values_ = 0;
};

MappedFile OpenBounded(const std::string& path, uint64_t max_bytes) {
  MappedFile file(path);
  if (file.bytes().size() > max_bytes) {
    throw Error(ErrorClass::kModel, fmt::format("{}: has {} bytes; expected at most {}", path,
                                                file.bytes().size(), max_bytes));
  }
  return file;
}

std::string_view Text(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

nlohmann::json ParseJson(std::string_view text, const std::string& where) {
  Checker checker(where);
  nlohmann::json::sax_parse(text.begin(), text.end(), &checker);
  return nlohmann::json::parse(text.begin(), text.end());
}

nlohmann::json ParseJsonFile(const std::string& path, uint64_t max_bytes) {
  const MappedFile file = OpenBounded(path, max_bytes);
  return ParseJson(Text(file), path);
}

std::string ReadTextFile(const std::string& path, uint64_t max_bytes) {
  const MappedFile file = OpenBounded(path, max_bytes);
  return std::string(Text(file));
}

JsonObject::JsonObject(const nlohmann::json& json, const std::string& where)
    : json_(json), where_(where) {
  if (!json.is_object()) {
    throw Error(ErrorClass::kModel, where + ": expected a JSON object");
  }
}

void JsonObject::Fail(std::string_view key, const std::string& what) const {
  throw Error(ErrorClass::kModel, fmt::format("{}: {}: {}", where_, Printable(key), what));
}

const nlohmann::json* JsonObject::Find(const char* key) const {
  const auto it = json_.find(key);
  return it == json_.end() || it->is_null() ? nullptr : &*it;
}

int64_t JsonObject::Int(const char* key) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) Fail(key, "is missing; expected an integer");
  const bool too_large = value->is_number_unsigned() &&
                         value->get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
  if (!value->is_number_integer() || too_large) Fail(key, "expected an integer below 2^63");
  return value->get<int64_t>();
}

int64_t JsonObject::IntOr(const char* key, int64_t otherwise) const {
  return Find(key) == nullptr ? otherwise : Int(key);
}

int32_t JsonObject::Int32(const char* key) const {
  const int64_t value = Int(key);
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    Fail(key, fmt::format("is {}; expected a 32-bit integer", value));
  }
  return static_cast<int32_t>(value);
}

int32_t JsonObject::Int32Or(const char* key, int32_t otherwise) const {
  return Find(key) == nullptr ? otherwise : Int32(key);
}

double JsonObject::NumberOr(const char* key, double otherwise) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_number()) Fail(key, "expected a number");
  return value->get<double>();
}

bool JsonObject::BoolOr(const char* key, bool otherwise) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) Fail(key, "expected true or false");
  return value->get<bool>();
}

std::string JsonObject::StringOr(const char* key, const std::string& otherwise) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_string()) Fail(key, "expected a string");
  return value->get<std::string>();
}

}  // namespace passel::model
