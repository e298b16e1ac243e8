#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace passel::model {

// JSON of a model's files. Throws Error{kModel} naming `where` for what is not well-formed UTF-8
// JSON, gives a key twice in one object, nests deeper than 64 or has more than 2^23 values, whose
// memory is some 100 bytes each and the strings'.
nlohmann::json ParseJson(std::string_view text, const std::string& where);
// The same from a file of at most `max_bytes`.
nlohmann::json ParseJsonFile(const std::string& path, uint64_t max_bytes);
// The text of such a file as it stands.
std::string ReadTextFile(const std::string& path, uint64_t max_bytes);

// Checked access to an object of a file, for messages "where: key: …".
class JsonObject {
 public:
  // Throws where `json` is no object. Both must outlive this.
  JsonObject(const nlohmann::json& json, const std::string& where);

  bool Has(const char* key) const { return json_.contains(key); }  // also null
  // nullptr where the key is absent or null.
  const nlohmann::json* Find(const char* key) const;
  int64_t Int(const char* key) const;
  int64_t IntOr(const char* key, int64_t otherwise) const;
  int32_t Int32(const char* key) const;
  int32_t Int32Or(const char* key, int32_t otherwise) const;
  double NumberOr(const char* key, double otherwise) const;
  bool BoolOr(const char* key, bool otherwise) const;
  std::string StringOr(const char* key, const std::string& otherwise) const;
  [[noreturn]] void Fail(std::string_view key, const std::string& what) const;

 private:
  const nlohmann::json& json_;
  const std::string& where_;
};

}  // namespace passel::model
