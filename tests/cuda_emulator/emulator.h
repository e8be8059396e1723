// Runs kernels of cuda/ on a CPU, one fiber a thread: slow, exact about lanes, and enough to test what a kernel says.
//
// The flattened text of a kernel compiles as C++ behind this file and the three headers in common/, which stand in
// for those that hold instructions of the GPU (types, warp, memory). All else is the text that NVRTC compiles.
//
// Lanes of a warp meet at collectives: a lane leaves its value in a mailbox and yields; it goes on when all 32 have
// done so. Two mailboxes take turns, so a fast lane cannot overwrite what a slow one has still to read. A lane that
// ends while others wait is the error that would hang a GPU; it is reported through `emulator_fault`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(THREADS)
#define __shared__ static

struct Extent {
    unsigned x, y, z;
};

static Extent threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned WARP = 32;

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    Extent index;
    unsigned collectives = 0;
    bool done = false;
};

static std::vector<Thread> threads;
static std::vector<std::uint32_t> mailbox;  // [warp][2][WARP]
static ucontext_t scheduler;
static unsigned current;
static std::string fault;
static void (*body)(void*);
static void* body_context;

inline void enter() {
    body(body_context);
    threads[current].done = true;
}

// Leaves `mine`, waits for the warp, and returns the values of all lanes.
inline const std::uint32_t* exchange(std::uint32_t mine) {
    Thread& thread = threads[current];
    std::uint32_t* box = &mailbox[(current / WARP * 2 + thread.collectives % 2) * WARP];
    box[current % WARP] = mine;
    ++thread.collectives;
    swapcontext(&thread.context, &scheduler);
    return box;
}

inline void run_block() {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    threads.resize(count);
    mailbox.assign((count + WARP - 1) / WARP * 2 * WARP, 0);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.collectives = 0;
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, enter, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (current = 0; current < count; ++current) {
            if (threads[current].done) continue;
            threadIdx = threads[current].index;
            swapcontext(&scheduler, &threads[current].context);
            running |= !threads[current].done;
        }
        for (unsigned i = 0; i < count; ++i) {
            const Thread &leader = threads[i / WARP * WARP], &thread = threads[i];
            if (thread.done != leader.done || (!thread.done && thread.collectives != leader.collectives)) {
                fault = "lanes of one warp part ways at a collective";
                return;
            }
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

// What ctypes calls: NAME with pointers to its arguments, and the sizes of its parameters ended by 0.
#define EMULATED(NAME)                                                                                                \
    extern "C" void emulate_##NAME(void** arguments, const unsigned* grid, const unsigned* block) {                   \
        emulator::run(&NAME, arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]});                 \
    }                                                                                                                 \
    extern "C" void sizes_##NAME(int* out) {                                                                          \
        for (int size : emulator::sizes(&NAME)) *out++ = size;                                                        \
        *out = 0;                                                                                                     \
    }
