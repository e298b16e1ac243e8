// The way of a layer's queries to the host ranks and back, station by station: under mpirun, rank 0
// is the model rank and all others are host ranks, with the runtime's own ends of the wire
// (HostLink, HostRank), UCX and the device that rank 0 finds. Times are taken around public calls:
// in a channel that stands between those ends and UCX, and by rank 0. One table;
// docs/performance.md defines it.
//
//   mpirun -np 4 hand_over --batch 8 --threads 4
#include <fmt/format.h>
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cluster/config.h"
#include "cluster/launch.h"
#include "cluster/machine.h"
#include "gpu/device.h"
#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/engine/host_link.h"
#include "runtime/engine/host_rank.h"
#include "transport/ucx_channel.h"

namespace passel {
namespace {

using engine::HostLink;
using engine::HostRank;
using engine::Job;
using gpu::DType;
using gpu::Tensor;
using std::chrono::milliseconds;
using transport::FrameHeader;
using transport::FrameType;

constexpr uint64_t kSinks = 4, kWindow = 64;

// Nanoseconds of the machine's clock, which all ranks share.
uint64_t Now() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

// When a query passed: the host's three, then the model rank's two of this host.
enum Station : size_t { kReceived, kHandedOut, kReplied, kCameBack, kTaken, kStations };
using Stamps = std::array<uint64_t, kStations>;

// Passes everything on and notes when queries and partials pass, by the query's step.
class StampingChannel final : public transport::Channel {
 public:
  StampingChannel(transport::Channel& channel, size_t steps, size_t peers)
      : channel_(channel), steps_(steps), stamps_(steps * peers) {}

  // Of the query of `step`, to or from `peer`.
  Stamps& At(uint64_t step, RankId peer) {
    return stamps_[step + static_cast<size_t>(peer.value) * steps_];
  }

  RankId self() const override { return channel_.self(); }
  void SetFrameHandler(FrameHandler handler) override {
    channel_.SetFrameHandler([this, handler = std::move(handler)](
                                 const FrameHeader& h, transport::IncomingPayload& payload) {
      const uint64_t come = Now();
      handler(h, payload);
      const uint64_t gone = Now();
      Note(h, RankId(h.source), FrameType::kQuery, kReceived, come);
      Note(h, RankId(h.source), FrameType::kQuery, kHandedOut, gone);
      Note(h, RankId(h.source), FrameType::kPartial, kCameBack, come);
      Note(h, RankId(h.source), FrameType::kPartial, kTaken, gone);
    });
  }
  void SetPeerLostHandler(PeerHandler handler) override {
    channel_.SetPeerLostHandler(std::move(handler));
  }
  void Send(RankId to, transport::OutgoingFrame frame) override {
    Note(frame.header, to, FrameType::kPartial, kReplied, Now());
    channel_.Send(to, std::move(frame));
  }
  void Post(RankId to, transport::OutgoingFrame frame) override {
    Note(frame.header, to, FrameType::kPartial, kReplied, Now());
    channel_.Post(to, std::move(frame));
  }
  std::shared_ptr<transport::SharedMemory> ShareMemory(size_t bytes,
                                                       std::span<const RankId> readers) override {
    return channel_.ShareMemory(bytes, readers);
  }
  bool Progress() override { return channel_.Progress(); }
  void Wait(milliseconds timeout) override { channel_.Wait(timeout); }
  void Wake() override { channel_.Wake(); }
  uint64_t PendingBytes(RankId to) const override { return channel_.PendingBytes(to); }
  void SetEpoch(uint32_t epoch) override { channel_.SetEpoch(epoch); }
  void ClosePeer(RankId peer) override { channel_.ClosePeer(peer); }
  transport::PeerState peer_state(RankId peer) const override { return channel_.peer_state(peer); }
  const transport::ChannelStats& stats() const override { return channel_.stats(); }
  std::string Describe(RankId peer) const override { return channel_.Describe(peer); }
  void Close(milliseconds timeout) override { channel_.Close(timeout); }

 private:
  void Note(const FrameHeader& h, RankId peer, FrameType type, Station station, uint64_t when) {
    if (h.type == type && h.step < steps_) At(h.step, peer)[station] = when;
  }

  transport::Channel& channel_;
  size_t steps_;
  std::vector<Stamps> stamps_;
};

struct Arguments {
  uint32_t batch = 8, threads = 4, layers = 32;
  uint64_t tokens = 1;
  size_t repeats = 1000, warm = 200;
  uint32_t pause_us = 150;
  uint32_t poll_us = 0;
  bool cpu = false;

  size_t steps() const { return warm + repeats; }
  // Offloaded tokens of the prompt: fewer than the open run holds count as generated.
  uint64_t prompt() const { return tokens < host::kOpenTokens ? 0 : tokens; }
};

// One layer of Llama-3.1-8B, many times.
Job MakeJob(const Arguments& a, cluster::Launch& launch) {
  Job job;
  const std::vector<std::string> settings = {
      "attention.k=10",          "attention.l=150",
      "attention.exact_below=0", "attention.no_dense_layers=true",
      "cluster.placement=HEAD",  fmt::format("attention.sinks={}", kSinks),
      "cluster.model_ranks=1",   fmt::format("attention.window={}", kWindow),
      "host.block_tokens=49152", fmt::format("host.threads={}", a.threads)};
  job.config = cluster::LoadConfig("", settings);
  job.model.architecture = "llama";
  job.model.layers = static_cast<int32_t>(a.layers);
  job.model.heads = 32;
  job.model.kv_heads = 8;
  job.model.head_dim = 128;
  job.model.context_length = 131072;
  job.ranks = launch.AssignRoles(1, std::nullopt, cluster::ConfigHash(job.config));
  job.self = RankId(launch.world_rank());
  return job;
}

// Rank 0: opens the requests, brings their tokens, and asks.
class Model {
 public:
  Model(const Arguments& arguments, const Job& job, gpu::Device& device, StampingChannel& channel)
      : a_(arguments),
        job_(job),
        device_(device),
        channel_(channel),
        link_(job, channel, Slice(job), [this](RankId, const cluster::proto::Control& message) {
          answers_ += message.has_stats_reply() || message.open_reply().accepted();
        }) {}

  void Fill() {
    const uint64_t most = kSinks + kWindow + a_.tokens;
    const uint64_t prompt = a_.prompt() > 0 ? most : kSinks + kWindow;
    const auto cols = static_cast<size_t>(job_.model.kv_heads * job_.model.head_dim);
    Random random(5);
    const uint64_t piece = std::min<uint64_t>(a_.tokens, 2048);
    struct Memory {
      std::vector<bf16> kv;
      std::vector<uint16_t> codes;
    };
    const auto memory = std::make_shared<Memory>();
    memory->kv.resize(2 * piece * cols);
    memory->codes.resize(piece * 8 * job_.wire_shape().l);
    for (bf16& x : memory->kv) x = ToBf16(static_cast<float>(random.Normal()));
    for (uint16_t& c : memory->codes) c = static_cast<uint16_t>(random.Next() % 1024);
    requests_.resize(a_.batch);
    for (uint32_t i = 0; i < a_.batch; ++i) {
      engine::HostedRequest& hosted = requests_[i];
      hosted.request = RequestId(i + 1);
      hosted.placement = {cluster::PlacementMode::kHead, 0, job_.hosts(), 8};
      hosted.segments = job_.Segments(prompt, most);
      cluster::proto::Control message;
      auto& open = *message.mutable_open();
      open.set_request(i + 1);
      open.set_prompt_tokens(prompt);
      open.set_max_tokens(most);
      open.set_mode(static_cast<uint32_t>(cluster::PlacementMode::kHead));
      AskAll(message);
      for (uint32_t layer = 0; layer < a_.layers; ++layer) {
        for (uint64_t done = 0; done < a_.tokens; done += piece) {
          const engine::KvRun run{&hosted, done, std::min(piece, a_.tokens - done), 0};
          link_.SendKv(static_cast<int32_t>(layer), {&run, 1}, piece, memory->kv.data(),
                       memory->codes.data(), memory);
          while (memory.use_count() > 16) link_.Pump(milliseconds(1));  // a frame under way each
        }
      }
    }
    while (memory.use_count() > 1) link_.Pump(milliseconds(1));
    cluster::proto::Control message;
    message.mutable_stats_query();
    AskAll(message);
  }

  void Run() {
    const gpu::AttentionShape shape{32, 8, 128, 0};
    const auto n = static_cast<int64_t>(a_.batch);
    const int64_t cols = shape.heads * shape.head_dim, code_cols = shape.heads * 150;
    const auto q_memory = device_.Allocate(static_cast<size_t>(n * cols) * sizeof(float));
    const std::shared_ptr<gpu::Buffer> q_host =
        link_.AllocateStaging(device_, q_memory->bytes() / 2);
    const auto codes_host =
        link_.AllocateStaging(device_, static_cast<size_t>(n * code_cols) * sizeof(uint16_t));
    const auto scratch = device_.Allocate(codes_host->bytes());
    const Tensor q{q_memory->data(), DType::kF32, n, cols, cols};
    const Tensor q_out{q_host->data(), DType::kBf16, n, cols, cols};
    const Tensor codes{codes_host->data(), DType::kU16, n, code_cols, code_cols};
    const Tensor before{scratch->data(), DType::kU16, n, code_cols, code_cols};
    std::vector<float> values(static_cast<size_t>(n * cols));
    Random random(7);
    for (float& x : values) x = static_cast<float>(random.Normal());
    device_.CopyToDevice(q.data, values.data(), q_memory->bytes());
    const config::Attention& c = job_.config.attention();
    device_.SetProjections(RandomProjections(c.seed(), 128, c.k(), c.l()), 128, 10, 150);
    device_.Record()->Wait();
    const bool queued = device_.info().backend == "CUDA";

    std::vector<engine::QueryRow> rows;
    for (uint32_t row = 0; row < a_.batch; ++row) {
      rows.push_back({&requests_[row], a_.tokens, false, row});
    }
    const std::vector<engine::QueryFrame> plan = link_.Plan(rows);
    engine::ReplyBox box;
    std::vector<float> replies(link_.ReplyFloats(plan));
    box.values = replies;
    for (size_t step = 0; step < a_.steps(); ++step) {
      // On a GPU, something that runs while what is timed is issued behind it.
      for (int i = 0; queued && i < 4; ++i) device_.HashCodes(q, {}, before);
      const auto begun = device_.Record();
      if (!queued) ready_.push_back(Now());
      device_.Convert(q, q_out);
      device_.HashCodes(q, {}, codes);
      const auto done = device_.Record();
      if (queued) {
        begun->Wait();
        ready_.push_back(Now());
      }
      while (!done->Done()) link_.Pump(milliseconds(0));
      first_.push_back(Now());
      link_.SendQuery(0, static_cast<int32_t>(step % a_.layers), step, plan, false,
                      static_cast<const bf16*>(q_host->data()),
                      static_cast<const uint16_t*>(codes_host->data()), q_host, &box);
      sent_.push_back(Now());
      while (!box.complete()) link_.Pump(milliseconds(50));
      for (const uint64_t end = Now() + a_.pause_us * uint64_t{1000}; Now() < end;) {
        link_.Pump(milliseconds(0));
      }
    }
    Check(link_.dropped() == 0, "a reply was not taken");
  }

  void Stop() {
    cluster::proto::Control message;
    message.mutable_shutdown();
    link_.SendControlToAll(message);  // goes out before the channel closes
  }

  // hosts: by host, what their channels noted of rank 0's queries.
  void Print(const std::vector<std::vector<Stamps>>& hosts) const {
    fmt::print(
        "hand-over of a layer: B={}, {} hosts of {} threads, {} tokens, {}, {}; idle threads "
        "poll for {} us\n\n| station | us: 10% | median | 90% |\n|---|---|---|---|\n",
        a_.batch, hosts.size(), a_.threads, a_.tokens, device_.info().name,
        channel_.Describe(RankId(1)), job_.spin.count());
    Line("queries and codes in host memory (from before, on the device)",
         [&](size_t s) { return first_[s] - ready_[s]; });
    Line("last query sent (from here on: since the first is sent)",
         [&](size_t s) { return sent_[s] - first_[s]; });
    // Of the host that is there last.
    const auto last = [&](Station station) {
      return [&, station](size_t s) {
        uint64_t latest = 0;
        for (size_t h = 0; h < hosts.size(); ++h) {
          const bool ours = station == kCameBack || station == kTaken;
          const RankId rank(static_cast<int32_t>(h + 1));
          latest = std::max(latest, (ours ? channel_.At(s, rank) : hosts[h][s])[station]);
        }
        return latest - first_[s];
      };
    };
    Line("received", last(kReceived));
    Line("parsed, tokens found, work handed out", last(kHandedOut));
    Line("attended, reply written", last(kReplied));
    Line("on the wire", last(kCameBack));
    Line("answer taken by the model rank", last(kTaken));
    Line("in all, from the device and back",
         [&](size_t s) { return first_[s] - ready_[s] + last(kTaken)(s); });
  }

 private:
  static model::TensorSlice Slice(const Job& job) {
    model::TensorSlice slice;
    slice.heads = job.model.heads;
    slice.kv_heads = job.model.kv_heads;
    return slice;
  }

  // Waits until every host has answered.
  void AskAll(const cluster::proto::Control& message) {
    answers_ = 0;
    link_.SendControlToAll(message);
    while (answers_ < job_.hosts()) link_.Pump(milliseconds(10));
  }

  template <typename F>
  void Line(const char* what, F nanoseconds) const {
    std::vector<double> us;
    for (size_t s = a_.warm; s < a_.steps(); ++s) {
      us.push_back(static_cast<double>(nanoseconds(s)) * 1e-3);
    }
    std::sort(us.begin(), us.end());
    const auto at = [&](size_t tenths) { return us[us.size() * tenths / 10]; };
    fmt::print("| {} | {:.1f} | {:.1f} | {:.1f} |\n", what, at(1), at(5), at(9));
  }

  const Arguments& a_;
  const Job& job_;
  gpu::Device& device_;
  StampingChannel& channel_;
  HostLink link_;
  uint32_t answers_ = 0;
  std::vector<engine::HostedRequest> requests_;
  // By step: the queries ready on the device, and in host memory, when the first is sent; the last
  // one sent.
  std::vector<uint64_t> ready_, first_, sent_;
};

std::unique_ptr<gpu::Device> MakeDevice(bool cpu) {
  if (!cpu) {
    if (auto device = gpu::MakeCudaDevice({}, nullptr)) return device;
  }
  return gpu::MakeCpuDevice({.threads = 1});
}

int Run(int argc, char** argv) {
  cluster::Launch launch(&argc, &argv);
  CLI::App app("The way of a layer's queries to the host ranks and back, by station");
  Arguments a;
  app.add_option("--batch", a.batch, "sequences")->check(CLI::Range(1, 1024));
  app.add_option("--threads", a.threads, "of a host rank")->check(CLI::Range(1, 1024));
  app.add_option("--tokens", a.tokens,
                 "of a sequence on the hosts: below 256 attended exactly, 1 being next to no work; "
                 "more are sampled")
      ->check(CLI::Range(1, 100000));
  app.add_option("--layers", a.layers, "that take turns")->check(CLI::Range(1, 1024));
  app.add_option("--repeats", a.repeats, "queries timed")->check(CLI::Range(1, 1000000));
  app.add_option("--pause", a.pause_us, "microseconds between an answer and the next query");
  app.add_option("--poll", a.poll_us,
                 "microseconds for which idle threads poll; 0: as in a job of as many threads");
  app.add_flag("--cpu", a.cpu, "no GPU");
  CLI11_PARSE(app, argc, argv);
  if (launch.world_size() < 2) {
    fmt::print("hand_over: expected mpirun with two ranks or more\n");
    return 2;
  }

  Job job = MakeJob(a, launch);
  const bool leads = job.self.value == 0;
  const auto channel = transport::MakeUcxChannel({job.self});
  const auto device = leads ? MakeDevice(a.cpu) : nullptr;
  const uint64_t nonce =
      launch.Exchange(job.ranks, leads ? 1 : a.threads + 1, uint64_t{64} << 30, channel->address());
  uint32_t threads = 0;
  for (const cluster::RankInfo& r : job.ranks) threads += r.threads;
  job.spin = cluster::SpinTime(cluster::ReadMachine(), threads);
  if (a.poll_us > 0) job.spin = std::chrono::microseconds(a.poll_us);
  channel->SetSpin(job.spin);
  std::map<RankId, std::vector<std::byte>> addresses;
  for (const cluster::RankInfo& r : job.ranks) addresses[r.rank] = r.address;
  channel->Connect(addresses, nonce);
  StampingChannel stamping(*channel, a.steps(), job.ranks.size());

  const auto bytes = static_cast<int>(a.steps() * sizeof(Stamps));
  if (!leads) {
    HostRank(job, stamping, job.info().memory_bytes).Run();
    MPI_Send(stamping.At(0, RankId(0)).data(), bytes, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
  } else {
    Model model(a, job, *device, stamping);
    model.Fill();
    model.Run();
    model.Stop();
    std::vector<std::vector<Stamps>> hosts(job.hosts(), std::vector<Stamps>(a.steps()));
    for (uint32_t h = 0; h < job.hosts(); ++h) {
      MPI_Recv(hosts[h].data(), bytes, MPI_BYTE, static_cast<int>(h + 1), 0, MPI_COMM_WORLD,
               MPI_STATUS_IGNORE);
    }
    model.Print(hosts);
  }
  channel->Close(milliseconds(1000));
  return 0;
}

}  // namespace
}  // namespace passel

int main(int argc, char** argv) { return passel::Run(argc, argv); }
