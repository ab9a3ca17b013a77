#include "base/parallel.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"

namespace structadmm {
namespace {

// How long a thread looks before it sleeps: to be woken costs as much as a small layer, and the next layer follows
// within microseconds. Some tens of microseconds in all.
constexpr int kLooks = 1000;

void pause() {
#if SADMM_X86
  __builtin_ia32_pause();
#endif
}

template <class Condition>
bool look(const Condition& condition) {
  for (int i = 0; i < kLooks; ++i) {
    if (condition()) return true;
    pause();
  }
  return condition();
}

}  // namespace

struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::mutex busy;  // held by the caller whose tasks the workers do
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<uint64_t> round{0};
  std::atomic<int> working{0};
  std::atomic<bool> stop{false};
  int asleep = 0;  // guarded by mutex
  int64_t n = 0;
  const void* task = nullptr;
  TaskFn fn = nullptr;
  // Each thread has a share of neighbouring tasks, the same in every round, so that what it wrote in one layer lies in
  // its own cache in the next; who is done helps the others.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::unique_ptr<Share[]> shares;
  int64_t threads = 1;

  void share_out() {
    for (int64_t t = 0; t < threads; ++t) {
      shares[t].next.store(t * n / threads);
      shares[t].end = (t + 1) * n / threads;
    }
  }

  void drain(int64_t me) {
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares[(me + t) % threads];
      for (int64_t i = share.next.fetch_add(1); i < share.end; i = share.next.fetch_add(1)) fn(task, i);
    }
  }

  void work(int64_t me) {
    uint64_t seen = 0;
    const auto called = [&] { return stop || round != seen; };
    for (;;) {
      if (!look(called)) {
        std::unique_lock lock(mutex);
        ++asleep;
        wake.wait(lock, called);
        --asleep;
      }
      if (stop) return;
      seen = round;
      drain(me);
      if (--working == 0) {
        const std::lock_guard lock(mutex);
        done.notify_one();
      }
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  SADMM_CHECK(threads >= 1 && threads <= 1024, "ThreadPool: threads got ", threads, ", wanted 1 to 1024");
  state_->threads = threads;
  state_->shares = std::make_unique<State::Share[]>(static_cast<size_t>(threads));
  for (int i = 1; i < threads; ++i) state_->workers.emplace_back([s = state_.get(), i] { s->work(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (auto& worker : state_->workers) worker.join();
}

int ThreadPool::threads() const {
  return static_cast<int>(state_->workers.size()) + 1;
}

void ThreadPool::run_tasks(int64_t n, const void* task, TaskFn fn) {
  std::unique_lock busy(state_->busy, std::try_to_lock);
  if (!busy) {
    for (int64_t i = 0; i < n; ++i) fn(task, i);
    return;
  }
  bool sleepers = false;
  {
    const std::lock_guard lock(state_->mutex);
    state_->n = n;
    state_->task = task;
    state_->fn = fn;
    state_->share_out();
    state_->working = static_cast<int>(state_->workers.size());
    ++state_->round;
    sleepers = state_->asleep > 0;
  }
  if (sleepers) state_->wake.notify_all();
  state_->drain(0);
  const auto finished = [&] { return state_->working == 0; };
  if (look(finished)) return;
  std::unique_lock lock(state_->mutex);
  state_->done.wait(lock, finished);
}

namespace {

std::mutex global_mutex;
// Never deleted: a pool destroyed at exit would join threads that the loader may already have taken down.
ThreadPool* global_pool = nullptr;
pid_t global_pid = 0;

int default_threads() {
  if (const char* text = std::getenv("STRUCTADMM_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    SADMM_CHECK(*end == '\0' && n >= 1 && n <= 1024, "STRUCTADMM_NUM_THREADS: got '", text, "', wanted 1 to 1024");
    return static_cast<int>(n);
  }
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

}  // namespace

ThreadPool& ThreadPool::global() {
  std::lock_guard lock(global_mutex);
  if (!global_pool || global_pid != getpid()) {
    global_pool = new ThreadPool(global_pool ? global_pool->threads() : default_threads());
    global_pid = getpid();
  }
  return *global_pool;
}

void ThreadPool::set_threads(int threads) {
  auto fresh = std::make_unique<ThreadPool>(threads);
  std::lock_guard lock(global_mutex);
  // The old pool is left idle, not deleted: another thread may be inside it.
  global_pool = fresh.release();
  global_pid = getpid();
}

}  // namespace structadmm
