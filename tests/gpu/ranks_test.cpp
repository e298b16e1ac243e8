// Products summed over ranks that have a GPU each. Run by mpirun; every rank runs every test, so
// their calls match. Ranks that share a GPU are tested too, but for what is peer memory's alone.
#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <cmath>
#include <cstdio>

#include "cluster/launch.h"
#include "cluster/mpi_collectives.h"
#include "runtime/base/error.h"
#include "tests/gpu/device_matrix.h"
#include "tests/gpu/float64_layer.h"

namespace passel::gpu {
namespace {

using std::chrono::milliseconds;

cluster::Launch* launch = nullptr;  // main's; MPI is initialised once a process

std::unique_ptr<Device> MakeDevice(milliseconds timeout = milliseconds(60'000)) {
  std::string why;
  auto device = MakeCudaDevice({.local_rank = launch->world_rank(),
                                .local_ranks = launch->world_size(),
                                .peer_timeout = timeout},
                               &why);
  if (!device) throw passel::Error(ErrorClass::kUsage, why);
  return device;
}

std::unique_ptr<Collectives> Join(Device& device) {
  return device.MakeCollectives(std::make_unique<cluster::MpiCollectives>(MPI_COMM_WORLD));
}

// Of a number of columns, those of rank `r`, in multiples of `unit`: not the same for all.
struct Part {
  int64_t first, count;
};
Part PartOf(int64_t columns, int64_t unit, int r, int ranks) {
  const auto edge = [&](int i) { return (columns / unit * i + ranks - 1) / ranks * unit; };
  return {edge(r), (r + 1 == ranks ? columns : edge(r + 1)) - edge(r)};
}

std::vector<float> Columns(const std::vector<float>& matrix, int64_t cols, Part part) {
  std::vector<float> some;
  for (size_t row = 0; row < matrix.size(); row += static_cast<size_t>(cols)) {
    const auto first = matrix.begin() + static_cast<int64_t>(row) + part.first;
    some.insert(some.end(), first, first + part.count);
  }
  return some;
}

// Of rank 0's numbers, whether these have the same bits.
bool SameOnAll(Collectives& ranks, const std::vector<float>& own) {
  std::vector<float> first = own;
  ranks.Broadcast(std::as_writable_bytes(std::span(first)), 0);
  return SameBits(first, own);
}

struct Shape {
  int64_t heads, hidden, ffn, qkv;  // widths, over all ranks; qkv of each
  int64_t unit;                     // that heads and ffn are cut by
};

class SumsOverRanks : public testing::TestWithParam<Shape> {};

TEST_P(SumsOverRanks, EqualFloat64) {
  const Shape s = GetParam();
  const auto device = MakeDevice();
  const auto ranks = Join(*device);
  Random random(static_cast<uint64_t>(s.hidden * 11 + s.ffn));  // the same on every rank
  const auto weight = [&](int64_t out, int64_t in) {
    return RoundToBf16(RandomFloats(random, out * in, 1 / std::sqrt(static_cast<double>(in))));
  };
  const auto o = weight(s.hidden, s.heads), gate = weight(s.ffn, s.hidden),
             up = weight(s.ffn, s.hidden), down = weight(s.hidden, s.ffn),
             qkv = weight(s.qkv, s.hidden);
  auto gate_up = gate;
  gate_up.insert(gate_up.end(), up.begin(), up.end());
  const Part heads = PartOf(s.heads, s.unit, ranks->rank(), ranks->size());
  const Part ffn = PartOf(s.ffn, s.unit, ranks->rank(), ranks->size());
  const auto own_o = Columns(o, s.heads, heads), own_down = Columns(down, s.ffn, ffn);
  const auto rows = [&](const std::vector<float>& w) {
    return std::vector<float>(w.begin() + ffn.first * s.hidden,
                              w.begin() + (ffn.first + ffn.count) * s.hidden);
  };
  auto own_gate_up = rows(gate);
  const auto own_up = rows(up);
  own_gate_up.insert(own_gate_up.end(), own_up.begin(), own_up.end());
  const auto wo = device->MakeLinear(s.hidden, heads.count, ReaderOf(own_o, heads.count)),
             wg = device->MakeLinear(2 * ffn.count, s.hidden, ReaderOf(own_gate_up, s.hidden)),
             wd = device->MakeLinear(s.hidden, ffn.count, ReaderOf(own_down, ffn.count)),
             wq = device->MakeLinear(s.qkv, s.hidden, ReaderOf(qkv, s.hidden));
  const auto norm = RandomFloats(random, s.hidden);
  DeviceMatrix dnorm(*device, DType::kF32, 1, s.hidden);
  dnorm.Set(norm);
  const double bound = 2 * ActivationError(*device);
  for (const int64_t n : {1, 8, 16, 17, 33, 64, 65}) {
    const auto x = RoundToBf16(RandomFloats(random, n * s.heads));
    const auto before = RandomFloats(random, n * s.hidden);
    DeviceMatrix attention(*device, DType::kBf16, n, heads.count),
        hidden(*device, DType::kF32, n, s.hidden), scratch(*device, DType::kF32, n, s.hidden),
        normed(*device, DType::kBf16, n, s.hidden), pairs(*device, DType::kF32, n, 2 * ffn.count),
        middle(*device, DType::kBf16, n, ffn.count), out(*device, DType::kF32, n, s.qkv);
    attention.Set(Columns(x, s.heads, heads));
    Doubles exact = Product(Doubles(x.begin(), x.end()), o, n, s.heads);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] += static_cast<double>(before[i]);
    const Doubles more = Product(
        Silu(Product(Norm(exact, norm, 1e-5), gate_up, n, s.hidden), s.ffn), down, n, s.ffn);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] += more[i];
    const Doubles last = Product(Norm(exact, norm, 1e-5), qkv, n, s.hidden);
    std::vector<float> first;
    std::unique_ptr<Recording> recording;
    int calls = 0;
    const auto issue = [&] {
      ++calls;
      device->MatMulSumAdd(*wo, attention.tensor, hidden.tensor, scratch.tensor, *ranks);
      device->NormMatMulSilu(hidden.tensor, dnorm.tensor, 1e-5f, *wg, middle.tensor, normed.tensor,
                             pairs.tensor);
      device->MatMulSumAdd(*wd, middle.tensor, hidden.tensor, scratch.tensor, *ranks);
      device->NormMatMul(hidden.tensor, dnorm.tensor, 1e-5f, *wq, out.tensor, normed.tensor);
    };
    for (int repeat = 0; repeat < 20; ++repeat) {
      hidden.Set(before);
      out.Set(std::vector<float>(static_cast<size_t>(n * s.qkv)));
      // With 65 rows a GPU sums by collectives, which it records.
      repeat < 10 ? issue() : device->Replay(recording, *ranks, issue);
      if (repeat == 0) {
        first = out.Get();
        EXPECT_LT(RelativeError(hidden.Get(), exact), bound) << n << " rows";
        EXPECT_LT(RelativeError(first, last), bound) << n << " rows";
        EXPECT_TRUE(SameOnAll(*ranks, hidden.Get())) << n << " rows";
      } else {
        EXPECT_TRUE(SameBits(out.Get(), first)) << n << " rows, " << repeat;
      }
    }
    // Issued, recorded, and from then on replayed.
    if (n == 65 && ranks->name().starts_with("NCCL")) {
      EXPECT_EQ(calls, 10 + 2);
    }
  }
}

// Widths that leave ends over; two tiles a block; parts that one rank alone could not put off, as
// theirs are no multiple of 8.
INSTANTIATE_TEST_SUITE_P(Shapes, SumsOverRanks,
                         testing::Values(Shape{576, 576, 1536, 960, 64},
                                         Shape{72, 1000, 328, 776, 8}, Shape{24, 4096, 40, 200, 8},
                                         Shape{2048, 264, 14336, 136, 128},
                                         Shape{28, 200, 44, 136, 8}));

// Many sums without a wait, of all numbers of rows; small integers, so that every sum is exact.
TEST(SumsOverRanks, ManyInARow) {
  const auto device = MakeDevice();
  const auto ranks = Join(*device);
  constexpr int64_t kIn = 128, kOut = 777, kRows = 70;
  Random random(5);
  const auto integers = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = static_cast<float>(random.Next() % 5) - 2;
    return v;
  };
  const int64_t all = kIn * ranks->size();
  const auto w = integers(kOut * all), x = integers(kRows * all);
  const Part own{kIn * ranks->rank(), kIn};
  const auto own_w = Columns(w, all, own);
  const auto linear = device->MakeLinear(kOut, kIn, ReaderOf(own_w, kIn));
  DeviceMatrix dx(*device, DType::kBf16, kRows, kIn), sum(*device, DType::kF32, kRows, kOut),
      scratch(*device, DType::kF32, kRows, kOut);
  dx.Set(Columns(x, all, own));
  sum.Set(std::vector<float>(static_cast<size_t>(kRows * kOut)));
  std::vector<int> times(static_cast<size_t>(kRows));
  for (int i = 0; i < 3000; ++i) {
    const auto n = static_cast<int64_t>(1 + random.Next() % kRows);
    for (int64_t r = 0; r < n; ++r) ++times[static_cast<size_t>(r)];
    device->MatMulSumAdd(*linear, dx.tensor.Rows(0, n), sum.tensor.Rows(0, n),
                         scratch.tensor.Rows(0, n), *ranks);
    // Now and then what was put off is issued on one rank alone.
    if (random.Next() % 3 == 0 && i % 2 == ranks->rank()) device->Record()->Wait();
  }
  const auto got = sum.Get();
  const Doubles once = Product(Doubles(x.begin(), x.end()), w, kRows, all);
  int wrong = 0;
  for (size_t i = 0; i < once.size(); ++i) {
    wrong += static_cast<double>(got[i]) != once[i] * times[i / kOut] ? 1 : 0;
  }
  EXPECT_EQ(wrong, 0) << "of " << once.size();
}

// A rank that never comes: the others' kernels end, and the error is said.
TEST(SumsOverRanks, LostRankEndsTheWait) {
  const auto device = MakeDevice(milliseconds(5'000));
  const auto ranks = Join(*device);
  if (ranks->name() != "NCCL and peer memory") GTEST_SKIP() << ranks->name();
  Random random(6);
  const auto w = RandomFloats(random, 256 * 64);
  const auto linear = device->MakeLinear(256, 64, ReaderOf(w, 64));
  DeviceMatrix x(*device, DType::kBf16, 32, 64), sum(*device, DType::kF32, 32, 256),
      scratch(*device, DType::kF32, 32, 256);
  x.Set(RandomFloats(random, 32 * 64));
  const auto run = [&] {
    device->MatMulSumAdd(*linear, x.tensor, sum.tensor, scratch.tensor, *ranks);
    device->Record()->Wait();
  };
  run();  // all of them
  MPI_Barrier(MPI_COMM_WORLD);
  if (ranks->rank() != ranks->size() - 1) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const auto took = std::chrono::steady_clock::now() - start;
    EXPECT_GT(took, milliseconds(4'000));
    EXPECT_LT(took, milliseconds(8'000));
    try {
      ranks->ThrowIfFailed();
      ADD_FAILURE() << "the sum was believed";
    } catch (const passel::Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kCluster);
      EXPECT_NE(std::string(e.what()).find("lost"), std::string::npos) << e.what();
    }
    EXPECT_THROW(run(), passel::Error);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace
}  // namespace passel::gpu

int main(int argc, char** argv) {
  passel::cluster::Launch launch(&argc, &argv);
  passel::gpu::launch = &launch;
  // Rank 0 lists the tests; the others print failures alone.
  if (launch.world_rank() != 0) GTEST_FLAG_SET(brief, true);
  testing::InitGoogleTest(&argc, argv);
  std::string why;
  if (!passel::gpu::MakeCudaDevice({}, &why)) {
    if (launch.world_rank() == 0) std::printf("[  SKIPPED ] %s\n", why.c_str());
    return 0;
  }
  return RUN_ALL_TESTS();
}
