// The machine behind cuda_on_cpu.h.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "cuda_on_cpu.h"
#include "memory.h"

namespace emulated {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr int kGuard = 64;  // bytes on both sides of shared memory
constexpr unsigned char kGuardByte = 0xa5;

std::vector<Range> ranges, vectors;

enum State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t entry;
  jmp_buf here;
  bool begun = false;
  State state = kDone;
  int shuffles = 0;  // counted, to take turns between two places of exchange
};

struct Slot {
  alignas(8) unsigned char value[8];
  int distance;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots[2];
  std::vector<int> at_shuffle;  // threads of each warp that wait there
  int at_barrier = 0, running = -1;
  const std::function<void()>* body = nullptr;
  jmp_buf scheduler;
  std::string error;
  std::vector<uint64_t> shared;
  int shared_bytes = 0;
};

Machine machine;

void stop_running() {
  Fiber& self = machine.fibers[machine.running];
  if (!_setjmp(self.here)) _longjmp(machine.scheduler, 1);
}

void fiber_main() {
  for (;;) {
    try {
      (*machine.body)();
    } catch (const std::exception& error) {
      if (machine.error.empty())
        machine.error = "block " + std::to_string(block.x) + ", thread " + std::to_string(thread.x) +
                        ": " + error.what();
    }
    machine.fibers[machine.running].state = kDone;
    stop_running();
  }
}

void resume(int i) {
  Fiber& fiber = machine.fibers[i];
  machine.running = i;
  thread.x = static_cast<unsigned>(i);
  if (_setjmp(machine.scheduler)) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

// The order in which fibers get their turn, by the seed: 0 ascending, 1 descending, others shuffled. An
// even seed is fair: each fiber runs once in a round. An odd one is not: a warp runs as far as it gets,
// and the first warps of the order always go before the others, which shows what leans on the slow being
// quick.
class Turns {
 public:
  Turns(int threads, uint64_t seed, std::mt19937_64& random) : seed_(seed), random_(random) {
    for (int i = 0; i < threads; ++i) lanes_.push_back(seed == 1 ? threads - 1 - i : i);
    if (seed % 2 == 0) return;
    std::vector<int> warps;
    for (int i = 0; i < threads / kWarp; ++i) warps.push_back(i);
    if (seed > 1) std::shuffle(warps.begin(), warps.end(), random);
    std::vector<int> before = lanes_;
    for (int i = 0; i < threads; ++i) lanes_[i] = before[warps[i / kWarp] * kWarp + i % kWarp];
  }

  // Lets fibers run until none is ready; calls run(i) for each turn. False where none was ready.
  template <class Run>
  bool round(Run run) {
    const int group = seed_ % 2 ? kWarp : static_cast<int>(lanes_.size());
    bool any = false;
    for (size_t first = 0; first < lanes_.size();) {
      if (seed_ > 1) std::shuffle(lanes_.begin() + first, lanes_.begin() + first + group, random_);
      bool moved = false;
      for (size_t i = first; i < first + group; ++i) {
        if (machine.fibers[lanes_[i]].state != kReady) continue;
        moved = any = true;
        run(lanes_[i]);
        if (!machine.error.empty()) return true;
      }
      first = moved && seed_ % 2 ? 0 : first + group;
    }
    return any;
  }

 private:
  uint64_t seed_;
  std::mt19937_64& random_;
  std::vector<int> lanes_;
};

void run_block(int threads, std::mt19937_64& random) {
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
  for (auto& slots : machine.slots) slots.assign(threads, {});
  machine.at_shuffle.assign(threads / kWarp, 0);
  machine.at_barrier = 0;
  for (Fiber& fiber : machine.fibers) {
    fiber.state = kReady;
    fiber.shuffles = 0;
  }
  Turns turns(threads, seed, random);
  for (int left = threads; left > 0 && machine.error.empty();) {
    const bool moved = turns.round([&](int i) {
      resume(i);
      left -= machine.fibers[i].state == kDone;
    });
    if (!moved)
      machine.error = "block " + std::to_string(block.x) +
                      ": threads wait at a barrier or a shuffle that others never reach";
  }
  if (!machine.error.empty())
    for (Fiber& fiber : machine.fibers) fiber.begun = false;  // their stacks begin anew
}

}  // namespace

void allow(uintptr_t begin, size_t bytes, bool writes) {
  ranges.push_back({begin, begin + bytes, writes});
}
void count_as_vector(uintptr_t begin, size_t bytes) { vectors.push_back({begin, begin + bytes, false}); }
void forget() {
  ranges.clear();
  vectors.clear();
}

void check_access(const void* address, size_t bytes, size_t alignment, bool writes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (!launches.empty()) {
    launches.back().bytes += static_cast<int64_t>(bytes);
    bool vector = false;
    for (const Range& range : vectors) vector |= begin >= range.begin && begin < range.end;
    (vector ? launches.back().vectors : launches.back().wide) += vector || bytes == 16 ? bytes : 0;
  }
  const auto what = [&] {
    return std::string(writes ? "a write of " : "a read of ") + std::to_string(bytes) + " bytes ";
  };
  if (begin % alignment) throw std::logic_error(what() + "at a misaligned address");
  for (const Range& range : ranges)
    if (begin >= range.begin && begin + bytes <= range.end && (range.writes || !writes)) return;
  throw std::logic_error(what() + "outside the tensors of the call");
}

unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(machine.shared.data()) + kGuard;
}

void barrier() {
  Fiber& self = machine.fibers[machine.running];
  int threads = static_cast<int>(machine.slots[0].size());
  if (++machine.at_barrier < threads) {
    self.state = kAtBarrier;
    stop_running();
    return;
  }
  machine.at_barrier = 0;
  for (int i = 0; i < threads; ++i)
    if (machine.fibers[i].state == kAtBarrier) machine.fibers[i].state = kReady;
}

void exchange(void* value, size_t bytes, int distance) {
  const int me = machine.running, first = me / kWarp * kWarp;
  Fiber& self = machine.fibers[me];
  auto& slots = machine.slots[self.shuffles++ % 2];
  if (bytes > sizeof slots[me].value) throw std::logic_error("a shuffle of more than 8 bytes");
  std::memcpy(slots[me].value, value, bytes);
  slots[me].distance = distance;
  if (++machine.at_shuffle[first / kWarp] < kWarp) {
    self.state = kAtShuffle;
    stop_running();
  } else {
    machine.at_shuffle[first / kWarp] = 0;
    for (int i = first; i < first + kWarp; ++i)
      if (machine.fibers[i].state == kAtShuffle) machine.fibers[i].state = kReady;
  }
  const Slot& other = slots[first + (me - first ^ distance)];
  if (other.distance != distance) throw std::logic_error("lanes of a warp met in different shuffles");
  std::memcpy(value, other.value, bytes);
}

const char* run(const std::function<void()>& body, int64_t blocks, int threads, int shared) {
  if (threads % kWarp || threads > 1024) return "a block must be of whole warps, 1024 threads at most";
  std::mt19937_64 random(seed);
  machine.body = &body;
  launches.push_back({shared, 0, 0, 0});
  machine.error.clear();
  grid.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks && machine.error.empty(); ++i) {
    const size_t bytes = (static_cast<size_t>(shared) + 7) / 8 * 8;
    machine.shared.assign((bytes + 2 * kGuard) / 8, ~uint64_t{0});  // NaN in every type
    auto* begin = reinterpret_cast<unsigned char*>(machine.shared.data());
    std::memset(begin, kGuardByte, kGuard);
    std::memset(begin + kGuard + shared, kGuardByte, machine.shared.size() * 8 - kGuard - shared);
    block.x = static_cast<unsigned>(i);
    run_block(threads, random);
    const auto touched = [](unsigned char byte) { return byte != kGuardByte; };
    if (machine.error.empty() &&
        (std::any_of(begin, begin + kGuard, touched) ||
         std::any_of(begin + kGuard + shared, begin + machine.shared.size() * 8, touched)))
      machine.error = "something was written outside shared memory";
  }
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

}  // namespace emulated
