#include "cluster/config.h"

#include <fmt/format.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "cluster/config_fields.h"
#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::cluster {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::TextFormat;

constexpr size_t kMaxConfigBytes = 1u << 20;

// Where each field was set, by path: "file:line:column" or "--set a.b=c".
using Origins = std::map<std::string, std::string, std::less<>>;

[[noreturn]] void Throw(const std::string& where, const std::string& what) {
  throw Error(ErrorClass::kUsage, where.empty() ? what : where + ": " + what);
}

// Keeps the first error, in the user's terms; later ones tend to follow from it.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  FirstError(std::string path, std::string_view text) : path_(std::move(path)), text_(text) {}
  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    if (!first_.empty()) return;
    if (message.find("Unknown enumeration value") == 0) FindValue(message, &line, &column);
    const std::string where =
        line < 0 ? path_ : fmt::format("{}:{}:{}", path_, line + 1, column + 1);
    first_ = where + ": " + message + Hint(message);
  }
  const std::string& first() const { return first_; }

 private:
  // The parser says what it does not know; this adds what it would.
  static std::string Hint(const std::string& message) {
    const auto quoted = [&](size_t from) {
      const size_t begin = message.find('"', from);
      if (begin == std::string::npos) return std::string();
      return message.substr(begin + 1, message.find('"', begin + 1) - begin - 1);
    };
    if (message.find("has no field named") != std::string::npos) {
      const auto* type =
          google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(quoted(0));
      if (type != nullptr) return " Expected " + ListNames(*type) + ".";
    }
    const size_t field_at = message.find("for field ");
    if (message.find("Unknown enumeration value") == 0 && field_at != std::string::npos) {
      const std::string name = quoted(field_at);
      config::Config schema;
      for (const FieldRule& rule : FieldRules()) {
        const auto* field = FindField(schema, rule.path).field;
        if (field->name() == name && field->enum_type() != nullptr) {
          return " Expected " + ListNames(*field->enum_type()) + ".";
        }
      }
    }
    return "";
  }

  // The parser places a value of no enum at the token that follows; this finds the value itself.
  void FindValue(const std::string& message, int* line, int* column) const {
    const size_t begin = message.find('"') + 1;
    const std::string value = message.substr(begin, message.find('"', begin) - begin);
    size_t end = 0;  // of the text in front of that token
    for (int i = 0; i < *line && end < text_.size(); ++i) end = text_.find('\n', end) + 1;
    end = std::min(end + static_cast<size_t>(std::max(*column, 0)), text_.size());
    const size_t at = text_.substr(0, end).rfind(value);
    if (at == std::string_view::npos) return;
    const std::string_view before = text_.substr(0, at);
    *line = static_cast<int>(std::count(before.begin(), before.end(), '\n'));
    *column = static_cast<int>(at - (before.rfind('\n') + 1));
  }

  std::string path_;
  std::string_view text_;
  std::string first_;
};

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) Throw("config " + path, std::strerror(errno));
  std::string text(kMaxConfigBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (in.bad() || (in.fail() && !in.eof())) Throw("config " + path, "cannot be read");
  text.resize(static_cast<size_t>(in.gcount()));
  if (text.size() > kMaxConfigBytes) Throw("config " + path, "larger than 1 MiB: not a config");
  return text;
}

void ParseFile(const std::string& path, config::Config& config, Origins& origins) {
  const std::string text = ReadFile(path);
  FirstError errors(path, text);
  TextFormat::ParseInfoTree places;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  parser.WriteLocationsTo(&places);
  if (!parser.ParseFromString(text, &config)) {
    throw Error(ErrorClass::kUsage,
                errors.first().empty() ? path + ": not Protobuf text" : errors.first());
  }
  const auto* top = config.GetDescriptor();
  for (int s = 0; s < top->field_count(); ++s) {
    const auto* section = top->field(s);
    auto* section_places = places.GetTreeForNested(section, -1);
    if (section_places == nullptr) continue;
    for (int f = 0; f < section->message_type()->field_count(); ++f) {
      const auto* field = section->message_type()->field(f);
      const auto place = section_places->GetLocation(field, field->is_repeated() ? 0 : -1);
      if (place.line < 0) continue;
      origins[section->name() + "." + field->name()] =
          fmt::format("{}:{}:{}", path, place.line + 1, place.column + 1);
    }
  }
}

void Override(const std::string& text, config::Config& config, Origins& origins) {
  const std::string origin = "--set " + text;
  const size_t equals = text.find('=');
  if (equals == std::string::npos) Throw(origin, "expected section.field=value");
  const std::string path = text.substr(0, equals);
  try {
    SetFromText(FindField(config, path), path, std::string_view(text).substr(equals + 1));
  } catch (const Error& e) {
    Throw(origin, e.what());
  }
  origins[path] = origin;
}

void FillDefaults(config::Config& config) {
  for (const FieldRule& rule : FieldRules()) {
    const FieldPlace place = FindField(config, rule.path);
    if (place.field->is_repeated()) continue;
    if (!place.section->GetReflection()->HasField(*place.section, place.field)) {
      SetFromText(place, rule.path, rule.default_text);
    }
  }
}

std::string ValueText(const FieldPlace& place) {
  std::string text;
  TextFormat::PrintFieldValueToString(*place.section, place.field, -1, &text);
  return text;
}

double NumberOf(const FieldPlace& place) {
  const auto* reflection = place.section->GetReflection();
  switch (place.field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection->GetUInt32(*place.section, place.field);
    case FieldDescriptor::CPPTYPE_UINT64:
      return static_cast<double>(reflection->GetUInt64(*place.section, place.field));
    default:
      return reflection->GetDouble(*place.section, place.field);
  }
}

void CheckField(const FieldRule& rule, const FieldPlace& place, const std::string& where) {
  if (place.field->is_repeated()) return;
  if (place.field->cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
    // Protobuf text takes an enum's number too, and any number.
    const int value = place.section->GetReflection()->GetEnumValue(*place.section, place.field);
    if (place.field->enum_type()->FindValueByNumber(value) == nullptr) {
      Throw(where, fmt::format("{} is {}; expected {}", rule.path, value,
                               ListNames(*place.field->enum_type())));
    }
    return;
  }
  if (rule.min) {
    const double value = NumberOf(place);
    if (!(value >= *rule.min && value <= *rule.max)) {  // NaN is out of range
      Throw(where, fmt::format("{} is {}; expected {} … {}", rule.path, ValueText(place), *rule.min,
                               *rule.max));
    }
  }
  if (!rule.only.empty() && ValueText(place) != rule.only) {
    Throw(where, fmt::format("{} is {}; only {} is served so far", rule.path, ValueText(place),
                             rule.only));
  }
}

void CheckAll(config::Config& config, const Origins& origins) {
  const auto origin = [&](std::string_view path) {
    const auto it = origins.find(path);
    return it == origins.end() ? std::string() : it->second;
  };
  for (const FieldRule& rule : FieldRules()) {
    CheckField(rule, FindField(config, rule.path), origin(rule.path));
  }
  const auto& attention = config.attention();
  if (attention.no_dense_layers() && attention.dense_layers_size() > 0) {
    Throw(
        origin("attention.no_dense_layers"),
        "attention.no_dense_layers is true, yet attention.dense_layers names layers; expected one "
        "of the two");
  }
}

}  // namespace

config::Config LoadConfig(const std::string& path, std::span<const std::string> overrides) {
  config::Config config;
  Origins origins;
  if (!path.empty()) ParseFile(path, config, origins);
  for (const std::string& text : overrides) Override(text, config, origins);
  FillDefaults(config);
  CheckAll(config, origins);
  return config;
}

std::string CanonicalText(const config::Config& config) {
  std::string text;
  Check(TextFormat::PrintToString(config, &text), "printing the config");
  return text;
}

uint64_t ConfigHash(const config::Config& config) {
  const std::string text = CanonicalText(config);
  return HashBytes(text.data(), text.size());
}

std::vector<uint32_t> DenseLayers(const config::Attention& attention, uint32_t layers) {
  std::vector<uint32_t> dense;
  if (attention.no_dense_layers()) return dense;
  if (attention.dense_layers_size() == 0) {
    for (uint32_t layer = 0; layer < layers; layer += 16) dense.push_back(layer);
    return dense;
  }
  for (const uint32_t layer : attention.dense_layers()) {
    if (layer >= layers) {
      Throw("", fmt::format("attention.dense_layers names layer {}; the model has {} layers, "
                            "numbered from 0",
                            layer, layers));
    }
    dense.push_back(layer);
  }
  std::sort(dense.begin(), dense.end());
  dense.erase(std::unique(dense.begin(), dense.end()), dense.end());
  return dense;
}

}  // namespace passel::cluster
