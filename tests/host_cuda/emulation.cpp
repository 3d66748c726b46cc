// The emulated device: fibers, their schedule, shared memory, copies; and what tests set and ask.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"
#include "emulation_wgmma.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- switching between stacks

#if defined(__x86_64__)
// Saves what a function must preserve, and the stack pointer in *from; goes on where `to` was left.
extern "C" void gemma2_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type gemma2_switch_stack, @function
gemma2_switch_stack:
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
  ret
  .size gemma2_switch_stack, . - gemma2_switch_stack
)");
struct Context {
  void* stack_pointer = nullptr;
};
static void switch_context(Context& from, Context& to) {
  gemma2_switch_stack(&from.stack_pointer, to.stack_pointer);
}
static void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // As after a call: a multiple of 16, less the return address.
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + bytes) - 1;
  *--top = reinterpret_cast<uint64_t>(entry);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
}
#else
#include <ucontext.h>
struct Context {
  ucontext_t context;
};
static void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
static void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  makecontext(&context.context, entry, 0);
}
#endif

namespace gemma2 {
namespace cuda {
namespace emulation {
namespace {

constexpr int kMaxThreads = 1024, kMaxCluster = 8;
constexpr const char* kAtCluster = "a cluster's barrier";
constexpr const char* kAtPhase = "an mbarrier";
constexpr size_t kStackBytes = 128 << 10;
constexpr int64_t kGuardBytes = 4096;

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
  void land() const {
    if (valid) {
      memcpy(shared, global, bytes);
    } else {
      memset(shared, 0, bytes);
    }
    note_write(shared, bytes);
  }
};

struct Fiber {
  Context context;
  bool done = false;
  const char* waits = nullptr;  // for what; null: can run
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<int64_t> written;           // chunks since its last fence for other instructions
  std::vector<const uint64_t*> barriers;  // initialized since the last fence for bulk copies
};

struct Warp {
  const char* function;  // that `arrived` lanes have reached
  void* lanes[kWarpSize];
  int arrived = 0;
  bool fenced[kWarpSize] = {};  // the lane's registers, since its last wait for products
  std::vector<Product> open;    // since the last commit
  std::vector<std::vector<Product>> groups;
};

// Of an mbarrier.
struct Phases {
  int expected, arrived = 0, complete = 0;
  int64_t bytes = 0;    // of bulk copies, that are still to come
  bool fenced = false;  // bulk copies see that it is initialized
};

struct BoxCopy {
  unsigned char* shared;
  CUtensorMap map;
  int at[5];
  uint64_t* barrier;
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  std::vector<int> waiting;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint3 index{};
  const char* place = nullptr;  // of the __syncthreads that threads wait at
  int at_place = 0;
  int alive = 0;
  std::map<int, Barrier> named;
  std::map<const uint64_t*, Phases> phases;
  std::vector<BoxCopy> boxes;  // on their way
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  // Who wrote each 16 bytes, 1 + thread, where wgmma and bulk copies may not have seen it; else 0.
  std::vector<int> unseen;
  std::string error;
};

std::vector<Block> cluster;  // blocks that run side by side; mostly one
Block* block = nullptr;      // of them, whose thread runs
Barrier cluster_barrier;
Context scheduler;
int current = 0;
const std::function<void()>* body;
std::mt19937 random_bits;
std::map<std::pair<const char*, int>, std::string> places;
std::vector<std::pair<uintptr_t, uintptr_t>> allowed;

char* stack_of(int64_t thread) {  // of a cluster
  static char* stacks = static_cast<char*>(
      mmap(nullptr, kMaxCluster * kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + thread * kStackBytes;
}

Fiber& self() { return block->fibers[current]; }

void pause(const char* what) {
  self().waits = what;
  switch_context(self().context, scheduler);
}

void release_block() {
  if (block->at_place == 0 || block->at_place < block->alive) return;
  for (Fiber& fiber : block->fibers) {
    if (fiber.waits == block->place) fiber.waits = nullptr;
  }
  block->at_place = 0;
}

void release_cluster() {
  int alive = 0;
  for (const Block& b : cluster) alive += b.alive;
  if (cluster_barrier.arrived == 0 || cluster_barrier.arrived < alive) return;
  for (Block& b : cluster) {
    for (Fiber& fiber : b.fibers) {
      if (fiber.waits == kAtCluster) fiber.waits = nullptr;
    }
  }
  cluster_barrier = Barrier{};
}

void check_guards() {
  const unsigned char* memory = block->shared - kGuardBytes;
  const int64_t bytes = block->shared_bytes + 2 * kGuardBytes;
  for (int64_t i = 0; i < bytes && block->error.empty(); ++i) {
    if ((i < kGuardBytes || i >= bytes - kGuardBytes) && memory[i] != 0xff) {
      block->error = "shared memory was written at byte " + std::to_string(i - kGuardBytes) +
                     " of " + std::to_string(block->shared_bytes);
    }
  }
}

// ---- mbarriers and bulk copies

Phases& phases_of(uint64_t* barrier) {
  const auto found = block->phases.find(barrier);
  if (found == block->phases.end()) fail("an mbarrier that is not initialized");
  return found->second;
}

void settle(Phases& phases) {
  if (phases.arrived > phases.expected) fail("more arrivals than an mbarrier expects");
  if (phases.arrived < phases.expected || phases.bytes) return;
  ++phases.complete;
  phases.arrived = 0;
  for (Fiber& fiber : block->fibers) {
    if (fiber.waits == kAtPhase) fiber.waits = nullptr;  // to see whether it is theirs
  }
}

// That no thread has written there without a fence behind it.
void check_seen(int64_t at, const char* what) {
  if (block->unseen[at / 16] == 0) return;
  fail(std::string(what) + " what thread " + std::to_string(block->unseen[at / 16] - 1) +
       " wrote, without a fence");
}

int64_t rows_of(const CUtensorMap& map) {
  int64_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  return rows;
}

// A box's rows of 128 bytes lie behind each other, their chunks of 16 bytes permuted.
void land(const BoxCopy& copy) {
  const CUtensorMap& map = copy.map;
  for (int64_t row = 0; row < rows_of(map); ++row) {
    const unsigned char* from = map.data;
    bool inside = true;
    int64_t left = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t at = copy.at[i] + left % map.box[i];
      left /= map.box[i];
      inside = inside && at >= 0 && at < map.sizes[i];
      from += at * map.strides[i];
    }
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint16_t values[8] = {};
      const int64_t x = copy.at[0] + 8 * chunk;
      for (int i = 0; i < 8 && inside; ++i) {
        if (x + i < 0 || x + i >= map.sizes[0]) continue;
        check_access(from + 2 * (x + i), 2);
        memcpy(&values[i], from + 2 * (x + i), 2);
      }
      int64_t to = copy.shared - block->shared + 128 * row + 16 * chunk;
      to ^= (to >> 7 & 7) << 4;
      check_seen(to, "a bulk copy writes over");
      memcpy(block->shared + to, values, 16);
    }
  }
  Phases& phases = phases_of(copy.barrier);
  phases.bytes -= 128 * rows_of(map);
  settle(phases);
}

// Lets one of the copies land that are on their way. Returns false where there is none.
bool land_one() {
  auto& boxes = block->boxes;
  if (boxes.empty()) return false;
  size_t i = settings().schedule % 2 ? boxes.size() - 1 : 0;
  if (settings().schedule >= 6) i = random_bits() % boxes.size();
  const BoxCopy copy = boxes[i];
  boxes.erase(boxes.begin() + i);
  land(copy);
  return true;
}

// ---- products of Hopper's

void compute_all(std::vector<Product>& products) {
  for (const Product& product : products) product.compute(product);
  products.clear();
}

Warp& own_warp() { return block->warps[current / kWarpSize]; }

bool has_products(const Warp& warp) {
  return !warp.open.empty() || std::any_of(warp.groups.begin(), warp.groups.end(),
                                           [](const auto& group) { return !group.empty(); });
}

void run_thread() {
  try {
    (*body)();
    if (has_products(own_warp())) fail("a warp ends before its products");
    if (block->alive == 1 && !block->boxes.empty()) fail("a block ends before its bulk copies");
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  self().done = true;
  --block->alive;
  release_block();
  release_cluster();
  // Who reads it from now on finds NaN.
  if (block->alive == 0 && cluster.size() > 1 && block->error.empty()) {
    check_guards();
    memset(block->shared, 0xff, block->shared_bytes);
  }
  switch_context(self().context, scheduler);
}

bool lands_at_once();

void step(int thread) {
  Fiber& fiber = block->fibers[thread];
  if (fiber.done || fiber.waits || !block->error.empty()) return;
  current = thread;
  threadIdx = {unsigned(thread), 0, 0};
  switch_context(scheduler, fiber.context);
}

bool can_run(int begin, int end) {
  return std::any_of(block->fibers.begin() + begin, block->fibers.begin() + end,
                     [](const Fiber& f) { return !f.done && !f.waits; });
}

// 0, 1: all threads in step, upwards and downwards. 2, 3 and 4, 5: one warp at a time as far as it
// comes, upwards and downwards. From 6: random warps, and lanes in random order. Copies land late
// in 0, 2, 5, at once in 1, 3, 4, at random later.
bool lands_at_once() {
  const int schedule = settings().schedule;
  if (schedule >= 6) return random_bits() & 1;
  return schedule == 1 || schedule == 3 || schedule == 4;
}

void run_block() {
  const int threads = int(block->fibers.size()), warps = threads / kWarpSize;
  const int schedule = settings().schedule;
  while (block->error.empty()) {
    const bool ready = can_run(0, threads);
    if ((!ready || (schedule >= 6 && random_bits() % 4 == 0)) && !land_one() && !ready) break;
    if (schedule < 2) {
      for (int i = 0; i < threads; ++i) step(schedule ? threads - 1 - i : i);
      continue;
    }
    for (int i = 0; i < warps; ++i) {
      int warp = schedule == 2 || schedule == 4 ? i : warps - 1 - i;
      int lanes[kWarpSize];
      for (int l = 0; l < kWarpSize; ++l) lanes[l] = schedule % 2 ? kWarpSize - 1 - l : l;
      if (schedule >= 6) {
        warp = int(random_bits() % unsigned(warps));
        std::shuffle(lanes, lanes + kWarpSize, random_bits);
      }
      const int first = warp * kWarpSize;
      do {
        for (int lane : lanes) step(first + lane);
      } while (schedule < 6 && block->error.empty() && can_run(first, first + kWarpSize));
    }
  }
}

// Zeros aside, of which some kernels start more than they need.
bool has_copies(const Fiber& fiber) {
  const auto some = [](const std::vector<Copy>& copies) {
    return std::any_of(copies.begin(), copies.end(), [](const Copy& copy) { return copy.valid; });
  };
  return some(fiber.open) || std::any_of(fiber.groups.begin(), fiber.groups.end(), some);
}

void run_cluster() {
  std::vector<int> order(cluster.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  if (settings().schedule % 2) std::reverse(order.begin(), order.end());
  const auto enter = [](int i) {
    block = &cluster[i];
    blockIdx = block->index;
  };
  const auto can_go_on = [](const Block& b) {
    return std::any_of(b.fibers.begin(), b.fibers.end(),
                       [](const Fiber& f) { return !f.done && !f.waits; });
  };
  while (std::any_of(cluster.begin(), cluster.end(), can_go_on)) {
    if (settings().schedule >= 6) std::shuffle(order.begin(), order.end(), random_bits);
    for (int i : order) {
      enter(i);
      run_block();
      if (!block->error.empty()) throw std::runtime_error(block->error);
    }
  }
  for (int i : order) {
    enter(i);
    for (size_t thread = 0; thread < block->fibers.size(); ++thread) {
      if (block->fibers[thread].done) {
        // It may land in what the block has written since.
        if (has_copies(block->fibers[thread]))
          throw std::runtime_error("thread " + std::to_string(thread) +
                                   " ends while a copy of its is on its way");
        continue;
      }
      throw std::runtime_error("deadlock: thread " + std::to_string(thread) + " waits at " +
                               block->fibers[thread].waits + ", which others will not reach");
    }
    if (cluster.size() == 1) check_guards();
    if (!block->error.empty()) throw std::runtime_error(block->error);
  }
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

void fail(const std::string& message) {
  throw std::runtime_error(message + " (block " + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                           ", thread " + std::to_string(threadIdx.x) + ")");
}

void launch(const char* op, int blocks_of_cluster, dim3 grid, int threads, int64_t shared_bytes,
            const std::function<void()>& kernel) {
  const auto refuse = [&](const std::string& message) {
    throw std::runtime_error(std::string(op) + ": " + message);
  };
  if (threads < 1 || threads > kMaxThreads || threads % kWarpSize)
    refuse("a block of " + std::to_string(threads) + " threads");
  if (grid.x < 1 || grid.x > unsigned(settings().max_blocks) || grid.y < 1 || grid.y > 65535 ||
      grid.z < 1 || grid.z > 65535)
    refuse("a grid of " + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
           std::to_string(grid.z) + " blocks");
  if (shared_bytes > settings().shared_bytes)
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(settings().shared_bytes));
  random_bits.seed(settings().schedule);
  body = &kernel;
  blockDim = dim3(threads);
  gridDim = grid;
  if (blocks_of_cluster < 1 || blocks_of_cluster > kMaxCluster || grid.x % blocks_of_cluster)
    refuse("clusters of " + std::to_string(blocks_of_cluster) + " blocks");
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z, clusters = blocks / blocks_of_cluster;
  for (int64_t c = 0; c < clusters; ++c) {
    const int64_t at = settings().schedule % 2 ? clusters - 1 - c : c;
    cluster.clear();
    cluster.resize(blocks_of_cluster);
    cluster_barrier = Barrier{};
    for (int i = 0; i < blocks_of_cluster; ++i) {
      const int64_t index = at * blocks_of_cluster + i;
      block = &cluster[i];
      block->index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                      unsigned(index / grid.x / grid.y)};
      block->fibers.resize(threads);
      block->warps.resize(threads / kWarpSize);
      block->alive = threads;
      block->shared_bytes = shared_bytes;
      block->memory.assign(shared_bytes + 2 * kGuardBytes + 1024, 0xff);
      const uintptr_t start = reinterpret_cast<uintptr_t>(block->memory.data()) + kGuardBytes;
      block->shared = reinterpret_cast<unsigned char*>((start + 1023) / 1024 * 1024);
      block->unseen.assign((shared_bytes + 15) / 16, 0);
      for (int thread = 0; thread < threads; ++thread) {
        make_context(block->fibers[thread].context, stack_of(int64_t(i) * threads + thread),
                     kStackBytes, run_thread);
      }
    }
    try {
      run_cluster();
    } catch (const std::exception& error) {
      refuse(error.what());
    }
  }
}

unsigned char* shared_memory() { return block->shared; }
const void* shared_of_block(const void* shared, int rank) {
  const unsigned char* p = static_cast<const unsigned char*>(shared);
  if (rank < 0 || rank >= int(cluster.size())) fail("no block " + std::to_string(rank));
  if (p < block->shared || p >= block->shared + block->shared_bytes)
    fail("an address of another block's that is not in shared memory");
  return cluster[rank].shared + (p - block->shared);
}
int lane() { return current % kWarpSize; }

// "file:line", the same pointer for the same place.
static const std::string& place_of(const char* file, int line) {
  std::string& place = places[{file, line}];
  if (place.empty()) {
    const char* name = strrchr(file, '/');
    place = std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  }
  return place;
}

bool reach(const char* file, int line) { return place_of(file, line) != settings().left_out; }

void sync_threads(const char* file, int line) {
  if (!reach(file, line)) return;
  const char* place = place_of(file, line).c_str();
  if (block->at_place && block->place != place)
    fail(std::string("threads of a block are at two barriers: ") + block->place + " and " + place);
  block->place = place;
  if (++block->at_place == block->alive) {
    release_block();
  } else {
    pause(place);
  }
}

void sync_cluster(const char* file, int line) {
  if (!reach(file, line)) return;
  ++cluster_barrier.arrived;
  self().waits = kAtCluster;
  release_cluster();
  if (self().waits) pause(kAtCluster);
}

void named_barrier(int id, int threads, bool wait) {
  Barrier& barrier = block->named[id];
  if (id < 1 || id > 15 || threads % kWarpSize) fail("named barrier " + std::to_string(id));
  if (barrier.arrived && barrier.expected != threads)
    fail("named barrier " + std::to_string(id) + " of two sizes");
  barrier.expected = threads;
  const bool last = ++barrier.arrived == threads;
  if (!last) {
    if (!wait) return;
    barrier.waiting.push_back(current);
    return pause("a named barrier");
  }
  for (int thread : barrier.waiting) block->fibers[thread].waits = nullptr;
  barrier = Barrier{};
}

void collective(const char* name, void (*compute)(void* const*), void* mine) {
  Warp& warp = block->warps[current / kWarpSize];
  if (warp.arrived && strcmp(warp.function, name) != 0)
    fail(std::string("lanes of a warp are at two functions: ") + warp.function + " and " + name);
  warp.function = name;
  warp.lanes[current % kWarpSize] = mine;
  if (++warp.arrived < kWarpSize) return pause(name);
  compute(warp.lanes);
  warp.arrived = 0;
  const int first = current / kWarpSize * kWarpSize;
  for (int l = 0; l < kWarpSize; ++l) block->fibers[first + l].waits = nullptr;
}

void start_copy(void* shared, const void* global, int bytes, bool valid) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!aligned(shared) || (valid && !aligned(global)))
    fail("cp.async of " + std::to_string(bytes) + " bytes is not aligned");
  const unsigned char* to = static_cast<unsigned char*>(shared);
  if (to < block->shared || to + bytes > block->shared + block->shared_bytes)
    fail("cp.async writes outside of shared memory");
  if (valid) check_access(global, bytes);
  const Copy copy{shared, global, bytes, valid};
  if (lands_at_once()) {
    copy.land();
  } else {
    self().open.push_back(copy);
  }
}

void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_for_copies(int groups) {
  auto& pending = self().groups;
  while (int(pending.size()) > groups) {
    for (const Copy& copy : pending.front()) copy.land();
    pending.erase(pending.begin());
  }
}

void init_phases(uint64_t* barrier, int arrivals) {
  const unsigned char* p = reinterpret_cast<const unsigned char*>(barrier);
  if (p < block->shared || p + 8 > block->shared + block->shared_bytes || (p - block->shared) % 8)
    fail("an mbarrier that is not in shared memory");
  if (!block->phases.emplace(barrier, Phases{arrivals}).second)
    fail("an mbarrier is initialized twice");
  self().barriers.push_back(barrier);
}

void fence_phases() {
  for (const uint64_t* barrier : self().barriers) block->phases[barrier].fenced = true;
  self().barriers.clear();
}

void note_write(const void* p, int bytes) {
  const int64_t begin = static_cast<const unsigned char*>(p) - block->shared;
  if (begin < 0 || begin + bytes > block->shared_bytes) return;
  for (int64_t chunk = begin / 16; chunk * 16 < begin + bytes; ++chunk) {
    if (block->unseen[chunk] == 1 + current) continue;
    block->unseen[chunk] = 1 + current;
    self().written.push_back(chunk);
  }
}

void fence_writes() {
  for (int64_t chunk : self().written) {
    if (block->unseen[chunk] == 1 + current) block->unseen[chunk] = 0;
  }
  self().written.clear();
}

void arrive(uint64_t* barrier, int bytes) {
  Phases& phases = phases_of(barrier);
  ++phases.arrived;
  phases.bytes += bytes;
  settle(phases);
}

bool is_complete(uint64_t* barrier, int parity) {
  return (phases_of(barrier).complete & 1) != parity;
}

void wait_for_phase(uint64_t* barrier, int parity) {
  while (!is_complete(barrier, parity)) pause(kAtPhase);
}

void start_box(void* shared, const CUtensorMap& map, const int* at, int rank, uint64_t* barrier) {
  unsigned char* const to = static_cast<unsigned char*>(shared);
  if (rank != map.rank) fail("a box of " + std::to_string(rank) + " dimensions");
  if (to < block->shared || to + 128 * rows_of(map) > block->shared + block->shared_bytes)
    fail("a bulk copy writes outside of shared memory");
  if ((to - block->shared) % 128) fail("a bulk copy's memory is not aligned");
  BoxCopy copy{to, map, {}, barrier};
  std::copy(at, at + rank, copy.at);
  if (!phases_of(barrier).fenced)
    fail("a bulk copy that may not see its mbarrier's initialization");
  if (lands_at_once()) {
    land(copy);
  } else {
    block->boxes.push_back(copy);
  }
}

void start_product(void (*compute)(const Product&), float* d, const uint32_t* a, uint64_t a_matrix,
                   uint64_t b_matrix, bool add) {
  if (!own_warp().fenced[lane()]) fail("a product without a fence of its registers");
  Product mine{compute, {}, {}, a_matrix, b_matrix, add, current / kWarpSize % 4};
  mine.d[0] = d, mine.a[0] = a;
  collective<Product>(
      "wgmma",
      [](Product* const* lanes) {
        Product product = *lanes[0];
        for (int l = 0; l < kWarpSize; ++l) {
          if (lanes[l]->b_matrix != product.b_matrix || lanes[l]->compute != product.compute)
            fail("lanes of a warp start different products");
          product.d[l] = lanes[l]->d[0], product.a[l] = lanes[l]->a[0];
        }
        Warp& warp = own_warp();
        warp.open.push_back(product);
        if (!lands_at_once()) return;
        for (auto& group : warp.groups) compute_all(group);
        compute_all(warp.open);
      },
      &mine);
}

void fence_registers() { own_warp().fenced[lane()] = true; }

void commit_products() {
  char nothing;
  collective<char>(
      "wgmma_commit",
      [](char* const*) {
        Warp& warp = own_warp();
        warp.groups.push_back(std::move(warp.open));
        warp.open.clear();
      },
      &nothing);
}

void wait_for_products(int groups) {
  own_warp().fenced[lane()] = false;
  collective<int>(
      "wgmma_wait",
      [](int* const* lanes) {
        auto& pending = own_warp().groups;
        while (int(pending.size()) > *lanes[0]) {
          compute_all(pending.front());
          pending.erase(pending.begin());
        }
      },
      &groups);
}

const void* element_of_matrix(uint64_t matrix, int row, int column) {
  int64_t at = int64_t(matrix & 0xffffffff) + column / 64 * int64_t(matrix >> 32) + row / 8 * 1024 +
               row % 8 * 128 + column % 64 * 2;
  at ^= (at >> 7 & 7) << 4;
  if (at < 0 || at + 2 > block->shared_bytes) fail("a matrix outside of shared memory");
  check_seen(at, "a product reads");
  return block->shared + at;
}

void check_access(const void* p, int bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  if (begin % bytes) fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
  if (allowed.empty()) return;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(block->shared);
  if (begin >= shared && end <= shared + block->shared_bytes) return;
  for (const auto& range : allowed) {
    if (begin >= range.first && end <= range.second) return;
  }
  fail("an access of " + std::to_string(bytes) + " bytes outside of every tensor");
}

}  // namespace emulation
}  // namespace cuda
}  // namespace gemma2

// ---- for the tests

using gemma2::cuda::emulation::settings;

extern "C" void emulation_configure(int schedule, int shared_bytes, int multiprocessors,
                                    int compute_capability, int max_blocks, const char* left_out) {
  settings().schedule = schedule;
  settings().shared_bytes = shared_bytes;
  settings().multiprocessors = multiprocessors;
  settings().compute_capability = compute_capability;
  settings().max_blocks = max_blocks;
  settings().left_out = left_out;
  gemma2::cuda::emulation::places.clear();
  gemma2::cuda::emulation::allowed.clear();
}

// Kernels may touch these bytes with 16-byte accesses and copies, and all others so named.
extern "C" void emulation_allow(const void* p, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  gemma2::cuda::emulation::allowed.emplace_back(begin, begin + bytes);
}

// The barriers and waits that were reached, "file:line" each, separated by spaces.
extern "C" const char* emulation_places() {
  static std::string text;
  text.clear();
  for (const auto& place : gemma2::cuda::emulation::places) text += place.second + " ";
  return text.c_str();
}
