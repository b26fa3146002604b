// Runs the blocks of a launch: fibers, barriers, rendezvous, and reports of threads that do not meet.
#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_USES_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

__thread const Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP = 32;
constexpr size_t MESSAGE_SIZE = 2048;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_SIZE = 256 * 1024;
#else
constexpr size_t STACK_SIZE = 64 * 1024;
#endif

// ---- stacks, and the switch between them

struct Stack {
  unsigned char* base = nullptr;
  size_t size = 0;
  bool fresh = true;
  void* fake_stack = nullptr;
#ifdef CUDA_ON_CPU_USES_UCONTEXT
  ucontext_t context;
#else
  void* context = nullptr;
#endif
};

#ifndef CUDA_ON_CPU_USES_UCONTEXT
// Saves the callee-saved registers of the System V ABI. A jump, because a `ret` would always be mispredicted.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
    .text
    .type cuda_on_cpu_switch, @function
    .hidden cuda_on_cpu_switch
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

void switch_context(Stack& from, Stack& to) {
#ifdef CUDA_ON_CPU_USES_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  cuda_on_cpu_switch(&from.context, to.context);
#endif
}

void switch_stack(Stack& from, Stack& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.base, to.size);
#endif
  switch_context(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void prepare(Stack& stack, unsigned number, void (*entry)()) {
  if (!stack.base) {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) {
      perror("cuda_on_cpu: no memory for the stack of a fiber");
      abort();
    }
    stack.base = static_cast<unsigned char*>(memory) + guard;
    stack.size = STACK_SIZE;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack.base, stack.size);
#endif
  stack.fresh = false;
#ifdef CUDA_ON_CPU_USES_UCONTEXT
  (void)number;
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.base;
  stack.context.uc_stack.ss_size = stack.size;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
#else
  // Different offsets within a page: otherwise all stacks would compete for the same few cache sets.
  void** top = reinterpret_cast<void**>(stack.base + stack.size - 128 * (number % WARP)) - 2;
  top[0] = nullptr;
  top[1] = nullptr;
  void** frame = top - 8;
  frame[6] = reinterpret_cast<void*>(entry);
  frame[7] = nullptr;  // the return address of `entry`: the end of every backtrace
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  stack.context = frame;
#endif
}

// ---- the work of an OS thread in a launch

enum class Schedule { forward, reverse, random };

enum class State : unsigned char { runnable, barrier, collective, done };

struct Copy {
  void* shared;
  const void* global;
  unsigned bytes, valid, group;
  Site site;
};

struct Deferred {
  void (*run)(const void*);
  alignas(16) unsigned char closure[DEFERRED_BYTES];
};

struct Fiber : Thread {
  State state;
  unsigned mask;
  unsigned copy_group;
  Stack* stack;
  const void* in;
  void* out;
  Site site;
  std::vector<Copy> copies;
  std::vector<Deferred> deferred;
};

struct Launch {
  Body body;
  const void* params;
  LaunchConfig config;
  std::vector<unsigned> order;
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  char message[MESSAGE_SIZE] = "";
};

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)) &&
         (a.name == b.name || !strcmp(a.name, b.name));
}

/** Lanes of a warp that wait for one another. */
struct Group {
  unsigned mask, arrived;
  Site site;
};

struct Warp {
  unsigned exists, done, groups;
  Group group[WARP];
};

struct Random {
  uint64_t state;

  uint32_t operator()() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>((static_cast<uint64_t>((*this)()) * n) >> 32); }
};

/** The dynamic shared memory of a block. A checked pattern follows it; under ASan, the allocation ends there. */
class Arena {
 public:
  ~Arena() { free(memory_); }

  void resize(unsigned bytes) {
    if (memory_ && bytes == bytes_) return;
    free(memory_);
    bytes_ = bytes;
#ifdef __SANITIZE_ADDRESS__
    memory_ = static_cast<unsigned char*>(malloc(bytes));
    data_ = memory_;
#else
    // Aligned to 16 bytes and no more, which is all that CUDA guarantees.
    memory_ = static_cast<unsigned char*>(aligned_alloc(256, (16 + bytes + TAIL + 255) / 256 * 256));
    data_ = memory_ + 16;
#endif
    if (!memory_) abort();
  }
  unsigned char* fill() {
    memset(data_, 0xff, bytes_);
#ifndef __SANITIZE_ADDRESS__
    memset(data_ + bytes_, CANARY, TAIL);
#endif
    return data_;
  }
  /** The offset of the first byte written after the end, or -1. */
  long overrun() const {
#ifndef __SANITIZE_ADDRESS__
    for (unsigned i = 0; i < TAIL; ++i)
      if (data_[bytes_ + i] != CANARY) return static_cast<long>(bytes_) + i;
#endif
    return -1;
  }

 private:
  static constexpr unsigned TAIL = 1024;
  static constexpr unsigned char CANARY = 0xa5;
  unsigned bytes_ = 0;
  unsigned char* memory_ = nullptr;
  unsigned char* data_ = nullptr;
};

class Worker {
 public:
  void run(Launch& launch);

  [[noreturn]] void fail(const char* format, va_list arguments);
  void barrier(const Site& site);
  void rendezvous(unsigned mask, const void* in, void* out, Combine combine, const void* closure, const Site& site);
  void interleave();
  void copy_async(const Copy& copy);
  void copy_async_commit() { ++self().copy_group; }
  void copy_async_wait(unsigned pending);
  void defer(const Deferred& deferred) { self().deferred.push_back(deferred); }
  void run_deferred();
  void live();

 private:
  Fiber& self() { return const_cast<Fiber&>(static_cast<const Fiber&>(*current)); }
  bool run_block(unsigned index);
  void finish();
  Fiber& fiber_of_lane(const Fiber& fiber, unsigned lanes);
  int pick();
  void give_way();
  void resume(Fiber& fiber, Stack& from);
  Stack* take_stack();
  void abandon_stacks();
  void set_runnable(Fiber& fiber);
  void clear_runnable(Fiber& fiber);
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  [[noreturn]] void deadlock();
  [[noreturn]] void fail_missing(const Fiber& waiter, const Fiber& gone);

  Launch* launch_ = nullptr;
  Block block_{};
  Schedule schedule_ = Schedule::forward;
  std::thread::id owner_;
  unsigned threads_ = 0, done_ = 0, waiting_ = 0;
  const Fiber* first_waiting_ = nullptr;
  bool failed_ = false;
  Random random_{};
  uint64_t runnable_[MAX_THREADS / 64] = {};
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Stack*> idle_;
  Stack main_;
  Arena arena_;
  char message_[MESSAGE_SIZE];
};

__thread Worker* worker = nullptr;

void fiber_entry() { worker->live(); }

const char* describe(const Index3& i, char (&text)[48]) {
  snprintf(text, sizeof text, "(%u, %u, %u)", i.x, i.y, i.z);
  return text;
}

void Worker::set_runnable(Fiber& fiber) {
  fiber.state = State::runnable;
  runnable_[fiber.linear / 64] |= uint64_t{1} << (fiber.linear % 64);
}

void Worker::clear_runnable(Fiber& fiber) { runnable_[fiber.linear / 64] &= ~(uint64_t{1} << (fiber.linear % 64)); }

/** Returns the thread that runs next, or -1 if all wait or are done. */
int Worker::pick() {
  const unsigned words = (threads_ + 63) / 64;
  if (schedule_ == Schedule::reverse) {
    for (unsigned w = words; w-- > 0;)
      if (runnable_[w]) return static_cast<int>(64 * w + 63 - __builtin_clzll(runnable_[w]));
    return -1;
  }
  unsigned first = 0;
  if (schedule_ == Schedule::random) {
    const unsigned start = random_.below(threads_);
    first = start / 64;
    const uint64_t rest = runnable_[first] & (~uint64_t{0} << (start % 64));
    if (rest) return static_cast<int>(64 * first + __builtin_ctzll(rest));
    first = (first + 1) % words;
  }
  for (unsigned i = 0; i < words; ++i) {
    const unsigned w = first + i < words ? first + i : first + i - words;
    if (runnable_[w]) return static_cast<int>(64 * w + __builtin_ctzll(runnable_[w]));
  }
  return -1;
}

Stack* Worker::take_stack() {
  if (idle_.empty()) {
    stacks_.push_back(std::make_unique<Stack>());
    idle_.push_back(stacks_.back().get());
  }
  Stack* stack = idle_.back();
  idle_.pop_back();
  if (stack->fresh) prepare(*stack, static_cast<unsigned>(stacks_.size()), fiber_entry);
  return stack;
}

void Worker::resume(Fiber& fiber, Stack& from) {
  if (!fiber.stack) fiber.stack = take_stack();
  current = &fiber;
  switch_stack(from, *fiber.stack);
}

/** Lets the next thread run. Returns when this one is chosen again. */
void Worker::give_way() {
  const int next = pick();
  if (next < 0) deadlock();
  Fiber& fiber = fibers_[next];
  if (&fiber != current) resume(fiber, *self().stack);
}

/** The main loop of a stack: runs one thread after another as long as blocks come. */
void Worker::live() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main_.base) {
    main_.base = static_cast<unsigned char*>(const_cast<void*>(bottom));
    main_.size = size;
  }
#endif
  for (;;) {
    launch_->body(launch_->params);
    finish();
    Stack& stack = *self().stack;
    const int next = pick();
    if (next >= 0 && !fibers_[next].stack) {
      fibers_[next].stack = &stack;
      current = &fibers_[next];
      continue;
    }
    if (next < 0 && done_ < threads_) deadlock();
    idle_.push_back(&stack);
    if (next < 0)
      switch_stack(stack, main_);
    else
      resume(fibers_[next], stack);
  }
}

void Worker::finish() {
  Fiber& fiber = self();
  if (!fiber.copies.empty()) {
    const Site& site = fiber.copies.front().site;
    fail("leaves the kernel without waiting for its %s at %s:%d", site.name, site.file, site.line);
  }
  if (!fiber.deferred.empty()) fail("leaves the kernel without waiting for its deferred work");
  fiber.state = State::done;
  clear_runnable(fiber);
  ++done_;
  if (waiting_) fail_missing(*first_waiting_, fiber);
  Warp& warp = warps_[fiber.linear / WARP];
  warp.done |= 1u << fiber.lane;
  for (unsigned i = 0; i < warp.groups; ++i) {
    const Group& group = warp.group[i];
    if (group.mask & warp.done) fail_missing(fiber_of_lane(fiber, group.arrived), fiber);
  }
}

/** Returns the first of `lanes` in the warp of `fiber`. */
Fiber& Worker::fiber_of_lane(const Fiber& fiber, unsigned lanes) {
  return fibers_[fiber.linear - fiber.lane + static_cast<unsigned>(__builtin_ctz(lanes))];
}

void Worker::fail_missing(const Fiber& waiter, const Fiber& gone) {
  char a[48], b[48];
  fail("divergent %s: thread %s waits at %s:%d for thread %s, which has left the kernel", waiter.site.name,
       describe(waiter.index, a), waiter.site.file, waiter.site.line, describe(gone.index, b));
}

void Worker::barrier(const Site& site) {
  Fiber& fiber = self();
  fiber.site = site;
  fiber.state = State::barrier;
  if (done_) {
    for (const Fiber& other : fibers_)
      if (other.state == State::done) fail_missing(fiber, other);
  }
  if (!waiting_) first_waiting_ = &fiber;
  const Fiber& other = *first_waiting_;
  if (!same(other.site, site)) {
    char a[48], b[48];
    fail("divergent %s: thread %s waits at %s:%d, thread %s in %s at %s:%d", site.name, describe(fiber.index, a),
         site.file, site.line, describe(other.index, b), other.site.name, other.site.file, other.site.line);
  }
  if (++waiting_ < threads_) {
    clear_runnable(fiber);
  } else {
    for (Fiber& released : fibers_) set_runnable(released);
    waiting_ = 0;
  }
  give_way();
}

void Worker::rendezvous(unsigned mask, const void* in, void* out, Combine combine, const void* closure,
                        const Site& site) {
  Fiber& fiber = self();
  fiber.site = site;
  fiber.mask = mask;
  fiber.in = in;
  fiber.out = out;
  fiber.state = State::collective;
  if (!(mask >> fiber.lane & 1))
    fail("divergent %s at %s:%d: lane %u is not in its own mask 0x%08x", site.name, site.file, site.line, fiber.lane,
         mask);
  Warp& warp = warps_[fiber.linear / WARP];
  if (mask & ~warp.exists)
    fail("divergent %s at %s:%d: mask 0x%08x names lanes that the block does not have (this warp has 0x%08x)",
         site.name, site.file, site.line, mask, warp.exists);
  if (mask & warp.done) fail_missing(fiber, fiber_of_lane(fiber, mask & warp.done));
  Group* group = nullptr;
  for (unsigned i = 0; i < warp.groups; ++i) {
    Group& waiting = warp.group[i];
    if (waiting.mask == mask && same(waiting.site, site)) {
      group = &waiting;
    } else if ((waiting.mask >> fiber.lane & 1) && (waiting.arrived & mask)) {
      char a[48], b[48];
      const Fiber& other = fiber_of_lane(fiber, waiting.arrived & mask);
      fail(
          "divergent collective: thread %s waits in %s at %s:%d with mask 0x%08x, thread %s in %s at %s:%d with mask "
          "0x%08x",
          describe(fiber.index, a), site.name, site.file, site.line, mask, describe(other.index, b), other.site.name,
          other.site.file, other.site.line, other.mask);
    }
  }
  if (!group) {
    group = &warp.group[warp.groups++];
    *group = {mask, 0, site};
  }
  group->arrived |= 1u << fiber.lane;
  if (group->arrived != mask) {
    clear_runnable(fiber);
  } else {
    *group = warp.group[--warp.groups];
    const void* ins[WARP] = {};
    void* outs[WARP] = {};
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Fiber& other = fiber_of_lane(fiber, rest);
      ins[other.lane] = other.in;
      outs[other.lane] = other.out;
      set_runnable(other);
    }
    combine(closure, ins, outs, mask);
  }
  give_way();
}

void Worker::interleave() {
  if (random_.below(4) == 0) give_way();
}

void Worker::copy_async(const Copy& copy) {
  Fiber& fiber = self();
  fiber.copies.push_back(copy);
  fiber.copies.back().group = fiber.copy_group;
}

void Worker::copy_async_wait(unsigned pending) {
  Fiber& fiber = self();
  size_t kept = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group + pending < fiber.copy_group) {
      unsigned char* to = static_cast<unsigned char*>(copy.shared);
      memcpy(to, copy.global, copy.valid);
      memset(to + copy.valid, 0, copy.bytes - copy.valid);
    } else {
      fiber.copies[kept++] = copy;
    }
  }
  fiber.copies.erase(fiber.copies.begin() + static_cast<std::ptrdiff_t>(kept), fiber.copies.end());
}

void Worker::run_deferred() {
  Fiber& fiber = self();
  for (const Deferred& deferred : fiber.deferred) deferred.run(deferred.closure);
  fiber.deferred.clear();
}

void Worker::deadlock() {
  char text[MESSAGE_SIZE / 2] = "";
  size_t used = 0;
  std::vector<bool> told(threads_);
  for (unsigned i = 0; i < threads_ && used < sizeof text; ++i) {
    const Fiber& fiber = fibers_[i];
    if (told[i] || fiber.state == State::done) continue;
    unsigned count = 0;
    for (unsigned j = i; j < threads_; ++j) {
      const Fiber& other = fibers_[j];
      if (other.state != fiber.state || !same(other.site, fiber.site)) continue;
      if (fiber.state == State::collective && other.mask != fiber.mask) continue;
      told[j] = true;
      ++count;
    }
    char name[48], mask[32] = "";
    if (fiber.state == State::collective) snprintf(mask, sizeof mask, " with mask 0x%08x", fiber.mask);
    used += static_cast<size_t>(snprintf(text + used, sizeof text - used, "%s%u from %s in %s at %s:%d%s",
                                         used ? "; " : "", count, describe(fiber.index, name), fiber.site.name,
                                         fiber.site.file, fiber.site.line, mask));
  }
  fail("deadlock: no thread can go on; waiting: %s", text);
}

void Worker::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fail(format, arguments);
}

void Worker::fail(const char* format, va_list arguments) {
  char b[48], t[48];
  const int used = snprintf(message_, sizeof message_, "block %s, thread %s: ", describe(block_.index, b),
                            describe(current->index, t));
  vsnprintf(message_ + used, sizeof message_ - static_cast<size_t>(used), format, arguments);
  failed_ = true;
  Stack abandoned;
  switch_stack(abandoned, main_);
  __builtin_unreachable();
}

bool Worker::run_block(unsigned index) {
  block_.index = {index, 0, 0};
  block_.shared = arena_.fill();
  random_.state = launch_->config.seed * 0x2545f4914f6cdd1du + index;
  done_ = waiting_ = 0;
  for (Warp& warp : warps_) warp.done = warp.groups = 0;
  failed_ = false;
  for (Fiber& fiber : fibers_) {
    fiber.stack = nullptr;
    fiber.copy_group = 0;
    set_runnable(fiber);
  }
  Fiber& first = fibers_[static_cast<size_t>(pick())];
  resume(first, main_);
  current = nullptr;
  if (!failed_) {
    const long overrun = arena_.overrun();
    if (overrun < 0) return true;
    snprintf(message_, sizeof message_, "block (%u, 0, 0): shared memory written at byte %ld of %u", index, overrun,
             block_.shared_bytes);
  }
  for (Fiber& fiber : fibers_) {
    fiber.copies.clear();
    fiber.deferred.clear();
  }
  abandon_stacks();
  return false;
}

void Worker::abandon_stacks() {
  idle_.clear();
  for (const auto& stack : stacks_) {
    stack->fresh = true;
    idle_.push_back(stack.get());
  }
}

void Worker::run(Launch& launch) {
  launch_ = &launch;
  worker = this;
  if (owner_ != std::this_thread::get_id()) {
    // Start new stacks: the compiler may have kept the address of a thread-local variable on the old ones.
    owner_ = std::this_thread::get_id();
    main_ = Stack();
    abandon_stacks();
  }
  schedule_ = static_cast<Schedule>(launch.config.schedule);
  block_.size = {launch.config.block_x, launch.config.block_y, 1};
  block_.grid = {launch.config.grid, 1, 1};
  block_.shared_bytes = launch.config.shared_bytes;
  block_.interleaves = schedule_ == Schedule::random;
  arena_.resize(block_.shared_bytes);
  threads_ = block_.size.x * block_.size.y;
  fibers_.resize(threads_);
  warps_.resize((threads_ + WARP - 1) / WARP);
  for (Warp& warp : warps_) warp.exists = ~0u;
  if (threads_ % WARP) warps_.back().exists = (1u << threads_ % WARP) - 1;
  memset(runnable_, 0, sizeof runnable_);
  for (unsigned i = 0; i < threads_; ++i) {
    fibers_[i].index = {i % block_.size.x, i / block_.size.x, 0};
    fibers_[i].linear = i;
    fibers_[i].lane = i % WARP;
    fibers_[i].block = &block_;
  }
  while (!launch.failed) {
    const unsigned turn = launch.next++;
    if (turn >= launch.config.grid) break;
    unsigned index = turn;
    if (schedule_ == Schedule::reverse) index = launch.config.grid - 1 - turn;
    if (schedule_ == Schedule::random) index = launch.order[turn];
    if (!run_block(index)) {
      const std::lock_guard<std::mutex> lock(launch.mutex);
      if (!launch.failed.exchange(true)) memcpy(launch.message, message_, sizeof message_);
    }
  }
  worker = nullptr;
}

/** Keeps workers between launches, so that their stacks are mapped once. */
class Pool {
 public:
  std::unique_ptr<Worker> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> taken = std::move(idle_.back());
    idle_.pop_back();
    return taken;
  }
  void give_back(std::unique_ptr<Worker> returned) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(returned));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

Pool& pool() {
  static Pool* const kept = new Pool;  // never destroyed: another thread may still run a launch at exit
  return *kept;
}

void work(Launch& launch) {
  std::unique_ptr<Worker> mine = pool().take();
  mine->run(launch);
  pool().give_back(std::move(mine));
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  worker->fail(format, arguments);
}

void barrier(Site site) { worker->barrier(site); }

void rendezvous(unsigned mask, const void* in, void* out, Combine combine, const void* closure, Site site) {
  worker->rendezvous(mask, in, out, combine, closure, site);
}

void interleave() { worker->interleave(); }

void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid, Site site) {
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % bytes)
    fail("misaligned %s at %s:%d: addresses must be multiples of %u bytes", site.name, site.file, site.line, bytes);
  worker->copy_async({shared, global, bytes, valid, 0, site});
}

void copy_async_commit() { worker->copy_async_commit(); }

void copy_async_wait(unsigned pending) { worker->copy_async_wait(pending); }

void defer(void (*run)(const void*), const void* closure, unsigned bytes) {
  if (bytes > DEFERRED_BYTES) fail("defer: a closure of %u bytes, at most %u", bytes, DEFERRED_BYTES);
  Deferred deferred = {run, {}};
  memcpy(deferred.closure, closure, bytes);
  worker->defer(deferred);
}

void run_deferred() { worker->run_deferred(); }

const char* launch(Body body, const void* params, const LaunchConfig& config) {
  static thread_local std::string report;  // a library that is loaded late has little thread-local storage
  Launch launch;
  launch.body = body;
  launch.params = params;
  launch.config = config;
  if (config.schedule == static_cast<int>(Schedule::random)) {
    Random random{config.seed};
    launch.order.resize(config.grid);
    for (unsigned i = 0; i < config.grid; ++i) {
      const unsigned j = random.below(i + 1);
      launch.order[i] = launch.order[j];
      launch.order[j] = i;
    }
  }
  const unsigned os_threads = config.os_threads < config.grid ? config.os_threads : config.grid;
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < os_threads; ++i) helpers.emplace_back([&launch] { work(launch); });
  work(launch);
  for (std::thread& helper : helpers) helper.join();
  if (!launch.failed) return nullptr;
  report = launch.message;
  return report.c_str();
}

}  // namespace cuda_on_cpu
