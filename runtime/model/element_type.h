#pragma once

#include <cstdint>
#include <string_view>

namespace passel::model {

// How the elements of a stored tensor are coded. The values are GGUF's type numbers; safetensors
// uses the first two and kBf16.
enum class ElementType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBf16 = 30,
};

// A type's storage: runs of `block` consecutive elements of a row take `bytes` bytes.
struct ElementLayout {
  ElementType type;
  std::string_view name;
  int64_t block;
  int64_t bytes;
};

// The largest `block` of any type.
inline constexpr int64_t kMaxBlock = 256;

// Of any type that GGUF has, served or not; nullptr for other numbers.
const ElementLayout* FindKnownLayout(uint32_t type);
// nullptr where the number names no type that is served.
const ElementLayout* FindLayout(uint32_t type);
const ElementLayout& LayoutOf(ElementType type);
// "F32, F16, …": what FindLayout knows, for messages.
std::string_view ServedTypes();

// Decodes `blocks` consecutive blocks; in: [blocks · bytes], unaligned; out: [blocks · block] f32.
// Quantised types follow the definitions of GGML's block formats.
void Dequantize(ElementType type, const uint8_t* in, int64_t blocks, float* out);

}  // namespace passel::model
