// Stands in for cuda/ptx/async.cuh. A copy may be made at any time between its issue and the wait for its group: odd
// threads make it at once, so that what others still read is overwritten, even threads at the wait and not before.
#pragma once

#include "../common/memory.cuh"
#include "../common/types.cuh"
#include "shared.cuh"

namespace tilewise {

inline void async_copy_16(shared_t target, const void* source, bool wanted) {
    check_16(source);
    emulator::Thread& thread = emulator::threads[emulator::current];
    const emulator::Copy copy{shared_pointer<char>(target, 16), wanted ? source : nullptr};
    if (emulator::current % 2 == 0) {
        thread.copies.push_back(copy);
    } else {
        emulator::make(copy);
        emulator::wrote(copy.target);
    }
}

inline void async_commit() {
    emulator::Thread& thread = emulator::threads[emulator::current];
    thread.committed.push_back(thread.copies.size());
}

template <i32 PENDING> inline void async_wait() {
    emulator::Thread& thread = emulator::threads[emulator::current];
    if (thread.committed.size() <= PENDING) return;
    const std::size_t arrived = thread.committed.size() - PENDING, count = thread.committed[arrived - 1];
    for (std::size_t i = 0; i < count; ++i) {
        emulator::make(thread.copies[i]);
        emulator::wrote(thread.copies[i].target);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(count));
    thread.committed.erase(thread.committed.begin(), thread.committed.begin() + static_cast<std::ptrdiff_t>(arrived));
    for (std::size_t& end : thread.committed) end -= count;
}

}  // namespace tilewise
