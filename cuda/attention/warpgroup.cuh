// Products of tiles by warpgroups (sm_90a): four warps hold 64 rows, and the tensor cores read keys and values, and the
// queries too, from shared memory. Sums lie in registers as those of tile.cuh do, so a pass is the same text for both.
#pragma once

#include "../common/types.cuh"
#include "../ptx/pair.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/warpgroup_attention.cuh"
#include "tile.cuh"

namespace tilewise {
namespace attention {

template <class T> struct MultiplyWarpgroup {
    // sum = left [64 rows from left_row] right [8 GROUPS rows]^T; LEFT_ROWS, RIGHT_ROWS: of the tiles.
    template <i32 WIDTH, i32 LEFT_ROWS, i32 RIGHT_ROWS, i32 GROUPS>
    static __device__ __forceinline__ void rows(Sums<1, GROUPS>& sum, shared_t left, i32 left_row, shared_t right) {
        warpgroup_begin();
#pragma unroll
        for (i32 step = 0; step < WIDTH / 16; ++step) {
            const i32 within = step % 4 * 32;
            warpgroup_scores(T{}, sum.at[0], descriptor(left + step / 4 * (LEFT_ROWS * 128) + left_row * 128 + within, 16),
                             descriptor(right + step / 4 * (RIGHT_ROWS * 128) + within, 16), step > 0);
        }
        warpgroup_commit();
        warpgroup_settle(sum.at[0]);
    }

    // sum += weight right [8 DEPTH rows, 8 GROUPS columns]; weights are rounded to T on the way.
    template <i32 RIGHT_ROWS, i32 GROUPS, i32 DEPTH>
    static __device__ __forceinline__ void weighted(Sums<1, GROUPS>& sum, const Sums<1, DEPTH>& weight, shared_t right) {
        u32 a[DEPTH / 2][4];
#pragma unroll
        for (i32 i = 0; i < DEPTH * 2; ++i) {
            const f32(&part)[4] = weight.at[0][i / 4 * 2 + i % 4 / 2];
            a[i / 4][i % 4] = pack_pair<T>(part[i % 2 * 2], part[i % 2 * 2 + 1]);
        }
        warpgroup_begin();
#pragma unroll
        for (i32 step = 0; step < DEPTH / 2; ++step) {
            warpgroup_weighted(T{}, sum.at[0], a[step], descriptor(right + step * 2048, RIGHT_ROWS * 128));
        }
        warpgroup_commit();
        warpgroup_settle(sum.at[0]);
    }
};

}  // namespace attention
}  // namespace tilewise
