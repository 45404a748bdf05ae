// Waiting for peers without taking a core that one of them needs.
//
// A rank first spins for some microseconds, then sleeps on its bell. Before it sleeps it writes there which peers it
// waits for; each peer that arrives clears its own bit, and the one that clears the last bit wakes the sleeper. So a
// sleeper wakes once per wait, whatever the number of peers, and an arriving rank makes a system call only for that.
#pragma once

#include <Python.h>
#include <sched.h>

#include <algorithm>

#include "segment.hpp"

namespace evener {

// Gives the interpreter lock up at the first sleep, not before: taking it back can cost milliseconds when another
// thread computes in Python, and most waits end while spinning.
class Gil {
 public:
  Gil() = default;
  Gil(const Gil&) = delete;
  ~Gil() { take(); }
  void release() {
    if (!saved_) saved_ = PyEval_SaveThread();
  }
  void take() {
    if (saved_) PyEval_RestoreThread(std::exchange(saved_, nullptr));
  }
  void signals();  // runs Python's signal handlers; throws what they raise

 private:
  PyThreadState* saved_ = nullptr;
};

inline uint32_t this_cpu() {
  int c = sched_getcpu();
  return c < 0 ? 0 : uint32_t(c);
}

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Sleeps until `word` is no longer `value`, a wake, or the timeout. False: a signal came.
bool futex_wait(std::atomic<uint32_t>& word, uint32_t value, int64_t timeout_ns);
void futex_wake(std::atomic<uint32_t>& word);

// Peer `bit` has published (release) what `bell`'s owner may be asleep for. Call after a seq_cst fence.
inline void ring(Bell& bell, uint32_t bit) {
  if ((bell.awaited.load(std::memory_order_relaxed) & bit) == 0) return;
  if (bell.awaited.fetch_and(~bit) == bit) futex_wake(bell.awaited);
}

class Waiter {
  static constexpr int64_t kQuick = 200'000;

 public:
  // spin_ns: longest spin. Waits that a longest spin would have covered lengthen the next one, others shorten it.
  Waiter(std::shared_ptr<Mapping> map, uint64_t bell, int64_t deadline_ns, int64_t spin_ns)
      : map_(std::move(map)), bell_(map_->bell(bell)), deadline_ns_(deadline_ns), max_spin_(spin_ns), spin_(spin_ns) {}

  void check() const {
    if (map_->aborted()) throw map_->why();
  }

  // The thread's CPU time at the end of an operation. That clock is a system call; a rank that has not slept and was
  // quick has used what passed, and if it did lose its core, the next reading shows it.
  int64_t cpu_after(int64_t cpu_entered, int64_t entered, uint64_t sleeps_before) const {
    const int64_t took = now_ns() - entered;
    return sleeps_ == sleeps_before && took < kQuick ? cpu_entered + took : cpu_ns();
  }
  uint64_t sleeps() const { return sleeps_; }

  // Returns when missing() is 0. `missing` gives the peers not yet there, one bit each; `here` those of them that
  // were last seen on this CPU: they cannot arrive while this rank spins. Throws Aborted, Late.
  template <class Missing, class Here>
  void until(Gil& gil, Missing missing, Here here) {
    uint32_t m = missing();
    if (m == 0) return;
    const int64_t start = now_ns();
    if (spin_ > 0 && here(m) == 0) {
      for (int64_t end = start + spin_; now_ns() < end;) {
        for (int i = 0; i < 4; ++i) {
          if (missing() == 0) return learn(start);
          pause_cpu();
        }
        check();
      }
    }
    for (;;) {
      m = missing();
      if (m == 0) break;
      bell_.awaited.store(m);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      if (missing() != m) continue;  // somebody arrived meanwhile and may not have seen the bell
      stop_if_aborted();
      const int64_t left = start + deadline_ns_ - now_ns();
      if (left <= 0) {
        bell_.awaited.store(0);
        throw Late{m};
      }
      sleep(gil, m, left);
    }
    bell_.awaited.store(0, std::memory_order_relaxed);
    learn(start);
  }

  // Sleeps until `when` (CLOCK_MONOTONIC). Throws Aborted.
  void sleep_until(Gil& gil, int64_t when) {
    for (int64_t left; (left = when - now_ns()) > 0;) {
      bell_.awaited.store(kNobody);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      stop_if_aborted();
      sleep(gil, kNobody, left);
    }
    bell_.awaited.store(0, std::memory_order_relaxed);
  }

 private:
  void learn(int64_t start) {
    const bool short_wait = now_ns() - start <= max_spin_;
    spin_ = short_wait ? std::min(max_spin_, spin_ * 2) : std::max(max_spin_ / 16, spin_ / 2);
  }
  void stop_if_aborted() {
    if (!map_->aborted()) return;
    bell_.awaited.store(0);
    throw map_->why();
  }
  void sleep(Gil& gil, uint32_t value, int64_t timeout_ns) {
    ++sleeps_;
    gil.release();
    if (!futex_wait(bell_.awaited, value, timeout_ns)) gil.signals();
  }

  std::shared_ptr<Mapping> map_;
  Bell& bell_;
  int64_t deadline_ns_, max_spin_, spin_;
  uint64_t sleeps_ = 0;
};

}  // namespace evener
