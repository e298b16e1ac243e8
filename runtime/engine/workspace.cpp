#include <algorithm>

#include "runtime/base/checked_math.h"
#include "runtime/engine/executor.h"

namespace passel::engine {

int64_t Workspace::SlotOf(int32_t layer, int64_t position) const {
  if (kinds[static_cast<size_t>(layer)] == Job::LayerKind::kResident) {
    return job.sliding() ? position % job.model.sliding_window : position;
  }
  const int64_t sinks = job.config.attention().sinks();
  const int64_t window = job.config.attention().window();
  return position < sinks ? position : sinks + (position - sinks) % window;
}

int64_t Workspace::SlotsOf(int32_t layer, int64_t tokens) const {
  if (kinds[static_cast<size_t>(layer)] == Job::LayerKind::kResident) {
    return job.sliding() ? std::min(tokens, job.model.sliding_window) : tokens;
  }
  return std::min<int64_t>(tokens,
                           job.config.attention().sinks() + job.config.attention().window());
}

std::array<std::pair<int64_t, int64_t>, 2> Workspace::Kept(int32_t layer, int64_t end,
                                                           int64_t prompt) const {
  if (kinds[static_cast<size_t>(layer)] == Job::LayerKind::kResident) {
    const int64_t first = job.sliding() ? std::max<int64_t>(0, end - job.model.sliding_window) : 0;
    return {{{0, 0}, {first, end}}};
  }
  const int64_t sinks = std::min<int64_t>(end, job.config.attention().sinks());
  const int64_t first = std::max<int64_t>(sinks, prompt - job.config.attention().window());
  return {{{0, sinks}, {std::min(first, end), end}}};
}

int64_t Workspace::PagesFor(int32_t layer, int64_t tokens) const {
  return static_cast<int64_t>(
      CeilDiv(static_cast<uint64_t>(SlotsOf(layer, tokens)), gpu::kKvPageTokens));
}

int64_t Workspace::PagesFor(int64_t tokens) const {
  int64_t pages = 0;
  for (int32_t layer = 0; layer < job.model.layers; ++layer) pages += PagesFor(layer, tokens);
  return pages;
}

gpu::Tensor Workspace::Means(const Sequence& sequence, int32_t layer) const {
  const auto cols = static_cast<int64_t>(kv_cols());
  return {static_cast<float*>(sequence.means->data()) + layer * cols, gpu::DType::kF32, 1, cols,
          cols};
}

}  // namespace passel::engine
