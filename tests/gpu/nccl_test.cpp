// NCCL's collectives, as far as one GPU shows them: a communicator of one rank, and the watchdog.

#include <gtest/gtest.h>

#include <thread>

#include "gpu/cuda/check.h"
#include "gpu/cuda/nccl_collectives.h"
#include "runtime/base/error.h"
#include "runtime/base/single_rank.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu::cuda {
namespace {

using std::chrono::milliseconds;

class Nccl : public testing::Test {
 protected:
  void SetUp() override {
    device_ = MakeTestDevice({});
    CheckCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  void TearDown() override { cudaStreamDestroy(stream_); }
  std::unique_ptr<NcclCollectives> Make(bool deterministic, milliseconds timeout) {
    return std::make_unique<NcclCollectives>(
        *device_, [this] { return stream_; }, std::make_unique<SingleRank>(), deterministic,
        timeout);
  }

  std::unique_ptr<Device> device_;
  cudaStream_t stream_ = nullptr;
};

TEST_F(Nccl, OfOneRankKeepsWhatItSumsAndGathers) {
  Random random(51);
  const auto x = RandomFloats(random, 10'001);
  for (const bool deterministic : {false, true}) {
    DeviceMatrix in(*device_, DType::kF32, 1, 10'001), out(*device_, DType::kF32, 1, 10'001);
    in.Set(x);
    const auto nccl = Make(deterministic, milliseconds(60'000));
    auto* data = static_cast<float*>(in.tensor.data);
    for (int i = 0; i < 100; ++i) nccl->AllReduceSum({data, x.size()});
    const size_t count = x.size();
    nccl->AllGather({data, count}, {&count, 1}, {static_cast<float*>(out.tensor.data), count});
    CheckCuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    EXPECT_TRUE(SameBits(out.Get(), x));
  }
}

// A stream that stands still is what a lost peer looks like.
TEST_F(Nccl, WatchdogEndsWhatTakesTooLong) {
  DeviceMatrix in(*device_, DType::kF32, 1, 100);
  const auto nccl = Make(false, milliseconds(200));
  const std::span<float> data(static_cast<float*>(in.tensor.data), 100);
  nccl->AllReduceSum(data);
  CheckCuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  CheckCuda(cudaLaunchHostFunc(
                stream_, [](void*) { std::this_thread::sleep_for(milliseconds(1500)); }, nullptr),
            "cudaLaunchHostFunc");
  nccl->AllReduceSum(data);
  std::this_thread::sleep_for(milliseconds(1000));
  try {
    nccl->ThrowIfFailed();
    FAIL() << "the collective went on";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kCluster);
    EXPECT_NE(std::string(e.what()).find("200 ms"), std::string::npos) << e.what();
  }
  EXPECT_THROW(nccl->AllReduceSum(data), Error);
}

}  // namespace
}  // namespace passel::gpu::cuda
