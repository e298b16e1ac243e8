#include "cluster/config_fields.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel::cluster {
namespace {

using google::protobuf::FieldDescriptor;

// In the order of the schema; configs/config.proto documents the same values.
constexpr FieldRule kRules[] = {
    {"model.path", ""},
    {"cluster.model_ranks", "1", 1, 1024},
    {"cluster.placement", "AUTO"},
    {"cluster.replicas", "1", 1, 2, "1"},
    {"cluster.failure_timeout_s", "30", 1, 3600},
    {"attention.estimator", "LSH"},
    {"attention.k", "10", 1, 16},
    {"attention.l", "150", 2, 1024},
    {"attention.seed", "1"},
    {"attention.sinks", "4", 0, 4096},
    {"attention.window", "64", 1, 65536},
    {"attention.exact_below", "2048"},
    {"attention.dense_layers", ""},
    {"attention.dense_kv", "MODEL"},
    {"attention.kv_type", "BF16"},
    {"attention.max_attention_error", "0", 0, 1, "0"},
    {"attention.no_dense_layers", "false"},
    {"attention.baseline_fraction", "0.02", 0, 1},
    {"host.memory_bytes", "0"},
    {"host.threads", "0", 0, 4096},
    {"host.block_tokens", "49152", 256, 65536},
    {"gpu.backend", "AUTO"},
    {"gpu.memory_limit_bytes", "0"},
    {"gpu.threads", "0", 0, 4096},
    {"engine.micro_batches", "0", 0, 16},
    {"engine.max_batch", "64", 1, 65536},
    {"engine.max_inflight", "1024", 1, 1048576},
    {"engine.prefill_chunk", "512", 16, 65536},
    {"engine.prefill_part", "0"},
    {"engine.prefix_sharing", "false", std::nullopt, std::nullopt, "false"},
    {"engine.deterministic", "false"},
};

[[noreturn]] void BadValue(std::string_view path, std::string_view text,
                           const std::string& expected) {
  throw Error(ErrorClass::kUsage,
              fmt::format("{} is '{}'; expected {}", path, Printable(text), expected));
}

template <typename T>
T ParseNumber(std::string_view path, std::string_view text, const char* expected) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) BadValue(path, text, expected);
  return value;
}

std::string JoinNames(const std::vector<std::string>& names) {
  std::string out;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) out += i + 1 == names.size() ? " or " : ", ";
    out += names[i];
  }
  return out;
}

void SetList(const FieldPlace& place, std::string_view path, std::string_view text) {
  const auto* reflection = place.section->GetReflection();
  std::vector<uint32_t> values;
  while (!text.empty()) {
    const size_t comma = text.find(',');
    values.push_back(
        ParseNumber<uint32_t>(path, text.substr(0, comma), "whole numbers such as 0,16,32"));
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
    if (text.empty()) BadValue(path, text, "a number after the last comma");
  }
  reflection->ClearField(place.section, place.field);
  for (const uint32_t value : values) reflection->AddUInt32(place.section, place.field, value);
}

}  // namespace

std::span<const FieldRule> FieldRules() { return kRules; }

std::string ListNames(const google::protobuf::EnumDescriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.value_count(); ++i) names.push_back(type.value(i)->name());
  return JoinNames(names);
}

std::string ListNames(const google::protobuf::Descriptor& section) {
  std::vector<std::string> names;
  for (int i = 0; i < section.field_count(); ++i) names.push_back(section.field(i)->name());
  return JoinNames(names);
}

FieldPlace FindField(config::Config& config, std::string_view path) {
  google::protobuf::Message* section = &config;
  std::string_view rest = path;
  while (true) {
    const size_t dot = rest.find('.');
    const std::string name(rest.substr(0, dot));
    const auto* field = section->GetDescriptor()->FindFieldByName(name);
    if (field == nullptr) {
      throw Error(ErrorClass::kUsage,
                  fmt::format("unknown field '{}' in '{}'; expected {}", Printable(name),
                              Printable(path), ListNames(*section->GetDescriptor())));
    }
    const bool is_section = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    if (dot == std::string_view::npos) {
      if (is_section) {
        throw Error(ErrorClass::kUsage,
                    fmt::format("'{}' is a section; expected one of its fields: {}",
                                Printable(path), ListNames(*field->message_type())));
      }
      return {section, field};
    }
    if (!is_section) {
      throw Error(ErrorClass::kUsage, fmt::format("'{}' in '{}' is not a section and has no fields",
                                                  Printable(name), Printable(path)));
    }
    section = section->GetReflection()->MutableMessage(section, field);
    rest.remove_prefix(dot + 1);
  }
}

void SetFromText(const FieldPlace& place, std::string_view path, std::string_view text) {
  auto* section = place.section;
  const auto* field = place.field;
  const auto* reflection = section->GetReflection();
  if (field->is_repeated()) return SetList(place, path, text);
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection->SetUInt32(section, field,
                                   ParseNumber<uint32_t>(path, text, "a whole number below 2^32"));
    case FieldDescriptor::CPPTYPE_UINT64:
      return reflection->SetUInt64(section, field,
                                   ParseNumber<uint64_t>(path, text, "a whole number below 2^64"));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection->SetDouble(section, field, ParseNumber<double>(path, text, "a number"));
    case FieldDescriptor::CPPTYPE_BOOL:
      if (text != "true" && text != "false") BadValue(path, text, "true or false");
      return reflection->SetBool(section, field, text == "true");
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection->SetString(section, field, std::string(text));
    case FieldDescriptor::CPPTYPE_ENUM: {
      const auto* value = field->enum_type()->FindValueByName(std::string(text));
      if (value == nullptr) BadValue(path, text, ListNames(*field->enum_type()));
      return reflection->SetEnum(section, field, value);
    }
    default:
      ThrowBug("a config field of a type that SetFromText does not know",
               std::source_location::current());
  }
}

}  // namespace passel::cluster
