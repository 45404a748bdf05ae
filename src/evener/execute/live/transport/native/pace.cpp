#include "pace.hpp"

#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <stdexcept>

namespace evener {

Pace::Pace(double slowdown, int threads, bool sleeps)
    : slowdown_(slowdown), single_(threads <= 1), sleeps_(sleeps), wall_(now_ns()), cpu_(cpu_ns()) {
  if (!(slowdown >= 1.0) || std::isinf(slowdown)) throw std::invalid_argument("a slow-down is a finite number from 1 up");
  if (slowdown > 1.0) prctl(PR_SET_TIMERSLACK, 1);  // the kernel would add 50 us to every sleep
}

void Pace::owe(int64_t now, int64_t cpu) {
  const int64_t used = cpu - cpu_, off = single_ ? std::max<int64_t>(0, now - wall_ - used) : 0;
  owed_ += double(used) * (slowdown_ - 1.0);
  const int64_t paid = std::min(off, int64_t(std::max(0.0, owed_)));
  owed_ -= double(paid);
  slept_ += paid;
  waited_ += paid;
}

void Pace::pay(Gil& gil) {
  if (slowdown_ <= 1.0) return;
  const int64_t cpu = cpu_ns(), begin = now_ns();
  owe(begin, cpu);
  idled(begin, cpu);
  if (owed_ < (sleeps_ ? kShortestSleep : kShortest)) return;
  const int64_t until = begin + int64_t(owed_);
  const timespec when{time_t(until / 1'000'000'000), long(until % 1'000'000'000)};
  gil.release();
  while (!sleeps_ && now_ns() < until)
    for (int i = 0; i < 16; ++i) pause_cpu();
  while (sleeps_ && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, nullptr) == EINTR) {
    gil.signals();
    gil.release();
  }
  gil.take();
  idled(now_ns(), cpu_ns());
  owed_ -= double(wall_ - begin);
  slept_ += wall_ - begin;
  waited_ += std::max<int64_t>(0, wall_ - until);
  spent_ += cpu_ - cpu;
}

}  // namespace evener
