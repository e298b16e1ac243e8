#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {

// A list that a kernel gets as its argument, where kWords hold it: so it is there before the
// kernels before are through, and no other kernel has to bring it.
template <size_t kWords>
struct ListArgument {
  const int32_t* uploaded;  // null: content
  int32_t content[kWords];

  __device__ int32_t operator[](int64_t i) const {
    return uploaded != nullptr ? uploaded[i] : content[i];
  }
};

// Calls launch(ListArgument) with the smallest that holds it: all of an argument is copied, used or
// not. What is longer than kMaxListWords must be `uploaded`.
template <typename Launch>
void WithListArgument(std::span<const int32_t> list, const int32_t* uploaded, Launch launch) {
  const auto with = [&]<size_t kWords>() {
    ListArgument<kWords> argument;
    argument.uploaded = uploaded;
    if (uploaded == nullptr) std::memcpy(argument.content, list.data(), list.size_bytes());
    launch(argument);
  };
  if (uploaded != nullptr) return with.template operator()<1>();
  if (list.size() <= 320) return with.template operator()<320>();
  if (list.size() <= 1280) return with.template operator()<1280>();
  with.template operator()<kMaxListWords>();
}

}  // namespace passel::gpu::cuda
