// What the 32 lanes of a warp do together. All lanes must arrive; every lane gets the result.
#pragma once

#include "types.cuh"

namespace tilewise {

constexpr i32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ i32 lane_id() { return static_cast<i32>(threadIdx.x) % WARP; }

// One instruction each from sm_80 on.
__device__ __forceinline__ u32 warp_max(u32 x) { return __reduce_max_sync(ALL_LANES, x); }
__device__ __forceinline__ u32 warp_min(u32 x) { return __reduce_min_sync(ALL_LANES, x); }

// The lanes that hold the same value as this one, a bit each.
__device__ __forceinline__ u32 warp_match(u32 x) { return __match_any_sync(ALL_LANES, x); }

// What a lane wrote before, the others see after.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ i32 count_bits(u32 x) { return __popc(x); }

// The compiler no longer knows what `x` is: what follows from it is computed again instead of kept.
__device__ __forceinline__ void forget(i64& x) { asm volatile("" : "+l"(x)); }

// The xor tree adds in the same order for every lane, so all lanes hold the same bits.
__device__ __forceinline__ f32 warp_sum(f32 x) {
#pragma unroll
    for (i32 step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// Sums over neighbouring groups of LANES lanes, a power of two.
template <i32 LANES> __device__ __forceinline__ f32 group_sum(f32 x) {
#pragma unroll
    for (i32 step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The largest number of each group of LANES lanes, or -inf; NaN is passed over.
template <i32 LANES> __device__ __forceinline__ f32 group_max(f32 x) {
#pragma unroll
    for (i32 step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// A bit for each lane whose `x` is true.
__device__ __forceinline__ u32 warp_ballot(bool x) { return __ballot_sync(ALL_LANES, x); }

__device__ __forceinline__ bool warp_any(bool x) { return __any_sync(ALL_LANES, x); }

// NaN is passed over: the largest number, or -inf.
__device__ __forceinline__ f32 warp_max(f32 x) {
#pragma unroll
    for (i32 step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

}  // namespace tilewise
