#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <span>

#include "runtime/base/bf16.h"
#include "runtime/base/error.h"
#include "runtime/model/element_type.h"

namespace passel::model {
namespace {

constexpr std::array kLayouts = {
    ElementLayout{ElementType::kF32, "F32", 1, 4},
    ElementLayout{ElementType::kF16, "F16", 1, 2},
    ElementLayout{ElementType::kBf16, "BF16", 1, 2},
    ElementLayout{ElementType::kQ8_0, "Q8_0", 32, 34},
    ElementLayout{ElementType::kQ4_0, "Q4_0", 32, 18},
    ElementLayout{ElementType::kQ4_1, "Q4_1", 32, 20},
    ElementLayout{ElementType::kQ5_0, "Q5_0", 32, 22},
    ElementLayout{ElementType::kQ5_1, "Q5_1", 32, 24},
    ElementLayout{ElementType::kQ4_K, "Q4_K", 256, 144},
    ElementLayout{ElementType::kQ5_K, "Q5_K", 256, 176},
    ElementLayout{ElementType::kQ6_K, "Q6_K", 256, 210},
};

constexpr ElementLayout NotServed(uint32_t type, std::string_view name, int64_t block,
                                  int64_t bytes) {
  return {static_cast<ElementType>(type), name, block, bytes};
}
constexpr std::array kNotServed = {
    NotServed(10, "Q2_K", 256, 84),    NotServed(11, "Q3_K", 256, 110),
    NotServed(15, "Q8_K", 256, 292),   NotServed(16, "IQ2_XXS", 256, 66),
    NotServed(17, "IQ2_XS", 256, 74),  NotServed(18, "IQ3_XXS", 256, 98),
    NotServed(19, "IQ1_S", 256, 50),   NotServed(20, "IQ4_NL", 32, 18),
    NotServed(21, "IQ3_S", 256, 110),  NotServed(22, "IQ2_S", 256, 82),
    NotServed(23, "IQ4_XS", 256, 136), NotServed(24, "I8", 1, 1),
    NotServed(25, "I16", 1, 2),        NotServed(26, "I32", 1, 4),
    NotServed(27, "I64", 1, 8),        NotServed(28, "F64", 1, 8),
    NotServed(29, "IQ1_M", 256, 56),   NotServed(34, "TQ1_0", 256, 54),
    NotServed(35, "TQ2_0", 256, 66),   NotServed(39, "MXFP4", 32, 17),
};

const ElementLayout* Find(std::span<const ElementLayout> layouts, uint32_t type) {
  const auto it = std::ranges::find_if(
      layouts, [&](const ElementLayout& l) { return static_cast<uint32_t>(l.type) == type; });
  return it == layouts.end() ? nullptr : &*it;
}

template <typename T>
T Load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // zero and subnormals: an integer multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1.0p-24f;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

float LoadHalf(const uint8_t* p) { return HalfToFloat(Load<uint16_t>(p)); }

// Low nibbles are elements 0…15, high nibbles 16…31.
void Q4_0(const uint8_t* in, float* out) {
  const float d = LoadHalf(in);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>((in[2 + j] & 15) - 8);
    out[j + 16] = d * static_cast<float>((in[2 + j] >> 4) - 8);
  }
}

void Q4_1(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), m = LoadHalf(in + 2);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>(in[4 + j] & 15) + m;
    out[j + 16] = d * static_cast<float>(in[4 + j] >> 4) + m;
  }
}

// The fifth bits of the 32 elements are the bits of a 32-bit word.
void Q5_0(const uint8_t* in, float* out) {
  const float d = LoadHalf(in);
  const uint32_t high = Load<uint32_t>(in + 2);
  for (int j = 0; j < 16; ++j) {
    const int lo = (in[6 + j] & 15) | static_cast<int>(((high >> j) & 1u) << 4);
    const int hi = (in[6 + j] >> 4) | static_cast<int>(((high >> (j + 16)) & 1u) << 4);
    out[j] = d * static_cast<float>(lo - 16);
    out[j + 16] = d * static_cast<float>(hi - 16);
  }
}

void Q5_1(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), m = LoadHalf(in + 2);
  const uint32_t high = Load<uint32_t>(in + 4);
  for (int j = 0; j < 16; ++j) {
    const int lo = (in[8 + j] & 15) | static_cast<int>(((high >> j) & 1u) << 4);
    const int hi = (in[8 + j] >> 4) | static_cast<int>(((high >> (j + 16)) & 1u) << 4);
    out[j] = d * static_cast<float>(lo) + m;
    out[j + 16] = d * static_cast<float>(hi) + m;
  }
}

void Q8_0(const uint8_t* in, float* out) {
  const float d = LoadHalf(in);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(in[2 + j]));
}

struct ScaleMin {
  float scale, min;
};

// Eight 6-bit scales and eight 6-bit minima in 12 bytes: the first four of each are the low six
// bits of bytes 0…3 and 4…7, whose top two bits complete the nibbles in bytes 8…11.
ScaleMin KScale(const uint8_t* s, int j) {
  if (j < 4) return {static_cast<float>(s[j] & 63), static_cast<float>(s[j + 4] & 63)};
  return {static_cast<float>((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4)),
          static_cast<float>((s[j + 4] >> 4) | ((s[j] >> 6) << 4))};
}

// d, dmin (f16), 12 bytes of scales, 128 of nibbles; sub-blocks of 32, two to a run of 32 bytes.
void Q4_K(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), dmin = LoadHalf(in + 2);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin s = KScale(in + 4, j);
    const uint8_t* q = in + 16 + 32 * (j / 2);
    const int shift = 4 * (j % 2);
    for (int i = 0; i < 32; ++i) {
      out[32 * j + i] = d * s.scale * static_cast<float>((q[i] >> shift) & 15) - dmin * s.min;
    }
  }
}

// As Q4_K, with 32 bytes of fifth bits: bit j of byte i belongs to element i of sub-block j.
void Q5_K(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), dmin = LoadHalf(in + 2);
  const uint8_t* high = in + 16;
  for (int j = 0; j < 8; ++j) {
    const ScaleMin s = KScale(in + 4, j);
    const uint8_t* q = in + 48 + 32 * (j / 2);
    const int shift = 4 * (j % 2);
    for (int i = 0; i < 32; ++i) {
      const int value = ((q[i] >> shift) & 15) | (((high[i] >> j) & 1) << 4);
      out[32 * j + i] = d * s.scale * static_cast<float>(value) - dmin * s.min;
    }
  }
}

// 128 bytes of nibbles, 64 of bit pairs, 16 signed scales (of 16 elements each), d (f16).
void Q6_K(const uint8_t* in, float* out) {
  const float d = LoadHalf(in + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* low = in + 64 * half;
    const uint8_t* high = in + 128 + 32 * half;
    const uint8_t* scales = in + 192 + 8 * half;
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint8_t* nibbles = low + 32 * (quarter % 2);
      const int shift = 4 * (quarter / 2);
      for (int i = 0; i < 32; ++i) {
        const int value =
            (((nibbles[i] >> shift) & 15) | (((high[i] >> (2 * quarter)) & 3) << 4)) - 32;
        const float scale = static_cast<float>(static_cast<int8_t>(scales[2 * quarter + i / 16]));
        out[128 * half + 32 * quarter + i] = d * scale * static_cast<float>(value);
      }
    }
  }
}

template <void (*Decode)(const uint8_t*, float*)>
void Blocks(const uint8_t* in, int64_t blocks, int64_t bytes, int64_t block, float* out) {
  for (int64_t b = 0; b < blocks; ++b) Decode(in + b * bytes, out + b * block);
}

}  // namespace

const ElementLayout* FindLayout(uint32_t type) { return Find(kLayouts, type); }

const ElementLayout* FindKnownLayout(uint32_t type) {
  const ElementLayout* layout = FindLayout(type);
  return layout != nullptr ? layout : Find(kNotServed, type);
}

const ElementLayout& LayoutOf(ElementType type) {
  const ElementLayout* layout = FindLayout(static_cast<uint32_t>(type));
  Check(layout != nullptr, "an element type without a layout");
  return *layout;
}

std::string_view ServedTypes() {
  return "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";
}

void Dequantize(ElementType type, const uint8_t* in, int64_t blocks, float* out) {
  const ElementLayout& layout = LayoutOf(type);
  const int64_t bytes = layout.bytes, block = layout.block;
  switch (type) {
    case ElementType::kF32:
      std::memcpy(out, in, static_cast<size_t>(blocks) * sizeof(float));
      return;
    case ElementType::kF16:
      for (int64_t i = 0; i < blocks; ++i) out[i] = LoadHalf(in + 2 * i);
      return;
    case ElementType::kBf16:
      for (int64_t i = 0; i < blocks; ++i) out[i] = ToFloat(bf16{Load<uint16_t>(in + 2 * i)});
      return;
    case ElementType::kQ4_0:
      return Blocks<Q4_0>(in, blocks, bytes, block, out);
    case ElementType::kQ4_1:
      return Blocks<Q4_1>(in, blocks, bytes, block, out);
    case ElementType::kQ5_0:
      return Blocks<Q5_0>(in, blocks, bytes, block, out);
    case ElementType::kQ5_1:
      return Blocks<Q5_1>(in, blocks, bytes, block, out);
    case ElementType::kQ8_0:
      return Blocks<Q8_0>(in, blocks, bytes, block, out);
    case ElementType::kQ4_K:
      return Blocks<Q4_K>(in, blocks, bytes, block, out);
    case ElementType::kQ5_K:
      return Blocks<Q5_K>(in, blocks, bytes, block, out);
    case ElementType::kQ6_K:
      return Blocks<Q6_K>(in, blocks, bytes, block, out);
  }
  Check(false, "an element type that Dequantize does not know");
}

}  // namespace passel::model
