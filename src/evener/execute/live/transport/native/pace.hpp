// A declared slow-down: a rank behaves as slower hardware on any machine.
//
// The time that a slower device would need on top of the thread's CPU time is owed, accumulates, and is slept before
// the next operation that others can see. Sleeping burns no core that another rank needs; and where the thread had to
// wait for its core meanwhile, that time is taken as paid: the device it stands for would have had its own.
#pragma once

#include "wait.hpp"

namespace evener {

class Pace {
  static constexpr int64_t kSmallest = 30'000;  // a shorter sleep is late by about as much as it lasts; it stays owed

 public:
  // slowdown: 1 and more. Belongs to the thread that makes it, whose timers it makes exact.
  explicit Pace(double slowdown);

  void pay(Gil& gil);  // sleep what is owed since the last call
  // An operation is not the device's own work: it owes nothing for it, but for the way into it.
  void skip(int64_t entered, int64_t cpu_entered, int64_t ended, int64_t cpu_ended) {
    owe(entered, cpu_entered);
    idled(ended, cpu_ended);
  }
  // Nor is what passed while it had nothing to do.
  void idled(int64_t now, int64_t cpu) { wall_ = now, cpu_ = cpu; }

  double slowdown() const { return slowdown_; }
  double owed() const { return owed_; }     // ns; negative after a sleep that was late
  int64_t slept() const { return slept_; }  // ns, so far, with waits for the core that count as paid
  int64_t spent() const { return spent_; }  // CPU time of that: not the device's work

 private:
  void owe(int64_t now, int64_t cpu);

  double slowdown_, owed_ = 0;
  int64_t wall_, cpu_, slept_ = 0, spent_ = 0;
};

}  // namespace evener
