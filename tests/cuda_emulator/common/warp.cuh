// Stands in for cuda/common/warp.cuh: the same names over the emulator's mailboxes.
#pragma once

#include "types.cuh"

namespace tilewise {

constexpr i32 WARP = 32;

inline i32 lane_id() { return static_cast<i32>(threadIdx.x) % WARP; }

inline u32 warp_max(u32 x) {
    const std::uint64_t* all = emulator::exchange(x);
    for (i32 lane = 0; lane < WARP; ++lane) x = all[lane] > x ? static_cast<u32>(all[lane]) : x;
    return x;
}

inline u32 warp_min(u32 x) {
    const std::uint64_t* all = emulator::exchange(x);
    for (i32 lane = 0; lane < WARP; ++lane) x = all[lane] < x ? static_cast<u32>(all[lane]) : x;
    return x;
}

inline f32 warp_max(f32 x) {
    const std::uint64_t* all = emulator::exchange(__float_as_uint(x));
    for (i32 lane = 0; lane < WARP; ++lane) x = fmaxf(x, __uint_as_float(static_cast<u32>(all[lane])));
    return x;
}

inline u32 warp_match(u32 x) {
    const std::uint64_t* all = emulator::exchange(x);
    u32 same = 0;
    for (i32 lane = 0; lane < WARP; ++lane) same |= static_cast<u32>(all[lane] == x) << lane;
    return same;
}

inline void warp_barrier() { emulator::exchange(0); }

inline void forget(i64&) {}

inline i32 count_bits(u32 x) { return __builtin_popcount(x); }

template <i32 LANES> inline f32 group_sum(f32 x) {
    const i32 lane = lane_id();
    for (i32 step = LANES / 2; step > 0; step /= 2) {
        x += __uint_as_float(static_cast<u32>(emulator::exchange(__float_as_uint(x))[lane ^ step]));
    }
    return x;
}

template <i32 LANES> inline f32 group_max(f32 x) {
    const i32 lane = lane_id();
    for (i32 step = LANES / 2; step > 0; step /= 2) {
        x = fmaxf(x, __uint_as_float(static_cast<u32>(emulator::exchange(__float_as_uint(x))[lane ^ step])));
    }
    return x;
}

inline u32 warp_ballot(bool x) {
    const std::uint64_t* all = emulator::exchange(x);
    u32 bits = 0;
    for (i32 lane = 0; lane < WARP; ++lane) bits |= static_cast<u32>(all[lane] != 0) << lane;
    return bits;
}

inline bool warp_any(bool x) {
    const std::uint64_t* all = emulator::exchange(x);
    bool any = false;
    for (i32 lane = 0; lane < WARP; ++lane) any |= all[lane] != 0;
    return any;
}

inline f32 warp_sum(f32 x) { return group_sum<WARP>(x); }

}  // namespace tilewise
