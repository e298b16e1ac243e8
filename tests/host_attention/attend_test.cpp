// `passel attend` on files, and the .npy reader on bad ones.
#include "runtime/cli/attend/attend.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/cli/attend/npy.h"
#include "tests/host_attention/reference.h"

namespace passel::cli {
namespace {

namespace fs = std::filesystem;

class AttendTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("passel_attend_" + std::to_string(getpid()));
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string Path(const std::string& name) const { return (dir_ / name).string(); }

  std::string WriteRaw(const std::string& header, size_t data_bytes, char version = 1,
                       size_t claimed = SIZE_MAX) {
    const std::string path = Path("raw.npy");
    std::ofstream out(path, std::ios::binary);
    const size_t size = claimed == SIZE_MAX ? header.size() : claimed;
    out << "\x93NUMPY" << version << '\0' << static_cast<char>(size & 0xff)
        << static_cast<char>(size >> 8 & 0xff);
    if (version > 1) out << static_cast<char>(size >> 16) << static_cast<char>(size >> 24);
    out << header << std::string(data_bytes, '\0');
    return path;
  }
  void ExpectRefused(const std::string& path, const std::string& why) {
    try {
      ReadNpy(path, 2);
      ADD_FAILURE() << "accepted: " << why;
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kIo);
      EXPECT_NE(std::string(e.what()).find(path), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  }

  fs::path dir_;
};

TEST_F(AttendTest, NpyRoundTripAndEveryFormatVersion) {
  const std::vector<float> data = {1, 2, 3, -4, 5.5f, 0};
  WriteNpy(Path("a.npy"), {2, 3}, std::span<const float>(data));
  EXPECT_EQ(fs::file_size(Path("a.npy")) % 64, 6 * 4u);
  const NpyArray read = ReadNpy(Path("a.npy"), 2);
  EXPECT_EQ(read.shape, (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(read.data, data);
  for (const char version : {'\1', '\2', '\3'}) {
    const std::string header = "{'fortran_order':False,'shape':(2,1),'descr':'<f4'}  \n";
    EXPECT_EQ(ReadNpy(WriteRaw(header, 8, version), 2).data.size(), 2u);
  }
}

TEST_F(AttendTest, NpyReaderRefusesWhatIsNotRight) {
  const auto header = [](const std::string& descr, const std::string& shape) {
    return "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }\n";
  };
  ExpectRefused(Path("missing.npy"), "can't be read");
  ExpectRefused(WriteRaw(header("<f8", "(1, 1)"), 8), "float32");
  ExpectRefused(WriteRaw(header("<f4", "(2, 2)"), 15), "bytes of data");
  ExpectRefused(WriteRaw(header("<f4", "(2, 2)"), 17), "bytes of data");
  ExpectRefused(WriteRaw(header("<f4", "(4,)"), 16), "dimensions");
  ExpectRefused(WriteRaw(header("<f4", "(4294967296, 4294967296)"), 0), "overflows");
  ExpectRefused(WriteRaw(header("<f4", "(4611686018427387904, 1)"), 0), "bytes of data");
  ExpectRefused(WriteRaw(header("<f4", "(99999999999999999999999, 1)"), 0), "overflows");
  ExpectRefused(WriteRaw(header("<f4", "(-1, 1)"), 0), "shape");
  ExpectRefused(WriteRaw(header("<f4", "(1, 1"), 4), "malformed");
  ExpectRefused(WriteRaw("{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1), }", 4),
                "C order");
  ExpectRefused(WriteRaw("{'descr': '<f4', 'shape': (1, 1), }", 4), "malformed");
  ExpectRefused(WriteRaw("{'descr': '<f4", 4), "open string");
  ExpectRefused(WriteRaw(header("<f4", "(1, 1)"), 4, 9), "format");
  ExpectRefused(WriteRaw(header("<f4", "(1, 1)"), 4, 1, 60000), "truncated");
  ExpectRefused(WriteRaw(header("<f4", "(1, 1)"), 4, 2, 0x7fffffff), "too long");
  const std::vector<float> values = {0, 1, std::numeric_limits<float>::quiet_NaN(), 3};
  cli::WriteNpy(Path("nan.npy"), {2, 2}, values);
  ExpectRefused(Path("nan.npy"), "value 2 is not finite");
  std::ofstream(Path("short.npy")) << "\x93NUM";
  ExpectRefused(Path("short.npy"), "not a .npy file");
}

TEST_F(AttendTest, WritesTheAttentionOfTheSampledSet) {
  using host::reference::Data;
  const uint32_t k = 6, l = 30, d = 32, heads = 4, kv_heads = 2, group = heads / kv_heads;
  const uint64_t n = 1500;
  std::vector<Data> parts;
  std::vector<float> q, keys, values;
  for (uint32_t head = 0; head < kv_heads; ++head) {
    parts.push_back(host::reference::MakeData(50 + head, n, d, group));
    q.insert(q.end(), parts[head].q.begin(), parts[head].q.end());
    for (uint64_t i = 0; i < n; ++i) {
      for (uint32_t j = 0; j < d; ++j) {
        keys.push_back(ToFloat(parts[head].rows[i * 2 * d + j]));
        values.push_back(ToFloat(parts[head].rows[i * 2 * d + d + j]));
      }
    }
  }
  const std::vector<float> r = RandomProjections(9, d, k, l);
  AttendArgs args;
  args.q = Path("q.npy");
  args.k = Path("k.npy");
  args.v = Path("v.npy");
  args.projections = Path("r.npy");
  args.out = Path("o.npy");
  args.lse = Path("lse.npy");
  args.ids = Path("ids.npy");
  args.threads = 2;
  args.repeat = 2;
  args.cold = true;
  args.json = true;
  args.bits = k;
  args.tables = l;
  args.block_tokens = 700;
  WriteNpy(args.q, {heads, d}, std::span<const float>(q));
  WriteNpy(args.k, {kv_heads, n, d}, std::span<const float>(keys));
  WriteNpy(args.v, {kv_heads, n, d}, std::span<const float>(values));
  WriteNpy(args.projections, {d, uint64_t{k} * l}, std::span<const float>(r));
  testing::internal::CaptureStdout();
  EXPECT_EQ(RunAttend(args), 0);
  const std::string printed = testing::internal::GetCapturedStdout();
  for (const char* name : {"\"probe\":", "\"attend\":", "\"total\":", "\"sampled_fraction\":"}) {
    EXPECT_NE(printed.find(name), std::string::npos) << printed;
  }
  const NpyArray out = ReadNpy(args.out, 2);
  const NpyArray lse = ReadNpy(args.lse, 1);
  size_t sampled = 0;
  for (uint32_t h = 0; h < heads; ++h) {
    const Data& data = parts[h / group];
    const auto codes = host::reference::Hash(data, 9, k, l);
    const auto ids = host::reference::Sampled(codes, h % group, l, 0, n);
    sampled += ids.size();
    const auto want = host::reference::Attend(data, h % group, ids, k, l);
    EXPECT_LT(host::reference::OutputError(want, &out.data[size_t{h} * d], 1.0f), 1e-4);
    EXPECT_NEAR(lse.data[h], want.max + std::log(want.den), 1e-4);
  }
  EXPECT_TRUE(sampled > 0 && sampled < n * heads / 2) << sampled;
  EXPECT_EQ(fs::file_size(args.ids) % 64, sampled * 8 % 64);
  EXPECT_EQ(fs::file_size(args.ids + ".offsets.npy") % 64, (heads + 1) * 8 % 64);

  args.projections = args.q;
  EXPECT_THROW(RunAttend(args), Error);
  args.projections = Path("r.npy");
  args.memory_bytes = 1000;
  try {
    RunAttend(args);
    ADD_FAILURE() << "ran within 1,000 bytes";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kMemory);
  }
  args.out = Path("no/such/folder.npy");
  args.memory_bytes = 0;
  EXPECT_THROW(RunAttend(args), Error);
}

}  // namespace
}  // namespace passel::cli
