// Stands in for cuda/common/warp.cuh: the same names over the emulator's mailboxes.
#pragma once

#include "types.cuh"

namespace tilewise {

constexpr i32 WARP = 32;

inline i32 lane_id() { return static_cast<i32>(threadIdx.x) % WARP; }

inline u32 warp_max(u32 x) {
    const std::uint32_t* all = emulator::exchange(x);
    for (i32 lane = 0; lane < WARP; ++lane) x = all[lane] > x ? all[lane] : x;
    return x;
}

inline u32 warp_min(u32 x) {
    const std::uint32_t* all = emulator::exchange(x);
    for (i32 lane = 0; lane < WARP; ++lane) x = all[lane] < x ? all[lane] : x;
    return x;
}

inline f32 warp_max(f32 x) {
    const std::uint32_t* all = emulator::exchange(__float_as_uint(x));
    for (i32 lane = 0; lane < WARP; ++lane) x = fmaxf(x, __uint_as_float(all[lane]));
    return x;
}

inline f32 warp_sum(f32 x) {
    const i32 lane = lane_id();
    for (i32 step = WARP / 2; step > 0; step /= 2) {
        x += __uint_as_float(emulator::exchange(__float_as_uint(x))[lane ^ step]);
    }
    return x;
}

}  // namespace tilewise
