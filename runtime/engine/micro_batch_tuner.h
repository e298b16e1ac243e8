#pragma once

#include <array>
#include <cstdint>

namespace passel::engine {

// Chooses between one and two micro-batches in flight by measuring: overlap costs a second pass
// over the weights, and pays where the hosts take longer than the model. Pure logic.
class MicroBatchTuner {
 public:
  // fixed: 0 measures and chooses.
  explicit MicroBatchTuner(uint32_t fixed) : fixed_(fixed) {}
  // The most that one with this setting ever chooses.
  static uint32_t Most(uint32_t fixed) { return fixed > 0 ? fixed : 2; }

  uint32_t Choose(uint64_t batch) {
    if (fixed_ > 0) return fixed_;
    if (batch < 2) return 1;
    if (batch != batch_) {  // what was measured holds for one batch size
      batch_ = batch;
      trial_ = 0;
      best_ = {};
    }
    if (trial_ < 2 * kTrials) return trial_ % 2 == 0 ? 1 : 2;
    return best_[0] <= best_[1] ? 1 : 2;
  }
  void Took(uint32_t micro_batches, double seconds) {
    if (fixed_ > 0 || batch_ < 2 || micro_batches < 1 || micro_batches > 2) return;
    double& best = best_[micro_batches - 1];
    if (best == 0 || seconds < best) best = seconds;
    if (++trial_ >= kRepeat) {  // contexts have grown since
      trial_ = 0;
      best_ = {};
    }
  }

 private:
  static constexpr uint32_t kTrials = 3;
  static constexpr uint32_t kRepeat = 512;  // steps until it measures again
  uint32_t fixed_;
  uint64_t batch_ = 0;
  uint32_t trial_ = 0;
  std::array<double, 2> best_{};
};

}  // namespace passel::engine
