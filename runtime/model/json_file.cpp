#include "runtime/model/json_file.h"

#include <fmt/format.h>

#include <limits>
#include <utility>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/mapped_file.h"

namespace passel::model {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;
// A value takes up to some 100 bytes of memory, in text as few as two. The largest tokenizer.json
// known has 2.3 million values; the header of a million safetensors, 7 million.
constexpr uint64_t kMaxValues = uint64_t{1} << 23;

// Builds a value as it is read, and throws where it is not what ParseJson returns.
class Builder final : public nlohmann::json_sax<json> {
 public:
  explicit Builder(const std::string& where) : where_(where) {}

  bool null() override { return Put(nullptr); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_unsigned(number_unsigned_t value) override { return Put(value); }
  bool number_float(number_float_t value, const string_t&) override { return Put(value); }
  bool string(string_t& value) override { return Put(std::move(value)); }
  bool binary(binary_t& value) override { return Put(std::move(value)); }
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    const auto [member, is_new] = open_.back()->emplace(name, nullptr);
    if (!is_new) Fail(fmt::format("key \"{}\" is given twice", Printable(name)));
    place_ = &*member;
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& e) override {
    Fail(fmt::format("expected JSON: {}", Printable(e.what(), 300)));
  }

  json root;

 private:
  bool Put(json value) {
    if (++values_ > kMaxValues) Fail(fmt::format("has more than {} values", kMaxValues));
    if (!open_.empty() && open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      place_ = &open_.back()->back();
    } else {
      *place_ = std::move(value);
    }
    return true;
  }
  bool Open(json empty) {
    if (open_.size() >= kMaxDepth) Fail(fmt::format("nests deeper than {} levels", kMaxDepth));
    Put(std::move(empty));
    open_.push_back(place_);
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }
  [[noreturn]] void Fail(const std::string& what) const {
    throw Error(ErrorClass::kModel, fmt::format("{}: {}", where_, what));
  }

  const std::string& where_;
  json* place_ = &root;      // of the value that was read last, or of the next one in an object
  std::vector<json*> open_;  // the objects and arrays that are not closed yet
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

json ParseJson(std::string_view text, const std::string& where) {
  Builder builder(where);
  json::sax_parse(text.begin(), text.end(), &builder);
  return std::move(builder.root);
}

json ParseJsonFile(const std::string& path, uint64_t max_bytes) {
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
