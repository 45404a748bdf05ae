// A small pool for the calling worker's own cores. Tasks are claimed in order by whoever is free, so the results of
// kernels must not depend on who runs what (and do not).
#pragma once
#include <cstdint>
#include <type_traits>

namespace evener {

// n - 1 helpers beside the caller; 1 <= n <= 256. Helpers of the former size are joined.
void set_threads(int n);
int threads();  // within a task: 1

// Runs fn(context, 0) .. fn(context, tasks - 1) and returns when all are done. From a second thread at the same
// time, or within a task: runs them all on that thread.
void parallel_for(int64_t tasks, void (*fn)(void*, int64_t), void* context);

template <typename F>
void parallel_for(int64_t tasks, F&& body) {
  using Body = std::remove_reference_t<F>;
  auto call = [](void* f, int64_t i) { (*static_cast<Body*>(f))(i); };
  parallel_for(tasks, call, const_cast<std::remove_const_t<Body>*>(&body));
}

}  // namespace evener
