#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/cli/job_setup.h"

namespace passel {

struct BenchOptions {
  std::vector<int64_t> contexts;
  std::vector<int64_t> batches;
  int64_t new_tokens = 128;
  std::string format = "md";  // md, csv, json
};

// The work of `passel bench`: for each context and batch in turn, `batch` requests of `context`
// random tokens that generate `new_tokens` each; then a table. Figures are defined in
// docs/performance.md.
Work MakeBenchWork(const BenchOptions& options, const engine::Job& job, const Tokenizer& tokenizer);

}  // namespace passel
