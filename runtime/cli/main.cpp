#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <iterator>

#include "cluster/config.h"
#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/cli/attend/attend.h"
#include "runtime/cli/bench.h"
#include "runtime/cli/doctor/doctor.h"
#include "runtime/cli/inspect/inspect.h"
#include "runtime/cli/job_setup.h"
#include "runtime/cli/version.h"
#include "runtime/engine/request_io.h"

namespace passel {
namespace {

void AddJobOptions(CLI::App* app, JobOptions* options) {
  app->add_option("--config", options->config_path, "Config file (configs/*.textproto)");
  app->add_option("--set", options->overrides, "Override a config field: a.b=c")->take_all();
  app->add_option("--role", options->role, "Role of this rank, for mpirun's MPMD form")
      ->check(CLI::IsMember({"model", "host"}));
  app->add_flag("--dry-run", options->dry_run, "Print the ranks and the config, run nothing");
}

struct AttendOptions {
  cli::AttendArgs args;
  std::vector<std::string> overrides;
};

void AddAttendOptions(CLI::App* app, AttendOptions* options) {
  cli::AttendArgs& a = options->args;
  app->add_option("--q", a.q, "Queries, .npy [heads, d] float32")->required();
  app->add_option("--k", a.k, "Keys, .npy [kv_heads, n, d] float32")->required();
  app->add_option("--v", a.v, "Values, .npy [kv_heads, n, d] float32")->required();
  app->add_option("--projections", a.projections, "SimHash projections, .npy [d, k*l] float32")
      ->required();
  app->add_option("--set", options->overrides, "Override a config field: a.b=c")->take_all();
  app->add_option("--threads", a.threads, "Attention threads; 0: the affinity mask's");
  app->add_option("--repeat", a.repeat, "Repetitions")->check(CLI::Range(1, 1 << 30));
  app->add_flag("--cold", a.cold, "Flush the caches before each repetition");
  app->add_option("--out", a.out, "Output, .npy [heads, d]");
  app->add_option("--lse", a.lse, "Log-sum-exp, .npy [heads]");
  app->add_option("--ids", a.ids, "Attended tokens, .npy, with .offsets.npy beside it");
  app->add_flag("--json", a.json, "Print JSON");
}

int RunAttend(AttendOptions& options) {
  const config::Config config = cluster::LoadConfig("", options.overrides);
  engine::Job job;
  job.config = config;
  job.model.heads = job.model.kv_heads = 1;  // the files tell
  const host::Options host = job.host_options(config.host().memory_bytes());
  cli::AttendArgs& a = options.args;
  a.estimator = host.estimator;
  a.kv_type = host.kv_type;
  a.bits = host.k;
  a.tables = host.l;
  a.block_tokens = host.block_tokens;
  a.seed = host.seed;
  a.memory_bytes = host.memory_bytes;
  return cli::RunAttend(a);
}

// As the launchers of Open MPI, MPICH and Slurm tell their processes.
bool StartedByMpirun() {
  const char* const names[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"};
  return std::any_of(std::begin(names), std::end(names),
                     [](const char* name) { return std::getenv(name) != nullptr; });
}

int Main(int argc, char** argv) {
  CLI::App app{"Passel: distributed serving of long-context language models", "passel"};
  app.set_version_flag("--version", std::string("passel ") + kVersion);
  app.require_subcommand(1);

  JobOptions job;
  std::string input, output;
  bool resume = false;
  CLI::App* run = app.add_subcommand("run", "Answer a file of prompts (under mpirun)");
  AddJobOptions(run, &job);
  run->add_option("-i,--input", input, "Prompts, JSON lines")->required();
  run->add_option("-o,--output", output, "Results, JSON lines")->required();
  run->add_flag("--resume", resume, "Go on with an output that has results");
  run->add_option("--run-dir", job.run_directory, "Directory for ranks, events and summary");

  BenchOptions bench_options;
  CLI::App* bench = app.add_subcommand("bench", "Measure speed on random prompts (under mpirun)");
  AddJobOptions(bench, &job);
  bench->add_option("--context", bench_options.contexts, "Prompt lengths")
      ->delimiter(',')
      ->required();
  bench->add_option("--batch", bench_options.batches, "Batch sizes")->delimiter(',')->required();
  bench->add_option("--new-tokens", bench_options.new_tokens, "Tokens to generate")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  bench->add_option("-o,--output", bench_options.format, "Format of the table")
      ->check(CLI::IsMember({"md", "csv", "json"}));

  AttendOptions attend_options;
  CLI::App* attend = app.add_subcommand("attend", "Host attention alone, on .npy files");
  AddAttendOptions(attend, &attend_options);
  std::string model;
  CLI::App* inspect = app.add_subcommand("inspect", "What a model is, and what of it is served");
  inspect->add_option("MODEL", model, "A .gguf file or a Hugging Face directory")->required();
  CLI::App* doctor = app.add_subcommand("doctor", "What Passel finds on this machine");

  try {
    const auto named = [&](CLI::App* a) { return a->get_name() == argv[1]; };
    if (argc > 1 && argv[1][0] != '-' && app.get_subcommands(named).empty()) {
      throw CLI::ExtrasError(app.get_name(), {argv[1]});
    }
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    job.usage_error = std::string(e.what()) + "; see passel --help";
    if (!StartedByMpirun()) throw Error(ErrorClass::kUsage, job.usage_error);
    return RunJob(&argc, &argv, job, {});
  }
  if (*inspect) return RunInspect(model, std::cout);
  if (*doctor) return RunDoctor(std::cout);
  if (*attend) return RunAttend(attend_options);
  return RunJob(&argc, &argv, job, [&](const engine::Job& j, const Tokenizer& tokenizer) {
    if (*bench) return MakeBenchWork(bench_options, j, tokenizer);
    Work work;
    const engine::RequestDefaults defaults{j.config.attention().seed(), j.model.context_length};
    engine::CheckDistinct(input, output);
    std::unordered_set<std::string> done;
    // The input is opened first: a wrong path must not leave an empty output behind.
    { const engine::JsonlSource probe(input, tokenizer, defaults, {}); }
    work.sink = std::make_unique<engine::JsonlSink>(output, resume, tokenizer, &done);
    work.source =
        std::make_unique<engine::JsonlSource>(input, tokenizer, defaults, std::move(done));
    return work;
  });
}

}  // namespace
}  // namespace passel

int main(int argc, char** argv) {
  spdlog::set_default_logger(spdlog::stderr_color_mt("passel"));
  spdlog::set_pattern("%H:%M:%S %l: %v");
  try {
    return passel::Main(argc, argv);
  } catch (const passel::Error& e) {
    fmt::print(stderr, "passel: error: {}\n", e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fmt::print(stderr, "passel: error: unexpected: {}\n", passel::Printable(e.what(), 1000));
    return static_cast<int>(passel::ErrorClass::kBug);
  }
}
