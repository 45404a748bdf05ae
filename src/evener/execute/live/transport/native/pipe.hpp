// A one-way ring of messages. A message is a 64-byte header and its payload, padded to 64 bytes; `head` and `tail`
// count bytes ever written and read. A message longer than the ring streams through it in pieces.
#pragma once

#include <optional>

#include "group.hpp"

namespace evener {

class Pipe {
 public:
  // Region: two control lines and the ring. bells: first_bell for the sender, first_bell + 1 for the receiver.
  // due = entered + serialisation (bytes over bandwidth, one message after the other) + delay.
  // pace (or nullptr): paid before each send; outlives the pipe.
  Pipe(const Segment& segment, uint64_t offset, uint64_t first_bell, bool sender, uint64_t capacity,
       int64_t deadline_ns, int64_t spin_ns, int64_t delay_ns, double ns_per_byte,
       Pace* pace);
  static uint64_t region_bytes(uint64_t capacity);

  Stamp send(uintptr_t t, uint64_t bytes);   // throws Aborted, Late
  Stamp recv(uintptr_t out, uint64_t bytes);  // throws Aborted, Late, Mismatch (the message stays)
  bool poll();                                // a message is due here; throws Aborted

 private:
  struct alignas(128) End {
    std::atomic<uint64_t> bytes;   // head or tail
    std::atomic<int64_t> entered;  // this end's last entry
    std::atomic<uint32_t> cpu;
  };
  struct Message {
    uint64_t bytes;
    int64_t entered, due;
  };

  End& mine() const { return ends_[sender_ ? 0 : 1]; }
  End& peer() const { return ends_[sender_ ? 1 : 0]; }
  Message& message(uint64_t at) const { return *reinterpret_cast<Message*>(ring_ + at % capacity_); }
  int64_t enter();
  void publish(uint64_t bytes);
  uint64_t room() const;  // bytes free (sender) or ready (receiver)
  void wait_for(Gil& gil, uint64_t bytes);
  void copy_in(uint64_t at, const char* from, uint64_t n);
  void copy_out(uint64_t at, char* to, uint64_t n);

  std::shared_ptr<Mapping> map_;
  Waiter waiter_;
  Pace* pace_;
  Bell& peers_bell_;
  End* ends_;
  char* ring_;
  bool sender_;
  uint64_t capacity_, piece_;
  int64_t delay_ns_, busy_until_ = 0;
  double ns_per_byte_;
};

}  // namespace evener
