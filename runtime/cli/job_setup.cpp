#include "runtime/cli/job_setup.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "cluster/config.h"
#include "cluster/machine.h"
#include "gpu/device.h"
#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/engine/host_rank.h"
#include "runtime/engine/leader.h"
#include "runtime/engine/model_rank.h"
#include "runtime/model/model_file.h"
#include "runtime/model/transformer.h"
#include "transport/ucx_channel.h"

namespace passel {
namespace {

using cluster::Role;

// Everything a rank owns, in the order in which it must go again (last first).
struct Rank {
  engine::Job job;
  std::unique_ptr<model::ModelFile> file;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<transport::UcxChannel> channel;
  std::unique_ptr<gpu::Device> device;
  std::unique_ptr<Collectives> collectives;
  std::unique_ptr<model::Transformer> transformer;
  std::unique_ptr<engine::HostRank> host;
  std::unique_ptr<engine::Report> report;
  Work work;
  bool started = false;  // past the last common step: errors are this rank's alone

  bool leads() const { return job.self.value == 0; }
  bool is_model() const { return job.info().role == Role::kModel; }
};

std::unique_ptr<gpu::Device> MakeDevice(const engine::Job& job) {
  const config::Gpu& g = job.config.gpu();
  gpu::DeviceOptions options{g.memory_limit_bytes(), static_cast<int32_t>(g.threads()),
                             job.config.engine().deterministic()};
  options.local_ranks = 0;
  for (const cluster::RankInfo& r : job.ranks) {
    if (r.role != Role::kModel || r.node != job.info().node) continue;
    if (r.rank.value < job.self.value) ++options.local_rank;
    ++options.local_ranks;
  }
  if (g.backend() == config::Gpu::CPU) return gpu::MakeCpuDevice(options);
  std::string why;
  if (auto device = gpu::MakeCudaDevice(options, &why)) return device;
  if (g.backend() == config::Gpu::CUDA) {
    throw Error(ErrorClass::kUsage, "gpu.backend: CUDA is not to be had: " + why);
  }
  return gpu::MakeCpuDevice(options);
}

// A line every five seconds of loading; on a terminal at once, then twice a second.
model::LoadProgress PrintLoading(int32_t layers) {
  using Clock = std::chrono::steady_clock;
  const bool terminal = isatty(STDERR_FILENO) != 0;
  const std::chrono::milliseconds every(terminal ? 500 : 5000);
  const auto start = Clock::now();
  return [=, next = terminal ? start : start + every, began = false](int32_t loaded,
                                                                     uint64_t bytes) mutable {
    const auto now = Clock::now();
    const bool last = loaded == layers;  // ends what was begun
    if (last ? !began : now < next) return;
    next = now + every;
    began = true;
    fmt::print(stderr, "{}loading: {} of {} layers, {:.1f} GB in {:.0f} s{}",
               terminal ? "\r\033[K" : "", loaded, layers, static_cast<double>(bytes) / 1e9,
               std::chrono::duration<double>(now - start).count(), terminal && !last ? "" : "\n");
    std::fflush(stderr);
  };
}

void PrintRanks(const engine::Job& job, const cluster::Machine& machine) {
  fmt::print("{:>5}  {:<6} {:<20} {:>6} {:>16}\n", "rank", "role", "node", "cpus", "bytes");
  for (const auto& r : job.ranks) {
    fmt::print("{:>5}  {:<6} {:<20} {:>6} {:>16}\n", r.rank.value,
               r.role == Role::kModel ? "model" : "host", r.node, machine.cpus_in_mask,
               r.memory_bytes);
  }
  fmt::print("\n{}", cluster::CanonicalText(job.config));
}

void SetUp(cluster::Launch& launch, const JobOptions& options, const WorkMaker& make_work,
           Rank* rank) {
  engine::Job& job = rank->job;
  cluster::Machine machine;
  launch.Agree([&] {
    if (!options.usage_error.empty()) throw Error(ErrorClass::kUsage, options.usage_error);
    job.config = cluster::LoadConfig(options.config_path, options.overrides);
    if (job.config.model().path().empty()) {
      throw Error(ErrorClass::kUsage,
                  "model.path: expected a model; set it in the config or with "
                  "--set model.path=…");
    }
    rank->file = model::ModelFile::Open(job.config.model().path());
    job.model = rank->file->config();
    machine = cluster::ReadMachine();
  });
  std::optional<Role> role;
  if (!options.role.empty()) role = options.role == "host" ? Role::kHost : Role::kModel;
  job.ranks =
      launch.AssignRoles(job.config.cluster().model_ranks(), role, cluster::ConfigHash(job.config));
  job.self = RankId(launch.world_rank());

  uint64_t memory = 0;
  uint32_t threads = 1;  // the one that communicates
  const auto or_mask = [&](uint32_t wanted) { return wanted > 0 ? wanted : machine.cpus_in_mask; };
  launch.Agree([&] {
    cluster::DenseLayers(job.config.attention(), static_cast<uint32_t>(job.model.layers));
    // UCX reads its environment before other threads start.
    if (job.hosts() > 0) rank->channel = transport::MakeUcxChannel({job.self});
    if (rank->is_model()) {
      rank->device = MakeDevice(job);
      memory = rank->device->info().memory_bytes;
      if (rank->device->info().backend == "CPU") threads = or_mask(job.config.gpu().threads());
    } else {
      memory = cluster::HostMemoryBudget(job.config.host(), machine, job.info().node_host_ranks);
      const bool alone =
          std::ranges::count(job.ranks, job.info().cpu_group, &cluster::RankInfo::cpu_group) == 1;
      job.host_threads = cluster::HostThreads(job.config.host(), machine, alone);
      threads += job.host_threads;
    }
  });
  const auto address = rank->channel ? rank->channel->address() : std::vector<std::byte>{};
  const uint64_t nonce = launch.Exchange(job.ranks, threads, memory, address);
  uint32_t all_threads = 0;
  for (const auto& r : job.ranks) {
    all_threads += r.cpu_group == job.info().cpu_group ? r.threads : 0;
  }
  job.spin = cluster::SpinTime(machine, all_threads);
  if (rank->channel) rank->channel->SetSpin(job.spin);
  rank->collectives = launch.MakeModelCollectives(job.ranks);
  launch.Agree([&] {
    if (!rank->is_model()) return;
    rank->collectives = rank->device->MakeCollectives(std::move(rank->collectives));
  });
  if (options.dry_run) {
    if (rank->leads()) PrintRanks(job, machine);
    return;
  }
  launch.Agree([&] {
    if (rank->leads()) {
      rank->tokenizer = Tokenizer::Make(rank->file->tokenizer());
      rank->work = make_work(job, *rank->tokenizer);
    }
    if (rank->channel) {
      std::map<RankId, std::vector<std::byte>> addresses;
      for (const auto& r : job.ranks) addresses[r.rank] = r.address;
      rank->channel->Connect(addresses, nonce);
    }
    const std::string warning = cluster::AffinityWarning(
        machine, rank->is_model() ? job.config.gpu().threads() : job.config.host().threads(),
        static_cast<uint32_t>(std::count_if(job.ranks.begin(), job.ranks.end(), [&](const auto& r) {
          return r.node == job.info().node;
        })));
    if (!warning.empty() && rank->leads()) spdlog::warn("{}", warning);
    if (rank->is_model()) {
      const bool prints = rank->leads() && rank->work.progress;
      rank->transformer =
          std::make_unique<model::Transformer>(*rank->file, *rank->device, *rank->collectives,
                                               prints ? PrintLoading(job.model.layers) : nullptr);
    } else {
      rank->host = std::make_unique<engine::HostRank>(job, *rank->channel, memory);
    }
    // Last: a job that cannot start leaves no run directory.
    if (rank->leads()) {
      rank->report =
          std::make_unique<engine::Report>(options.run_directory, job.ranks, rank->work.progress);
    }
  });
  rank->started = true;
  if (rank->leads() && job.hosts() > 0 && job.sliding()) {
    spdlog::warn(
        "the model attends a sliding window of {} tokens, kept on the model rank; the {} "
        "host ranks hold nothing",
        job.model.sliding_window, job.hosts());
  }
  if (rank->leads() && rank->work.progress) {
    const int model_ranks = rank->collectives->size();
    spdlog::info(
        "{} on {}{}; {} host ranks{}", rank->file->config().architecture, rank->device->info().name,
        model_ranks == 1
            ? ""
            : fmt::format(", {} model ranks over {}", model_ranks, rank->collectives->name()),
        job.hosts(),
        job.hosts() > 0 ? " over " + rank->channel->Describe(job.RanksOf(Role::kHost).front())
                        : "");
  }
}

int ExitCodeOf(const std::exception& e) {
  if (const auto* error = dynamic_cast<const Error*>(&e)) return error->exit_code();
  const bool memory = dynamic_cast<const std::bad_alloc*>(&e) != nullptr;
  return static_cast<int>(memory ? ErrorClass::kMemory : ErrorClass::kBug);
}

void ShutDownHosts(engine::ModelRank& model, const engine::Job& job, transport::Channel* channel,
                   int exit_code) {
  if (!channel || job.self.value != 0) return;
  cluster::proto::Control message;
  message.mutable_shutdown()->set_exit_code(static_cast<uint32_t>(exit_code));
  model.link()->SendControlToAll(message);
}

int Lead(Rank* rank) {
  engine::Leader* leader = nullptr;
  engine::ModelRank model(rank->job, *rank->device, *rank->transformer, *rank->collectives,
                          rank->channel.get(),
                          [&](RankId from, const cluster::proto::Control& message) {
                            if (leader) leader->OnControl(from, message);
                          });
  engine::Leader lead(rank->job, model, *rank->tokenizer, *rank->work.source, *rank->work.sink,
                      *rank->report);
  leader = &lead;
  try {
    lead.Run();
    lead.CollectHostStats();
    rank->report->Finish(0);
    if (rank->work.finished) rank->work.finished(rank->job, *rank->report);
  } catch (const std::exception& e) {
    ShutDownHosts(model, rank->job, rank->channel.get(), ExitCodeOf(e));
    if (rank->channel) rank->channel->Close(std::chrono::seconds(1));
    try {
      rank->report->Finish(ExitCodeOf(e));
    } catch (const Error&) {  // the first error is the one to tell
    }
    throw;
  }
  ShutDownHosts(model, rank->job, rank->channel.get(), 0);
  if (rank->channel) rank->channel->Close(std::chrono::seconds(5));
  return 0;
}

int RunRank(Rank* rank) {
  if (rank->host) {
    const int code = rank->host->Run();
    rank->channel->Close(std::chrono::seconds(5));
    return code;
  }
  if (rank->leads()) return Lead(rank);
  engine::ModelRank model(rank->job, *rank->device, *rank->transformer, *rank->collectives,
                          rank->channel.get(), [](RankId, const cluster::proto::Control&) {});
  model.Follow();
  if (rank->channel) rank->channel->Close(std::chrono::seconds(5));
  return 0;
}

}  // namespace

int RunJob(int* argc, char*** argv, const JobOptions& options, const WorkMaker& make_work) {
  cluster::Launch launch(argc, argv);
  Rank rank;
  int code = 0;
  std::string message;
  try {
    SetUp(launch, options, make_work, &rank);
    if (rank.started) return RunRank(&rank);
    if (rank.channel) rank.channel->Close(std::chrono::seconds(1));
    return 0;
  } catch (const cluster::SilentError& e) {
    code = e.exit_code();
  } catch (const Error& e) {
    code = e.exit_code();
    message = e.what();
  } catch (const std::exception& e) {
    code = ExitCodeOf(e);
    message = std::string(code == static_cast<int>(ErrorClass::kMemory) ? "out of memory: "
                                                                        : "unexpected: ") +
              Printable(e.what(), 1000);
  }
  if (!message.empty()) fmt::print(stderr, "passel: error: {}\n", message);
  std::fflush(nullptr);
  const bool alone = rank.started && (code == static_cast<int>(ErrorClass::kCluster) ||
                                      rank.job.config.cluster().model_ranks() > 1 || !rank.leads());
  if (alone) {
    rank.work = {};  // its files are as they should be
    launch.Abandon();
    _exit(code);
  }
  if (rank.channel) rank.channel->Close(std::chrono::seconds(1));
  return code;
}

}  // namespace passel
