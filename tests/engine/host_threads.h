#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/engine/host_rank.h"
#include "tests/engine/test_job.h"
#include "transport/in_process.h"

namespace passel::engine {

inline constexpr uint64_t kNonce = 0x5eed;
inline constexpr std::chrono::seconds kPatience{60};

// The host ranks of a job, each on a thread of its own, and rank 0's channel to them.
class HostThreads {
 public:
  HostThreads(const JobSpec& spec, const transport::FaultPlan& faults)
      : network_(spec.hosts + 1, kNonce, faults) {
    for (uint32_t r = 0; r <= spec.hosts; ++r) {
      jobs_.push_back(std::make_unique<Job>(MakeJob(spec)));
      jobs_.back()->self = RankId(static_cast<int32_t>(r));
      channels_.push_back(network_.MakeChannel(jobs_.back()->self));
    }
    for (uint32_t r = 1; r <= spec.hosts; ++r) {
      hosts_.push_back(
          std::make_unique<HostRank>(*jobs_[r], *channels_[r], jobs_[r]->info().memory_bytes));
      threads_.emplace_back([this, host = hosts_.back().get()] {
        try {
          EXPECT_EQ(host->Run(), 0);
        } catch (const Error& e) {
          if (!cut_) ADD_FAILURE() << e.what();
        }
      });
    }
  }
  // Stops the hosts, which must still obey, and closes all channels.
  ~HostThreads() {
    cluster::proto::Control stop;
    stop.mutable_shutdown();
    for (size_t r = 1; r < channels_.size(); ++r) {
      SendControl(RankId(static_cast<int32_t>(r)), stop);
    }
    for (std::thread& t : threads_) t.join();
    for (auto& c : channels_) c->Close(std::chrono::milliseconds(100));
  }
  HostThreads(const HostThreads&) = delete;
  HostThreads& operator=(const HostThreads&) = delete;

  const Job& job() const { return *jobs_[0]; }
  transport::Channel& channel() { return *channels_[0]; }
  transport::InProcessNetwork& network() { return network_; }
  // Breaks a host's links; it then ends with an error.
  void Cut(RankId host) {
    cut_ = true;
    network_.Cut(host);
  }

  void SendControl(RankId to, const cluster::proto::Control& message) {
    transport::FrameHeader h;
    h.type = transport::FrameType::kControl;
    h.count = 1;
    std::vector<std::byte> payload(message.ByteSizeLong());
    message.SerializeToArray(payload.data(), static_cast<int>(payload.size()));
    channel().Send(to, transport::OutgoingFrame::Own(h, std::move(payload)));
  }

 private:
  transport::InProcessNetwork network_;
  std::vector<std::unique_ptr<Job>> jobs_;
  std::vector<std::unique_ptr<transport::Channel>> channels_;
  std::vector<std::unique_ptr<HostRank>> hosts_;
  std::atomic<bool> cut_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace passel::engine
