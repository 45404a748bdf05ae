// Collectives among ranks that share memory.
//
// Everything is made of *steps*. In a step every rank writes to its own slot, publishes the step's number, waits until
// all have published it, and reads the others' slots. Slots are doubled and used in turn: a rank that has passed step
// s + 1 knows that all have finished reading step s, so step s + 2 may overwrite it, and one wait per step is enough.
#pragma once

#include <exception>

#include "pace.hpp"
#include "sum.hpp"

namespace evener {

struct Stamp {
  int64_t entered, arrived, ended;  // CLOCK_MONOTONIC, ns
  int64_t cpu_entered, cpu_ended;   // CPU time of the calling thread, ns
};

enum class Op : int { all_reduce = 1, all_gather = 2, all_to_all = 3 };

// Raised when ranks met in different operations: a mistake of the caller.
struct Mismatch {
  std::string what;
};

class Group {
 public:
  // Region of the segment: `size` rank lines, then two slots for each rank. The same arguments, but for `rank`, on
  // every rank. pace (or nullptr): paid before each operation; outlives the group.
  Group(const Segment& segment, uint64_t offset, uint64_t first_bell, int rank, int size, uint64_t slot_bytes,
        uint64_t direct_bytes, int64_t deadline_ns, int64_t spin_ns, Pace* pace);
  static uint64_t region_bytes(int size, uint64_t slot_bytes);

  // Raw tensors: addresses and byte or element counts. floor_ns: the operation ends no earlier than this long after
  // the last rank entered (a declared link). All throw Aborted, Late, Mismatch.
  Stamp all_reduce(uintptr_t t, uint64_t count, int dtype, int64_t floor_ns);
  Stamp all_gather(uintptr_t t, uintptr_t out, uint64_t bytes, int64_t floor_ns);
  Stamp all_to_all(uintptr_t t, uintptr_t out, uint64_t bytes_each, int64_t floor_ns);
  uint64_t operations() const { return op_; }

  // For native code that runs several operations between two of Python's: fp32 all_reduce of `count` numbers at `t` by
  // the Group at `group`. False if it threw; `rethrow` then throws it in Python's sight. The caller holds the
  // interpreter lock.
  struct Sum {
    float* t;
    uint64_t count;
    int64_t floor_ns;
    int64_t* stamp;  // the five numbers of a Stamp, filled in
  };
  static bool sum_for_native(void* group, const Sum& sum) noexcept;
  void rethrow() {
    if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
  }

 private:
  struct alignas(128) RankLine {
    std::atomic<uint64_t> step;                 // last published
    std::atomic<uint64_t> tag[2];               // by parity of the operation: which, and how many bytes
    std::atomic<int64_t> entered[2];            // by parity of the operation
    std::atomic<uint32_t> cpu;                  // where the rank entered its last operation
    std::atomic<uint32_t> taken;                // 1 once a rank has opened this line
  };

  struct Entry {  // one operation in progress on this rank
    Gil& gil;
    int64_t cpu_entered, entered, arrived;
    uint64_t tag, sleeps;
  };

  RankLine& line(int rank) const { return reinterpret_cast<RankLine*>(base_)[rank]; }
  char* slot(int rank, uint64_t step) const {
    return slots_ + (uint64_t(rank) * 2 + (step & 1)) * stride_;
  }
  Entry enter(Gil& gil, Op op, int dtype, uint64_t bytes);
  void meet(Entry& e);  // publish the next step and wait for all
  Stamp leave(Entry& e, int64_t floor_ns);
  void direct(Entry& e, char* t, uint64_t count, Dtype dtype);
  void scattered(Entry& e, char* t, uint64_t count, Dtype dtype);

  std::shared_ptr<Mapping> map_;
  Waiter waiter_;
  Pace* pace_;
  char *base_, *slots_;
  uint64_t first_bell_;
  int rank_, size_;
  uint64_t slot_bytes_, stride_, direct_bytes_;
  uint64_t step_ = 0, op_ = 0;
  std::exception_ptr failed_;
};

}  // namespace evener
