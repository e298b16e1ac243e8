#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "gpu/device.h"
#include "runtime/engine/request.h"

namespace passel::engine {

// How the token at `position` (tokens generated so far) is chosen. The request's seed and the
// position alone decide the draw, so that a step that is redone draws the same.
gpu::SamplingRule RuleFor(const SamplingParams& params, uint64_t position);

// Log-softmax of the chosen token and of the params.top_logprobs best.
PositionLogprobs ComputeLogprobs(std::span<const float> logits, int32_t chosen, int32_t top);

// Where the first of the stop strings begins in `text`, whose bytes from `added` on are new: a
// match ends in them. npos: in none.
size_t FindStop(const std::string& text, size_t added, std::span<const std::string> stops);

}  // namespace passel::engine
