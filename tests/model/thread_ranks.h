#pragma once

#include <algorithm>
#include <barrier>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "runtime/base/collectives.h"
#include "runtime/base/error.h"

namespace passel {

// Collectives that belong to someone else, for what wants to own its own.
class BorrowedCollectives final : public Collectives {
 public:
  explicit BorrowedCollectives(Collectives& lender) : lender_(lender) {}
  int rank() const override { return lender_.rank(); }
  int size() const override { return lender_.size(); }
  std::string_view name() const override { return "threads"; }
  void AllReduceSum(std::span<float> data) override { lender_.AllReduceSum(data); }
  void AllGather(std::span<const float> in, std::span<const size_t> counts,
                 std::span<float> out) override {
    lender_.AllGather(in, counts, out);
  }
  void Broadcast(std::span<std::byte> data, int root) override { lender_.Broadcast(data, root); }

 private:
  Collectives& lender_;
};

// Model ranks as threads of a test: what they exchange in a collective operation.
class ThreadRanks {
 public:
  explicit ThreadRanks(int size) : size_(size), floats_(size), bytes_(size), barrier_(size) {}

  // Runs f(collectives) as every rank, each in its thread; rethrows the first error. f must fail on
  // all ranks or none: a rank waits for the others.
  template <typename F>
  void Run(const F& f) {
    std::mutex mutex;
    std::exception_ptr failed;
    {
      std::vector<std::jthread> threads;
      for (int rank = 0; rank < size_; ++rank) {
        threads.emplace_back([&, rank] {
          Rank collectives(*this, rank);
          try {
            f(collectives);
          } catch (...) {
            const std::lock_guard lock(mutex);
            if (!failed) failed = std::current_exception();
          }
        });
      }
    }
    if (failed) std::rethrow_exception(failed);
  }

 private:
  class Rank final : public Collectives {
   public:
    Rank(ThreadRanks& all, int rank) : all_(all), rank_(rank) {}
    int rank() const override { return rank_; }
    int size() const override { return all_.size_; }
    std::string_view name() const override { return "threads"; }

    void AllReduceSum(std::span<float> data) override {
      all_.floats_[static_cast<size_t>(rank_)] = data;
      all_.barrier_.arrive_and_wait();
      std::vector<float> sum(data.size());
      for (const std::span<const float> part : all_.floats_) {
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
      }
      all_.barrier_.arrive_and_wait();
      std::copy(sum.begin(), sum.end(), data.begin());
    }

    void AllGather(std::span<const float> in, std::span<const size_t> counts,
                   std::span<float> out) override {
      Check(in.size() == counts[static_cast<size_t>(rank_)], "AllGather: counts");
      all_.floats_[static_cast<size_t>(rank_)] = in;
      all_.barrier_.arrive_and_wait();
      auto to = out.begin();
      for (const std::span<const float> part : all_.floats_) {
        to = std::copy(part.begin(), part.end(), to);
      }
      Check(to == out.end(), "AllGather: size of out");
      all_.barrier_.arrive_and_wait();
    }

    void Broadcast(std::span<std::byte> data, int root) override {
      all_.bytes_[static_cast<size_t>(rank_)] = data;
      all_.barrier_.arrive_and_wait();
      const auto from = all_.bytes_[static_cast<size_t>(root)];
      if (rank_ != root) std::copy(from.begin(), from.end(), data.begin());
      all_.barrier_.arrive_and_wait();
    }

   private:
    ThreadRanks& all_;
    int rank_;
  };

  int size_;
  std::vector<std::span<const float>> floats_;
  std::vector<std::span<std::byte>> bytes_;
  std::barrier<> barrier_;
};

}  // namespace passel
