#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace passel {

// A number that names one kind of thing, so that a layer is never passed where a rank is meant.
template <typename Tag, typename Rep>
struct StrongId {
  Rep value{};

  constexpr StrongId() = default;
  constexpr explicit StrongId(Rep v) : value(v) {}
  friend constexpr auto operator<=>(StrongId, StrongId) = default;
};

// World rank, as mpirun numbers it.
using RankId = StrongId<struct RankTag, int32_t>;
// A request, numbered by model rank 0 in the order of admission; never reused in a run.
using RequestId = StrongId<struct RequestTag, uint64_t>;

}  // namespace passel

template <typename Tag, typename Rep>
struct std::hash<passel::StrongId<Tag, Rep>> {
  size_t operator()(passel::StrongId<Tag, Rep> id) const noexcept {
    return std::hash<Rep>{}(id.value);
  }
};
