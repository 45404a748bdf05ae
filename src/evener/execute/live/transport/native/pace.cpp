#include "pace.hpp"

#include <sys/prctl.h>
#include <time.h>

#include <cerrno>
#include <cmath>
#include <stdexcept>

namespace evener {

Pace::Pace(double slowdown) : slowdown_(slowdown), cpu_(cpu_ns()) {
  if (!(slowdown >= 1.0) || std::isinf(slowdown)) throw std::invalid_argument("a slow-down is a finite number from 1 up");
  if (slowdown > 1.0) prctl(PR_SET_TIMERSLACK, 1);  // the kernel would add 50 us to every sleep
}

void Pace::pay(Gil& gil) {
  if (slowdown_ <= 1.0) return;
  const int64_t cpu = cpu_ns();
  owed_ += double(cpu - cpu_) * (slowdown_ - 1.0);
  cpu_ = cpu;
  if (owed_ < kSmallest) return;
  const int64_t begin = now_ns(), until = begin + int64_t(owed_);
  const timespec when{time_t(until / 1'000'000'000), long(until % 1'000'000'000)};
  gil.release();
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, nullptr) == EINTR) {
    gil.signals();
    gil.release();
  }
  gil.take();
  cpu_ = cpu_ns();
  const int64_t took = now_ns() - begin;
  owed_ -= double(took);
  slept_ += took;
  spent_ += cpu_ - cpu;
}

}  // namespace evener
