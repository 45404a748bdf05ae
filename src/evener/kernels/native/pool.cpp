#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace evener {
namespace {

constexpr auto SPIN = std::chrono::microseconds(20);
constexpr uint64_t CLOSED = 0xffffffffu;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// True once `ready()` holds, false if it does not within SPIN.
template <typename Ready>
bool spin(Ready ready) {
  auto until = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  return ready();
}

thread_local bool in_task = false;  // what a task would divide further it computes alone

class Pool {
 public:
  explicit Pool(int helpers) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { help(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }

  int size() const { return int(threads_.size()) + 1; }

  bool run(int64_t tasks, void (*fn)(void*, int64_t), void* context) {
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy) return false;
    // While the ticket is closed nobody can claim, so the job may be rewritten: a helper that read the old ticket
    // fails to exchange it.
    uint64_t epoch = (ticket_.load() >> 32) + 1;
    ticket_.store(epoch << 32 | CLOSED);
    fn_.store(fn);
    context_.store(context);
    tasks_.store(tasks);
    pending_.store(tasks);
    ticket_.store(epoch << 32);
    if (sleepers_.load() > 0) {
      { std::lock_guard lock(mutex_); }  // a helper between its last look and its sleep holds this
      wake_.notify_all();
    }
    work(epoch);
    auto finished = [this] { return pending_.load() == 0; };
    if (!spin(finished)) {
      std::unique_lock lock(mutex_);
      waiting_ = true;
      done_.wait(lock, finished);
      waiting_ = false;
    }
    std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return true;
  }

 private:
  bool open(uint64_t ticket) const { return (ticket & CLOSED) < uint64_t(tasks_.load()); }

  void work(uint64_t epoch) {
    uint64_t ticket = ticket_.load();
    while (ticket >> 32 == (epoch & 0xffffffffu) && open(ticket)) {
      auto fn = fn_.load();
      auto context = context_.load();
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      in_task = true;
      try {
        fn(context, int64_t(ticket & CLOSED));
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      in_task = false;
      if (pending_.fetch_sub(1) == 1 && waiting_.load()) {
        { std::lock_guard lock(mutex_); }
        done_.notify_one();
      }
      ticket = ticket_.load();
    }
  }

  void help() {
    auto ready = [this] { return stop_.load() || open(ticket_.load()); };
    for (;;) {
      if (!spin(ready)) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, ready);
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      work(ticket_.load() >> 32);
    }
  }

  // All accesses are sequentially consistent: a job has few, and the argument above stays short.
  std::atomic<uint64_t> ticket_{0};  // job number << 32 | next task
  std::atomic<void (*)(void*, int64_t)> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0}, pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false}, waiting_{false};
  std::exception_ptr error_;  // the first of this job, under mutex_
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
};

std::unique_ptr<Pool> pool;  // null: one thread

}  // namespace

void set_threads(int n) {
  if (n == (pool ? pool->size() : 1)) return;
  pool.reset();
  if (n > 1) pool = std::make_unique<Pool>(n - 1);
}

int threads() { return pool && !in_task ? pool->size() : 1; }

void parallel_for(int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  if (pool && !in_task && tasks > 1 && tasks < int64_t(CLOSED) && pool->run(tasks, fn, context)) return;
  for (int64_t i = 0; i < tasks; ++i) fn(context, i);
}

}  // namespace evener
