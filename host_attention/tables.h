#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "host_attention/kernels.h"

namespace passel::host {

// Bytes of K, V and tables in use; shared with whoever may outlive the owner.
class Usage {
 public:
  virtual ~Usage() = default;
  virtual void AddKv(int64_t bytes) = 0;
  virtual void AddTables(int64_t bytes) = 0;
};

// Whether a block of this many tokens is sealed as CSR: bucket bounds must pay for themselves, in
// bytes and in cache misses, against comparing all codes.
bool UsesCsr(uint32_t tokens, uint32_t k);
// Elements of one table's ids or codes: whole SIMD runs.
size_t TableStride(uint32_t tokens);
// Bytes of a block's tables in either form, slack included.
size_t TableBytes(uint32_t tokens, uint32_t k, uint32_t l);
// Bytes of the ids or codes alone, and of the bounds alone (0 for the compact form).
size_t IdBytes(uint32_t tokens, uint32_t l);
size_t BoundBytes(uint32_t tokens, uint32_t k, uint32_t l);

// Counting sort of one table. codes: [tokens], each below 2^k; bounds: [2^k + 1]; ids: [tokens],
// ascending within a bucket. codes and ids must not overlap.
void SortTable(const uint16_t* codes, uint32_t tokens, uint32_t k, uint16_t* bounds, uint16_t* ids);

// The tables of tokens [first, first + tokens) of a segment. Memory is the caller's or its own.
// Built by one owner, then immutable and shared with the queries that run.
class TableBlock {
 public:
  // Memory of its own, counted in `usage`; `tokens` of capacity, in compact form until sealed.
  TableBlock(uint32_t first, uint32_t tokens, uint32_t k, uint32_t l, bool csr,
             std::shared_ptr<Usage> usage);
  // ids: IdBytes(); bounds: BoundBytes(); they outlive this.
  TableBlock(uint32_t first, uint32_t tokens, uint32_t k, uint32_t l, uint16_t* ids,
             uint16_t* bounds);
  ~TableBlock();
  TableBlock(const TableBlock&) = delete;
  TableBlock& operator=(const TableBlock&) = delete;

  uint32_t first() const { return first_; }
  uint32_t tokens() const { return tokens_; }
  bool csr() const { return bounds_ != nullptr; }

  // Stores the codes of tokens [index, index + count) in compact form. codes: [count, l].
  void PutCodes(uint32_t index, uint32_t count, const uint16_t* codes);
  // Turns the codes of table t into ids, in place. scratch: [tokens].
  void SealTable(uint32_t t, uint16_t* scratch);
  // Builds table t from those of adjacent blocks, in order, that together cover this one.
  // scratch: [tokens].
  void MergeTable(uint32_t t, const std::vector<std::shared_ptr<const TableBlock>>& parts,
                  uint16_t* scratch);
  // Appends the tokens (numbered in the segment) below `limit` that share ≥ 2 codes.
  size_t Probe(const Kernels& kernels, const uint16_t* codes, uint32_t limit,
               const ProbeScratch& scratch, uint32_t* out) const;

 private:
  void ReadCodes(uint32_t t, uint16_t* codes) const;
  uint16_t* Ids(uint32_t t) const { return ids_ + size_t{t} * stride_; }
  uint16_t* Bounds(uint32_t t) const { return bounds_ + size_t{t} * ((size_t{1} << k_) + 1); }

  uint32_t first_, tokens_, k_, l_;
  size_t stride_;
  uint16_t* ids_ = nullptr;
  uint16_t* bounds_ = nullptr;
  std::unique_ptr<uint16_t[]> own_;
  size_t own_bytes_ = 0;
  std::shared_ptr<Usage> usage_;
};

}  // namespace passel::host
