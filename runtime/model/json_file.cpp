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

constexpr int kMaxDepth = 64;

}  // namespace

nlohmann::json ParseJson(std::string_view text, const std::string& where) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the open objects and arrays
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxDepth) {
          throw Error(ErrorClass::kModel,
                      fmt::format("{}: nests deeper than {} levels", where, kMaxDepth));
        }
        keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key:
        if (!keys.back().insert(parsed.get<std::string>()).second) {
          throw Error(ErrorClass::kModel, fmt::format("{}: key \"{}\" is given twice", where,
                                                      Printable(parsed.get<std::string>())));
        }
        break;
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception& e) {
    throw Error(ErrorClass::kModel,
                fmt::format("{}: expected JSON: {}", where, Printable(e.what(), 300)));
  }
}

nlohmann::json ParseJsonFile(const std::string& path, uint64_t max_bytes) {
  const MappedFile file(path);
  if (file.bytes().size() > max_bytes) {
    throw Error(ErrorClass::kModel, fmt::format("{}: has {} bytes; expected at most {}", path,
                                                file.bytes().size(), max_bytes));
  }
  return ParseJson({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, path);
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
