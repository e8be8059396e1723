// Runs kernels of cuda/ on a CPU, one fiber a thread: slow, exact about lanes, and enough to test what a kernel says.
//
// The flattened text of a kernel compiles as C++ behind this file and the headers in common/ and ptx/, which stand in
// for those that hold instructions of the GPU. All else is the text that NVRTC compiles.
//
// Lanes of a warp meet at collectives: a lane leaves its words in a mailbox and yields; it goes on when all 32 have
// done so. Two mailboxes take turns, so a fast lane cannot overwrite what a slow one has still to read. A lane that
// ends while others wait is the error that would hang a GPU; it is reported through `emulator_fault`.
//
// A block's barrier lets nobody through before all threads that still run have come. An asynchronous copy happens at
// the first or at the last moment that the rules allow, by thread: who reads too early reads old memory, which starts as
// NaN, and who refills a place too early overwrites what others read.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct Extent {
    unsigned x, y, z;
};

static Extent threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned WARP = 32, WORDS = 8, DYNAMIC_SHARED = 200 * 1024;

struct Copy {
    void* target;
    const void* source;  // null: zeros
};

inline void make(const Copy& copy) {
    if (copy.source == nullptr) std::memset(copy.target, 0, 16);
    else std::memcpy(copy.target, copy.source, 16);
}

// A product that this thread's warpgroup has begun.
struct Product {
    std::function<std::vector<double>()> compute;  // what it adds to this thread's sums, from shared memory as it is
    std::vector<double> seen;                      // the same at the time of issue
    float* sum;
    bool add;
};

struct Thread {
    std::jmp_buf context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    Extent index;
    unsigned collectives = 0;
    bool started = false, done = false, at_barrier = false;
    std::vector<Copy> copies;            // of 16 bytes, not yet made
    std::vector<std::size_t> committed;  // how many of them each group ends at
    std::vector<Product> products;       // not yet waited for
    std::vector<std::size_t> product_groups;
    std::vector<std::size_t> unpublished;  // chunks it has written and not yet shown to the tensor cores
};

static std::vector<Thread> threads;
static std::vector<std::uint64_t> mailbox;  // [warp][2][WORDS][WARP]
static std::jmp_buf scheduler;
static unsigned current;
static std::string fault;
static void (*body)(void*);
static void* body_context;
alignas(1024) static char dynamic_shared[DYNAMIC_SHARED];
static bool unpublished[DYNAMIC_SHARED / 16];  // of each chunk: whether tensor cores may still see what was there before
static std::size_t dynamic_shared_used;

// This thread has written 16 bytes of shared memory.
inline void wrote(const void* target) {
    const std::size_t chunk = static_cast<std::size_t>(static_cast<const char*>(target) - dynamic_shared) / 16;
    if (chunk >= DYNAMIC_SHARED / 16) return;
    unpublished[chunk] = true;
    threads[current].unpublished.push_back(chunk);
}

inline void publish() {
    for (const std::size_t chunk : threads[current].unpublished) unpublished[chunk] = false;
    threads[current].unpublished.clear();
}

inline void enter() {
    body(body_context);
    threads[current].done = true;
    _longjmp(scheduler, 1);
}

inline void yield() {
    if (_setjmp(threads[current].context) == 0) _longjmp(scheduler, 1);
}

// A fiber's first steps need a stack of its own; all later switches are jumps, which cost no system call.
inline void resume(Thread& thread) {
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    static ucontext_t first, unused;
    getcontext(&first);
    first.uc_stack.ss_sp = thread.stack.data();
    first.uc_stack.ss_size = thread.stack.size();
    first.uc_link = nullptr;
    makecontext(&first, enter, 0);
    swapcontext(&unused, &first);
}

// Leaves `mine`, waits for the warp, and returns the words of all lanes: word w of lane l at [w * WARP + l].
template <std::size_t COUNT> inline const std::uint64_t* exchange(const std::uint64_t (&mine)[COUNT]) {
    static_assert(COUNT <= WORDS);
    Thread& thread = threads[current];
    std::uint64_t* box = &mailbox[(current / WARP * 2 + thread.collectives % 2) * WORDS * WARP];
    for (std::size_t word = 0; word < COUNT; ++word) box[word * WARP + current % WARP] = mine[word];
    ++thread.collectives;
    yield();
    return box;
}

inline const std::uint64_t* exchange(std::uint64_t mine) {
    const std::uint64_t words[1] = {mine};
    return exchange(words);
}

inline void barrier() {
    Thread& thread = threads[current];
    thread.at_barrier = true;
    while (thread.at_barrier) yield();
}

inline void run_block() {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    threads.resize(count);
    mailbox.assign((count + WARP - 1) / WARP * 2 * WORDS * WARP, 0);
    std::memset(dynamic_shared, 0xff, dynamic_shared_used);
    std::memset(unpublished, 0, sizeof unpublished);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.collectives = 0;
        thread.started = thread.done = thread.at_barrier = false;
        thread.copies.clear();
        thread.committed.clear();
        thread.products.clear();
        thread.product_groups.clear();
        thread.unpublished.clear();
    }
    for (bool running = true; running;) {
        running = false;
        bool all_at_barrier = true;
        for (current = 0; current < count; ++current) {
            if (threads[current].done) continue;
            threadIdx = threads[current].index;
            resume(threads[current]);
            running |= !threads[current].done;
            all_at_barrier &= threads[current].done || threads[current].at_barrier;
        }
        for (unsigned i = 0; i < count; ++i) {
            const Thread &leader = threads[i / WARP * WARP], &thread = threads[i];
            if (thread.done != leader.done || (!thread.done && thread.collectives != leader.collectives)) {
                fault = "lanes of one warp part ways at a collective";
                return;
            }
        }
        if (all_at_barrier) {
            for (Thread& thread : threads) thread.at_barrier = false;
        }
    }
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A> void run(void (*kernel)(A...), void** arguments, Extent grid, Extent block) {
    auto bound = [&] { call(kernel, arguments, std::index_sequence_for<A...>{}); };
    body = [](void* context) { (*static_cast<decltype(bound)*>(context))(); };
    body_context = &bound;
    gridDim = grid;
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x && fault.empty(); ++blockIdx.x) run_block();
}

template <class... A> std::vector<int> sizes(void (*)(A...)) { return {static_cast<int>(sizeof(A))...}; }

}  // namespace emulator

// The text of the last fault, once; empty if there was none.
extern "C" const char* emulator_fault() {
    static std::string last;
    last = std::exchange(emulator::fault, "");
    return last.c_str();
}

extern "C" void emulator_shared(long bytes) { emulator::dynamic_shared_used = static_cast<std::size_t>(bytes); }

// What ctypes calls: NAME with pointers to its arguments, and the sizes of its parameters ended by 0.
#define EMULATED(NAME)                                                                                                \
    extern "C" void emulate_##NAME(void** arguments, const unsigned* grid, const unsigned* block) {                   \
        emulator::run(&NAME, arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]});                 \
    }                                                                                                                 \
    extern "C" void sizes_##NAME(int* out) {                                                                          \
        for (int size : emulator::sizes(&NAME)) *out++ = size;                                                        \
        *out = 0;                                                                                                     \
    }
