#include "runtime/cli/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel {
namespace {

using Clock = std::chrono::steady_clock;

struct Point {
  int64_t context = 0, batch = 0;
  int64_t done = 0;
  Clock::time_point start;
  double ttft_s = 0;    // mean over requests
  double decode_s = 0;  // mean over requests, first to last token
  double total_s = 0;   // first request in to last result out
  double sampled = 0;   // mean sampled fraction
};

struct Bench {
  BenchOptions options;
  std::vector<Point> points;
  size_t current = 0;
  int64_t issued = 0;
  Random random{1};
  int32_t vocab = 0;
};

// Hands out the next point's requests only when the last point's are all done.
class BenchSource : public engine::RequestSource {
 public:
  explicit BenchSource(std::shared_ptr<Bench> bench) : bench_(std::move(bench)) {}
  std::optional<engine::Request> Next() override {
    Bench& b = *bench_;
    if (b.current == b.points.size()) return std::nullopt;
    Point& p = b.points[b.current];
    if (b.issued == p.batch) {
      if (p.done < p.batch) return std::nullopt;
      b.issued = 0;
      if (++b.current == b.points.size()) return std::nullopt;
      return Next();
    }
    if (b.issued++ == 0) p.start = Clock::now();
    engine::Request r;
    r.custom_id = fmt::format("{}x{}-{}", p.context, p.batch, b.issued);
    for (int64_t i = 0; i < p.context; ++i) {
      r.prompt.push_back(static_cast<int32_t>(b.random.Next() % static_cast<uint64_t>(b.vocab)));
    }
    r.max_tokens = b.options.new_tokens;
    r.sampling.temperature = 0;
    r.ignore_eos = true;
    return r;
  }
  bool exhausted() const override { return bench_->current == bench_->points.size(); }
  std::optional<uint64_t> remaining() const override {
    uint64_t left = 0;
    for (size_t i = bench_->current; i < bench_->points.size(); ++i) {
      left += static_cast<uint64_t>(bench_->points[i].batch);
    }
    return left - static_cast<uint64_t>(bench_->issued);
  }

 private:
  std::shared_ptr<Bench> bench_;
};

class BenchSink : public engine::ResultSink {
 public:
  explicit BenchSink(std::shared_ptr<Bench> bench) : bench_(std::move(bench)) {}
  void Done(const engine::Request&, const engine::Result& result) override {
    Point& p = bench_->points[bench_->current];
    const auto n = static_cast<double>(p.batch);
    p.ttft_s += result.ttft_s / n;
    p.decode_s += result.decode_s / n;
    p.sampled += result.sampled_fraction / n;
    p.total_s = std::chrono::duration<double>(Clock::now() - p.start).count();
    ++p.done;
  }
  void Failed(const engine::Request& request, int, const std::string& message) override {
    throw Error(ErrorClass::kMemory, "bench " + request.custom_id + ": " + message);
  }

 private:
  std::shared_ptr<Bench> bench_;
};

void Print(const Bench& bench, const engine::Report& report) {
  uint64_t kv = 0, tables = 0;
  for (const auto& h : report.hosts()) {
    kv += h.kv_bytes;
    tables += h.table_bytes;
  }
  const auto n = static_cast<double>(bench.options.new_tokens);
  nlohmann::json list = nlohmann::json::array();
  const char* head = bench.options.format == "csv"
                         ? "context,batch,ttft_s,itl_ms,tokens_per_second,sampled_fraction\n"
                         : "| context | batch | TTFT s | ITL ms | tokens/s | sampled fraction |\n"
                           "|---|---|---|---|---|---|\n";
  if (bench.options.format != "json") fmt::print("{}", head);
  for (const Point& p : bench.points) {
    const double itl_ms = n > 1 ? p.decode_s / (n - 1) * 1e3 : 0;
    const double rate = static_cast<double>(p.batch) * n / p.total_s;
    if (bench.options.format == "json") {
      list.push_back({{"context", p.context},
                      {"batch", p.batch},
                      {"ttft_s", p.ttft_s},
                      {"itl_ms", itl_ms},
                      {"tokens_per_second", rate},
                      {"sampled_fraction", p.sampled}});
    } else {
      fmt::print(bench.options.format == "csv" ? fmt::runtime("{},{},{:.4f},{:.3f},{:.2f},{:.5f}\n")
                                               : fmt::runtime("| {} | {} | {:.3f} | {:.2f} | "
                                                              "{:.1f} | {:.4f} |\n"),
                 p.context, p.batch, p.ttft_s, itl_ms, rate, p.sampled);
    }
  }
  if (bench.options.format == "json") {
    fmt::print(
        "{}\n",
        nlohmann::json{{"points", list}, {"host_kv_bytes", kv}, {"host_table_bytes", tables}}.dump(
            1));
  } else {
    fmt::print("\nhost ranks: {} bytes of K and V, {} bytes of tables at their highest\n", kv,
               tables);
  }
}

}  // namespace

Work MakeBenchWork(const BenchOptions& options, const engine::Job& job,
                   const Tokenizer& tokenizer) {
  auto bench = std::make_shared<Bench>();
  bench->options = options;
  bench->vocab = tokenizer.vocab_size();
  for (const int64_t context : options.contexts) {
    for (const int64_t batch : options.batches) {
      if (context < 1 || batch < 1 ||
          batch > static_cast<int64_t>(job.config.engine().max_batch()) ||
          context + options.new_tokens > job.model.context_length) {
        throw Error(ErrorClass::kUsage,
                    fmt::format("bench: context {} with {} new tokens and batch {}: expected at "
                                "most {} tokens (the model's context) and batch {} "
                                "(engine.max_batch)",
                                context, options.new_tokens, batch, job.model.context_length,
                                job.config.engine().max_batch()));
      }
      bench->points.push_back({.context = context, .batch = batch, .start = {}});
    }
  }
  Work work;
  work.source = std::make_unique<BenchSource>(bench);
  work.sink = std::make_unique<BenchSink>(bench);
  work.progress = false;
  work.finished = [bench](const engine::Job&, const engine::Report& report) {
    Print(*bench, report);
  };
  return work;
}

}  // namespace passel
