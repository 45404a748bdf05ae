#include "pipe.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace evener {

namespace {

constexpr uint64_t kLine = 64;
constexpr uint64_t kReleaseBytes = 64 << 10;
constexpr uint64_t kPiece = 256 << 10;  // long messages are published in pieces, so both ends copy at once
constexpr uint32_t kPeer = 1;

uint64_t padded(uint64_t n) { return (n + kLine - 1) / kLine * kLine; }

}  // namespace

uint64_t Pipe::region_bytes(uint64_t capacity) { return kPage + (capacity + kPage - 1) / kPage * kPage; }

Pipe::Pipe(const Segment& segment, uint64_t offset, uint64_t first_bell, bool sender, uint64_t capacity,
           int64_t deadline_ns, int64_t spin_ns, int64_t delay_ns, double ns_per_byte,
           Pace* pace)
    : map_(segment.map()),
      waiter_(map_, first_bell + (sender ? 0 : 1), deadline_ns, spin_ns),
      pace_(pace),
      peers_bell_(map_->bell(first_bell + (sender ? 1 : 0))),
      sender_(sender),
      capacity_(capacity),
      piece_(std::min(kPiece, capacity / 4 / kLine * kLine)),
      delay_ns_(delay_ns),
      ns_per_byte_(ns_per_byte) {
  static_assert(sizeof(Message) <= kLine && 2 * sizeof(End) <= kPage);
  if (capacity < kPage || capacity % kLine)
    throw std::invalid_argument("pipe of " + std::to_string(capacity) +
                                " bytes; give a multiple of 64, 4096 at least");
  map_->check(offset, region_bytes(capacity), first_bell, 2);
  ends_ = reinterpret_cast<End*>(map_->at(offset));
  ring_ = map_->at(offset + kPage);
}

int64_t Pipe::enter() {
  waiter_.check();
  const int64_t now = now_ns();
  mine().entered.store(now, std::memory_order_relaxed);
  mine().cpu.store(this_cpu(), std::memory_order_relaxed);
  return now;
}

void Pipe::publish(uint64_t bytes) {
  mine().bytes.store(bytes, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  ring(peers_bell_, kPeer);
}

uint64_t Pipe::room() const {
  const uint64_t here = mine().bytes.load(std::memory_order_relaxed);
  const uint64_t there = peer().bytes.load(std::memory_order_acquire);
  return sender_ ? capacity_ - (here - there) : there - here;
}

void Pipe::wait_for(Gil& gil, uint64_t bytes) {
  waiter_.until(
      gil, [&] { return room() < bytes ? kPeer : 0; },
      [&](uint32_t) { return peer().cpu.load(std::memory_order_relaxed) == this_cpu() ? kPeer : 0; });
}

void Pipe::copy_in(uint64_t at, const char* from, uint64_t n) {
  const uint64_t begin = at % capacity_, first = std::min(n, capacity_ - begin);
  std::memcpy(ring_ + begin, from, first);
  std::memcpy(ring_, from + first, n - first);
}

void Pipe::copy_out(uint64_t at, char* to, uint64_t n) {
  const uint64_t begin = at % capacity_, first = std::min(n, capacity_ - begin);
  std::memcpy(to, ring_ + begin, first);
  std::memcpy(to + first, ring_, n - first);
}

Stamp Pipe::send(uintptr_t t, uint64_t bytes) {
  Gil gil;
  if (pace_) pace_->pay(gil);
  if (bytes > kReleaseBytes) gil.release();
  const int64_t cpu_entered = cpu_ns(), entered = enter();
  int64_t arrived = entered, due = entered;
  if (ns_per_byte_ > 0 || delay_ns_ > 0) {
    busy_until_ = std::max(busy_until_, entered) + int64_t(double(bytes) * ns_per_byte_);
    due = busy_until_ + delay_ns_;
  }
  const char* from = reinterpret_cast<const char*>(t);
  uint64_t at = mine().bytes.load(std::memory_order_relaxed);
  for (uint64_t done = 0, header = kLine; header || done < bytes; header = 0) {
    const uint64_t n = std::min(bytes - done, piece_), need = header + padded(n);
    if (room() < need) {
      wait_for(gil, need);
      arrived = std::max(arrived, peer().entered.load(std::memory_order_relaxed));
    }
    if (header) message(at) = Message{bytes, entered, due};
    copy_in(at + header, from + done, n);
    done += n;
    publish(at += need);
  }
  const int64_t cpu = cpu_ns(), ended = now_ns();
  if (pace_) pace_->skip(entered, cpu_entered, ended, cpu);
  return {entered, std::min(arrived, ended), ended, cpu_entered, cpu};
}

Stamp Pipe::recv(uintptr_t out, uint64_t bytes) {
  Gil gil;
  if (bytes > kReleaseBytes) gil.release();
  const int64_t cpu_entered = cpu_ns(), entered = enter();
  wait_for(gil, kLine);
  uint64_t at = mine().bytes.load(std::memory_order_relaxed);
  const Message m = message(at);
  if (m.bytes != bytes)
    throw Mismatch{"the next message has " + std::to_string(m.bytes) + " bytes, the tensor to fill has " +
                   std::to_string(bytes)};
  char* to = reinterpret_cast<char*>(out);
  at += kLine;
  if (bytes == 0) publish(at);
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t head = peer().bytes.load(std::memory_order_acquire);
    if (head == at) {
      // The header is read but not yet given back, or the ring was emptied: what is missing follows it.
      publish(at);
      wait_for(gil, kLine);
      continue;
    }
    const uint64_t n = std::min(bytes - done, head - at);
    copy_out(at, to + done, n);
    done += n;
    publish(at += padded(n));
  }
  if (m.due > now_ns()) waiter_.sleep_until(gil, m.due);
  const int64_t cpu = cpu_ns(), ended = now_ns();
  if (pace_) pace_->skip(entered, cpu_entered, ended, cpu);
  return {entered, std::max(entered, m.entered), ended, cpu_entered, cpu};
}

bool Pipe::poll() {
  waiter_.check();
  return room() >= kLine && message(mine().bytes.load(std::memory_order_relaxed)).due <= now_ns();
}

}  // namespace evener
