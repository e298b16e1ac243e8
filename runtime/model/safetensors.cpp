#include "runtime/model/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/json_file.h"

namespace passel::model {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // the reference implementation's limit

struct Dtype {
  std::string_view name;
  uint64_t bytes;
  std::optional<ElementType> type;
};
constexpr Dtype kDtypes[] = {
    {"F32", 4, ElementType::kF32}, {"F16", 2, ElementType::kF16}, {"BF16", 2, ElementType::kBf16},
    {"BOOL", 1, std::nullopt},     {"U8", 1, std::nullopt},       {"I8", 1, std::nullopt},
    {"F8_E4M3", 1, std::nullopt},  {"F8_E5M2", 1, std::nullopt},  {"U16", 2, std::nullopt},
    {"I16", 2, std::nullopt},      {"U32", 4, std::nullopt},      {"I32", 4, std::nullopt},
    {"U64", 8, std::nullopt},      {"I64", 8, std::nullopt},      {"F64", 8, std::nullopt},
};

struct Extent {
  uint64_t begin, end;
  const std::string* name;
};

// One entry of the header; `space` bytes of data follow the header at `data`.
Safetensor ParseEntry(const nlohmann::json& json, const std::string& where, const uint8_t* data,
                      uint64_t space, uint64_t& begin, uint64_t& end) {
  const JsonObject entry(json, where);
  Safetensor out;
  out.dtype = entry.StringOr("dtype", "");
  const auto* dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const Dtype& d) { return d.name == out.dtype; });
  if (dtype == std::end(kDtypes)) {
    entry.Fail("dtype",
               fmt::format("is \"{}\"; expected a dtype of the format", Printable(out.dtype)));
  }
  out.type = dtype->type;

  const auto is_size = [](const nlohmann::json& n) { return n.is_number_unsigned(); };
  const nlohmann::json* shape = entry.Find("shape");
  if (shape == nullptr || !shape->is_array() || shape->size() > 8 ||
      !std::all_of(shape->begin(), shape->end(), is_size)) {
    entry.Fail("shape", "expected an array of at most 8 sizes");
  }
  std::optional<uint64_t> elements = 1;
  for (const nlohmann::json& extent : *shape) {
    if (elements) elements = CheckedMul(*elements, extent.get<uint64_t>());
  }
  const std::optional<uint64_t> bytes = elements ? CheckedMul(*elements, dtype->bytes) : elements;
  const uint64_t cols = shape->empty() ? 1 : shape->back().get<uint64_t>();

  const nlohmann::json* offsets = entry.Find("data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 ||
      !std::all_of(offsets->begin(), offsets->end(), is_size)) {
    entry.Fail("data_offsets", "expected two sizes");
  }
  begin = (*offsets)[0].get<uint64_t>();
  end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > space) {
    entry.Fail("data_offsets", fmt::format("is [{}, {}); expected to lie within the file's {} "
                                           "bytes of data",
                                           begin, end, space));
  }
  if (!bytes || *bytes != end - begin) {
    entry.Fail("data_offsets", fmt::format("spans {} bytes; expected what the shape and {} need",
                                           end - begin, Printable(out.dtype)));
  }
  // The file holds that many bytes, so both fit int64_t.
  out.cols = static_cast<int64_t>(*elements == 0 ? 0 : cols);
  out.rows = static_cast<int64_t>(*elements == 0 ? 0 : *elements / cols);
  out.data = data + begin;
  return out;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const std::span<const uint8_t> bytes = file_.bytes();
  const auto fail = [&](const std::string& what) {
    throw Error(ErrorClass::kModel, path + ": " + what);
  };
  uint64_t header = 0;
  if (bytes.size() < sizeof(header)) fail("expected a safetensors file of at least 8 bytes");
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header > kMaxHeader || header > bytes.size() - sizeof(header)) {
    fail(fmt::format("header length: is {}; expected at most {}", header,
                     std::min<uint64_t>(kMaxHeader, bytes.size() - sizeof(header))));
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof(header);
  const nlohmann::json json = ParseJson({text, header}, path + ": header");
  if (!json.is_object()) fail("header: expected a JSON object");
  const uint8_t* data = bytes.data() + sizeof(header) + header;
  tensor_bytes_ = bytes.size() - sizeof(header) - header;

  std::vector<Extent> extents;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    uint64_t begin = 0, end = 0;
    const auto it =
        tensors_
            .emplace(name, ParseEntry(entry, fmt::format("{}: tensor '{}'", path, Printable(name)),
                                      data, tensor_bytes_, begin, end))
            .first;
    extents.push_back({begin, end, &it->first});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  uint64_t at = 0;
  for (const Extent& e : extents) {
    if (e.begin != at) {
      fail(
          fmt::format("tensor '{}': data_offsets: begins at {}; expected {}, where the one before "
                      "it ends",
                      Printable(*e.name), e.begin, at));
    }
    at = e.end;
  }
  if (at != tensor_bytes_) {
    fail(fmt::format("has {} bytes of data; expected the {} that its tensors take", tensor_bytes_,
                     at));
  }
}

}  // namespace passel::model
