#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "configs/config.pb.h"

namespace passel::cluster {

// What configs/config.proto says of one field: its default as text ("" for none) and its range.
// Enums and booleans have no range beyond their names.
struct FieldRule {
  std::string_view path;  // "attention.k"
  std::string_view default_text;
  std::optional<double> min = std::nullopt;
  std::optional<double> max = std::nullopt;
  // Where set, the only value served so far.
  std::string_view only = "";
};

// One rule for every field of the schema.
std::span<const FieldRule> FieldRules();

// A field found by its dotted path, in the section message that holds it.
struct FieldPlace {
  google::protobuf::Message* section = nullptr;
  const google::protobuf::FieldDescriptor* field = nullptr;
};

// Finds `path` in `config`. Throws Error{kUsage} that says which part is unknown and what would be
// known there.
FieldPlace FindField(config::Config& config, std::string_view path);

// Sets a field from text, as `--set` has it: numbers in decimal, true or false, an enum's name, a
// string as it is, a list as "0,16,32" (empty for none), which replaces what was there. Throws
// Error{kUsage} that says what was expected.
void SetFromText(const FieldPlace& place, std::string_view path, std::string_view text);

// "a, b or c": the names of an enum's values or of a section's fields.
std::string ListNames(const google::protobuf::EnumDescriptor& type);
std::string ListNames(const google::protobuf::Descriptor& section);

}  // namespace passel::cluster
