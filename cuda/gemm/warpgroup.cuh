// The sums of a tile on sm_90a: two warpgroups, one below the other, hold 64 x 256 each.
//
// Tensor cores read both operands from shared memory, and run while the threads copy: products of tile i are waited for
// when those of tile i + 1 have begun. Operands that lie across are read as they lie.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../ptx/warpgroup.cuh"
#include "product.cuh"

namespace tilewise {
namespace gemm {

template <class Type, class Left, class Right> struct Product<Warpgroups<Type>, Left, Right> {
    using Engine = Warpgroups<Type>;
    f32 sum[128];

    bool begun;  // registers that a pipeline of products writes may not be set by other means while it runs

    __device__ __forceinline__ void clear() { begun = false; }

    static __device__ __forceinline__ i32 first_row() { return static_cast<i32>(threadIdx.x) / 128 * 64; }

    // Where the operand's rows from `free` on begin, at step `step` of 16 places along the depth.
    template <class Operand> static __device__ __forceinline__ u64 part(shared_t tile, i32 free, i32 step) {
        if (Operand::ALONG) return descriptor(tile + free * 128 + step * 32, 16);
        return descriptor(tile + free / 64 * (Engine::DEPTH * 128) + step * 2048, Engine::DEPTH * 128);
    }

    __device__ __forceinline__ void accumulate(shared_t left, shared_t right) {
        warpgroup_begin();
#pragma unroll
        for (i32 step = 0; step < Engine::DEPTH / 16; ++step) {
            warpgroup_multiply_add<!Left::ALONG, !Right::ALONG>(Type{}, sum, part<Left>(left, first_row(), step),
                                                                part<Right>(right, 0, step), begun || step > 0);
        }
        warpgroup_commit();
        warpgroup_wait<1>();
        begun = true;
    }

    __device__ __forceinline__ void finish() {
        warpgroup_finish(sum);
#pragma unroll
        for (i32 i = 0; i < 128; ++i) sum[i] = begun ? sum[i] : 0.0f;
    }

    __device__ __forceinline__ void unload(f32* stage) const {
        const i32 lane = lane_id(), warp = static_cast<i32>(threadIdx.x) / WARP % 4;
        f32* place = stage + (first_row() + warp * 16 + lane / 4) * PITCH<Engine> + lane % 4 * 2;
#pragma unroll
        for (i32 j = 0; j < 32; ++j) {
            place[j * 8] = sum[4 * j];
            place[j * 8 + 1] = sum[4 * j + 1];
            place[8 * PITCH<Engine> + j * 8] = sum[4 * j + 2];
            place[8 * PITCH<Engine> + j * 8 + 1] = sum[4 * j + 3];
        }
    }
};

}  // namespace gemm
}  // namespace tilewise
