// A declared slow-down: a rank behaves as slower hardware on any machine.
//
// The time that a slower device would need on top of the thread's CPU time is owed, accumulates, and is passed before
// the next operation that others can see. A rank that has its core to itself keeps it meanwhile, as the device that it
// stands for would: after a sleep, caches are cold, the core slow, and what follows takes up to a quarter longer, which
// the slow-down then multiplies. A rank that shares its core sleeps; and where it had to wait for the core, that time
// is taken as paid: the device would have had its own. (A device of several threads waits for its own helpers as well,
// so there it is not.)
#pragma once

#include "wait.hpp"

namespace evener {

class Pace {
  static constexpr int64_t kShortest = 1'000, kShortestSleep = 30'000;  // what is less stays owed: it would be late

 public:
  // slowdown: 1 and more. threads: of the device. sleeps: others need its core. Belongs to the thread that makes it,
  // whose timers it makes exact.
  Pace(double slowdown, int threads, bool sleeps);

  void pay(Gil& gil);  // let pass what is owed since the last call
  // An operation is not the device's own work: it owes nothing for it, but for the way into it.
  void skip(int64_t entered, int64_t cpu_entered, int64_t ended, int64_t cpu_ended) {
    owe(entered, cpu_entered);
    idled(ended, cpu_ended);
  }
  // Nor is what passed while it had nothing to do.
  void idled(int64_t now, int64_t cpu) { wall_ = now, cpu_ = cpu; }

  double owed() const { return owed_; }     // ns; negative after a sleep that was late
  int64_t slept() const { return slept_; }  // ns let pass so far, with waits for the core that count as paid
  int64_t waited() const { return waited_; }  // of that, the waits, and what took too long
  int64_t spent() const { return spent_; }  // CPU time of letting it pass: not the device's work

 private:
  void owe(int64_t now, int64_t cpu);

  double slowdown_, owed_ = 0;
  bool single_, sleeps_;
  int64_t wall_, cpu_, slept_ = 0, waited_ = 0, spent_ = 0;
};

}  // namespace evener
