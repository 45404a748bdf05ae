#include "group.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace evener {

namespace {

constexpr uint64_t kReleaseBytes = 64 << 10;  // past this, copying alone is worth giving the interpreter lock up

uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

// A slot holds one chunk of this rank's input and its share of the previous chunk's result.
uint64_t slot_stride(int size, uint64_t slot_bytes) {
  return round_up(slot_bytes + slot_bytes / uint64_t(size) + 64, kPage);
}

uint64_t lines_bytes(int size) { return round_up(uint64_t(size) * 128, kPage); }

std::string describe(uint64_t tag) {
  const char* names[] = {"nothing", "all_reduce", "all_gather", "all_to_all"};
  const char* dtypes[] = {" fp32", " bf16", ""};
  return std::string(names[tag >> 62]) + " of " + std::to_string(tag & ((1ull << 58) - 1)) + " bytes" +
         dtypes[std::min<uint64_t>(2, tag >> 58 & 15)];
}

}  // namespace

uint64_t Group::region_bytes(int size, uint64_t slot_bytes) {
  return lines_bytes(size) + 2 * uint64_t(size) * slot_stride(size, slot_bytes);
}

Group::Group(const Segment& segment, uint64_t offset, uint64_t first_bell, int rank, int size, uint64_t slot_bytes,
             uint64_t direct_bytes, int64_t deadline_ns, int64_t spin_ns, Pace* pace)
    : map_(segment.map()),
      waiter_(map_, first_bell + uint64_t(std::max(rank, 0)), deadline_ns, spin_ns),
      pace_(pace),
      first_bell_(first_bell),
      rank_(rank),
      size_(size),
      slot_bytes_(slot_bytes),
      stride_(slot_stride(std::max(size, 1), slot_bytes)),
      direct_bytes_(direct_bytes) {
  static_assert(sizeof(RankLine) == 128);
  if (size < 1 || uint64_t(size) > kMaxRanks || rank < 0 || rank >= size)
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                ": a shared-memory group has 1 to " + std::to_string(kMaxRanks) + " ranks");
  if (slot_bytes < kPage || slot_bytes % kPage)
    throw std::invalid_argument("slot of " + std::to_string(slot_bytes) + " bytes; give a positive multiple of 4096");
  map_->check(offset, region_bytes(size, slot_bytes), first_bell, uint64_t(size));
  base_ = map_->at(offset);
  slots_ = base_ + lines_bytes(size);
  if (line(rank).taken.exchange(1))
    throw std::invalid_argument("rank " + std::to_string(rank) +
                                " of this group is already open; each rank opens it once, and a new epoch has a new segment");
  // Touched first by their owner, the pages lie on its memory node.
  for (uint64_t step : {0, 1}) std::memset(slot(rank, step), 0, stride_);
}

Group::Entry Group::enter(Gil& gil, Op op, int dtype, uint64_t bytes) {
  waiter_.check();
  if (pace_) pace_->pay(gil);
  const int64_t cpu = cpu_ns();
  Entry e{gil, cpu, now_ns(), 0, uint64_t(op) << 62 | uint64_t(dtype) << 58 | bytes, waiter_.sleeps()};
  RankLine& mine = line(rank_);
  mine.entered[op_ & 1].store(e.entered, std::memory_order_relaxed);
  mine.tag[op_ & 1].store(e.tag, std::memory_order_relaxed);
  mine.cpu.store(this_cpu(), std::memory_order_relaxed);
  if (bytes > kReleaseBytes) gil.release();
  return e;
}

void Group::meet(Entry& e) {
  const uint64_t step = ++step_;
  line(rank_).step.store(step, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (int r = 0; r < size_; ++r)
    if (r != rank_) ring(map_->bell(first_bell_ + uint64_t(r)), 1u << rank_);
  waiter_.until(
      e.gil,
      [&] {
        uint32_t missing = 0;
        for (int r = 0; r < size_; ++r)
          if (line(r).step.load(std::memory_order_acquire) < step) missing |= 1u << r;
        return missing;
      },
      [&](uint32_t missing) {
        uint32_t here = 0, cpu = this_cpu();
        for (int r = 0; r < size_; ++r)
          if ((missing >> r & 1) && line(r).cpu.load(std::memory_order_relaxed) == cpu) here |= 1u << r;
        return here;
      });
  if (e.arrived) return;
  for (int r = 0; r < size_; ++r) {  // nobody can enter the operation after next before this rank leaves this one
    e.arrived = std::max(e.arrived, line(r).entered[op_ & 1].load(std::memory_order_relaxed));
    uint64_t tag = line(r).tag[op_ & 1].load(std::memory_order_relaxed);
    if (tag != e.tag)
      throw Mismatch{"rank " + std::to_string(rank_) + " called " + describe(e.tag) + " while rank " +
                     std::to_string(r) + " called " + describe(tag) + " (operation " + std::to_string(op_) + ")"};
  }
}

Stamp Group::leave(Entry& e, int64_t floor_ns) {
  ++op_;
  if (floor_ns > 0) waiter_.sleep_until(e.gil, e.arrived + floor_ns);
  const int64_t cpu = waiter_.cpu_after(e.cpu_entered, e.entered, e.sleeps);
  const int64_t ended = now_ns();
  if (pace_) pace_->skip(e.entered, e.cpu_entered, ended, cpu);
  return {e.entered, e.arrived, ended, e.cpu_entered, cpu};
}

Stamp Group::all_reduce(uintptr_t t, uint64_t count, int dtype, int64_t floor_ns) {
  Gil gil;
  const Dtype d = dtype == 0 ? Dtype::f32 : Dtype::bf16;
  const uint64_t bytes = count * bytes_of(d);
  Entry e = enter(gil, Op::all_reduce, dtype, bytes);
  // Two ranks move as many bytes either way, so they take the way with fewer steps.
  if (size_ == 2 || bytes <= direct_bytes_)
    direct(e, reinterpret_cast<char*>(t), count, d);
  else
    scattered(e, reinterpret_cast<char*>(t), count, d);
  return leave(e, floor_ns);
}

bool Group::sum_for_native(void* group, const Sum& sum) noexcept {
  Group& self = *static_cast<Group*>(group);
  try {
    const Stamp s = self.all_reduce(reinterpret_cast<uintptr_t>(sum.t), sum.count, 0, sum.floor_ns);
    const int64_t stamp[] = {s.entered, s.arrived, s.ended, s.cpu_entered, s.cpu_ended};
    std::copy(std::begin(stamp), std::end(stamp), sum.stamp);
    return true;
  } catch (...) {
    self.failed_ = std::current_exception();
    return false;
  }
}

// Every rank reads every slot and adds all of it: one step per chunk.
void Group::direct(Entry& e, char* t, uint64_t count, Dtype dtype) {
  const uint64_t width = bytes_of(dtype), chunk = slot_bytes_ / width;
  const char* parts[kMaxRanks];
  for (uint64_t at = 0; at == 0 || at < count; at += chunk) {
    const uint64_t n = std::min(chunk, count - at);
    char* mine = t + at * width;
    std::memcpy(slot(rank_, step_ + 1), mine, n * width);
    meet(e);
    for (int r = 0; r < size_; ++r) parts[r] = r == rank_ ? mine : slot(r, step_);
    sum(dtype, mine, parts, size_, n);
  }
}

// Reduce-scatter and all-gather, overlapped: a step carries chunk c's inputs and chunk c - 1's results. Rank r adds
// the r-th share of each chunk.
void Group::scattered(Entry& e, char* t, uint64_t count, Dtype dtype) {
  const uint64_t width = bytes_of(dtype), chunk = slot_bytes_ / width, chunks = (count + chunk - 1) / chunk;
  const char* parts[kMaxRanks];
  struct Share {
    uint64_t begin, count;
  };
  auto length = [&](uint64_t c) { return std::min(chunk, count - c * chunk); };
  auto share = [&](uint64_t c, int r) {
    const uint64_t n = length(c), each = round_up((n + uint64_t(size_) - 1) / uint64_t(size_), 64 / width);
    const uint64_t begin = std::min(n, each * uint64_t(r));
    return Share{begin, std::min(n - begin, each)};
  };
  for (uint64_t c = 0; c <= chunks; ++c) {
    if (c < chunks) {  // all but this rank's own share, which nobody else reads
      const Share own = share(c, rank_);
      const uint64_t after = own.begin + own.count;
      const char* from = t + c * chunk * width;
      char* to = slot(rank_, step_ + 1);
      std::memcpy(to, from, own.begin * width);
      std::memcpy(to + after * width, from + after * width, (length(c) - after) * width);
    }
    meet(e);
    if (c > 0)
      for (int r = 0; r < size_; ++r) {
        if (r == rank_) continue;
        const Share s = share(c - 1, r);
        std::memcpy(t + ((c - 1) * chunk + s.begin) * width, slot(r, step_) + slot_bytes_, s.count * width);
      }
    if (c < chunks) {
      const Share own = share(c, rank_);
      char* mine = t + (c * chunk + own.begin) * width;
      for (int r = 0; r < size_; ++r) parts[r] = r == rank_ ? mine : slot(r, step_) + own.begin * width;
      sum(dtype, mine, parts, size_, own.count);
      std::memcpy(slot(rank_, step_ + 1) + slot_bytes_, mine, own.count * width);
    }
  }
}

Stamp Group::all_gather(uintptr_t t, uintptr_t out, uint64_t bytes, int64_t floor_ns) {
  Gil gil;
  Entry e = enter(gil, Op::all_gather, 2, bytes);
  const char* from = reinterpret_cast<const char*>(t);
  char* to = reinterpret_cast<char*>(out);
  for (uint64_t at = 0; at == 0 || at < bytes; at += slot_bytes_) {
    const uint64_t n = std::min(slot_bytes_, bytes - at);
    std::memcpy(slot(rank_, step_ + 1), from + at, n);
    meet(e);
    for (int r = 0; r < size_; ++r)
      std::memmove(to + uint64_t(r) * bytes + at, r == rank_ ? from + at : slot(r, step_), n);
  }
  return leave(e, floor_ns);
}

Stamp Group::all_to_all(uintptr_t t, uintptr_t out, uint64_t bytes_each, int64_t floor_ns) {
  Gil gil;
  Entry e = enter(gil, Op::all_to_all, 2, bytes_each * uint64_t(size_));
  const char* from = reinterpret_cast<const char*>(t);
  char* to = reinterpret_cast<char*>(out);
  const uint64_t part = slot_bytes_ / uint64_t(size_) / 64 * 64;  // of the slot, for each receiver
  for (uint64_t at = 0; at == 0 || at < bytes_each; at += part) {
    const uint64_t n = std::min(part, bytes_each - at);
    for (int r = 0; r < size_; ++r)
      if (r != rank_) std::memcpy(slot(rank_, step_ + 1) + uint64_t(r) * part, from + uint64_t(r) * bytes_each + at, n);
    meet(e);
    for (int r = 0; r < size_; ++r) {
      const char* piece = r == rank_ ? from + uint64_t(r) * bytes_each + at
                                     : slot(r, step_) + uint64_t(rank_) * part;
      std::memmove(to + uint64_t(r) * bytes_each + at, piece, n);
    }
  }
  return leave(e, floor_ns);
}

}  // namespace evener
