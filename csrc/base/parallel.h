// The injected parallel interface: an op is handed one and splits its work into tasks; it does not know whose threads
// run them. Inside torch they are torch's own (csrc/bindings/torch/parallel.h), elsewhere those of ThreadPool.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace structadmm {

class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int threads() const = 0;

  // Calls task(i) for every i in [0, n) and returns when all are done. Tasks must not throw.
  template <class Task>
  void run(int64_t n, const Task& task) {
    if (n <= 1 || threads() == 1) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    run_tasks(n, &task, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); });
  }

 protected:
  using TaskFn = void (*)(const void* task, int64_t i);
  virtual void run_tasks(int64_t n, const void* task, TaskFn fn) = 0;
};

// One thread: the caller's.
class Serial final : public Parallel {
 public:
  int threads() const override { return 1; }

 protected:
  void run_tasks(int64_t n, const void* task, TaskFn fn) override {
    for (int64_t i = 0; i < n; ++i) fn(task, i);
  }
};

// A pool of threads that take tasks one at a time; the caller works too. One run at a time: a second caller, or a task
// that calls run, does its tasks itself.
class ThreadPool final : public Parallel {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const override;

  // The pool of this process, as many threads as STRUCTADMM_NUM_THREADS or the hardware says until set_threads is
  // called. A child of fork gets a new one, for threads do not survive it.
  static ThreadPool& global();
  static void set_threads(int threads);

 protected:
  void run_tasks(int64_t n, const void* task, TaskFn fn) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace structadmm
