#include "wait.hpp"

#include <linux/futex.h>
#include <nanobind/nanobind.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>

namespace evener {

bool futex_wait(std::atomic<uint32_t>& word, uint32_t value, int64_t timeout_ns) {
  timespec t{time_t(timeout_ns / 1'000'000'000), long(timeout_ns % 1'000'000'000)};
  return syscall(SYS_futex, &word, FUTEX_WAIT, value, &t, nullptr, 0) == 0 || errno != EINTR;
}

void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void Gil::signals() {
  take();
  if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
}

}  // namespace evener
