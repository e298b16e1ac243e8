#include "runtime/model/stop_ids.h"

#include <algorithm>
#include <array>

namespace passel::model {

std::vector<int32_t> StopIds(const TokenizerData& data, const std::vector<int32_t>& named) {
  std::vector<int32_t> stop;
  const auto add = [&](int32_t id) {
    if (id >= 0 && std::find(stop.begin(), stop.end(), id) == stop.end()) stop.push_back(id);
  };
  for (const int32_t id : named) add(id);
  static constexpr std::array kTurnEnds = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>"};
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    if (data.types[id] == TokenizerData::TokenType::kSpecial &&
        std::find(kTurnEnds.begin(), kTurnEnds.end(), data.tokens[id]) != kTurnEnds.end()) {
      add(static_cast<int32_t>(id));
    }
  }
  return stop;
}

}  // namespace passel::model
