// Products of a warp's rows: operands are tiles in shared memory, sums stay in registers as the tensor cores leave them.
//
// A tile has rows of WIDTH elements, a multiple of 64, cut into chunks of 16 bytes that are permuted by the row's number
// (as in gemm/operand.cuh). Of each 16 rows of a sum, lane l holds rows l / 4 and l / 4 + 8, and of every eight columns
// 2 (l % 4) and the next: sum[.][j][2 i + k] is row l / 4 + 8 i, column 8 j + 2 (l % 4) + k.
//
// f16 and bf16 go through mma.sync. f32 is plain fused multiply-adds in the same places: slow, and exact to f32.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../gemm/operand.cuh"
#include "../ptx/matrix.cuh"
#include "../ptx/pair.cuh"
#include "../ptx/shared.cuh"

namespace tilewise {
namespace attention {

template <class T> constexpr i32 CHUNK = gemm::CHUNK<T>;

template <class T, i32 WIDTH> constexpr i32 ROW_BYTES = WIDTH * static_cast<i32>(sizeof(T));

template <class T, i32 WIDTH> __device__ __forceinline__ shared_t at(shared_t tile, i32 row, i32 chunk) {
    return tile + row * ROW_BYTES<T, WIDTH> + (chunk ^ (row & 7)) * 16;
}

// The same for warpgroups, which read tiles by themselves: slabs of 128 bytes of each row, one slab behind the other.
template <i32 ROWS> __device__ __forceinline__ shared_t at_slab(shared_t tile, i32 row, i32 chunk) {
    return tile + chunk / 8 * (ROWS * 128) + row * 128 + (chunk % 8 ^ (row & 7)) * 16;
}

// Copies ROWS rows; `where` gives a row's place in memory, or null for a row of zeros. `width`: elements that exist.
template <class T, i32 ROWS, i32 WIDTH, i32 THREADS, bool SLABS = false, class Where>
__device__ __forceinline__ void stage(shared_t tile, const void* anywhere, i32 width, bool aligned, const Where& where) {
    constexpr i32 PER_ROW = WIDTH / CHUNK<T>;
    static_assert(WIDTH % 64 == 0, "whole groups of eight chunks");
    const T* base = static_cast<const T*>(anywhere);
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < ROWS * PER_ROW; i += THREADS) {
        const i32 row = i / PER_ROW, chunk = i % PER_ROW, column = chunk * CHUNK<T>;
        const T* source = where(row);
        const i64 count = source == nullptr ? 0 : width - column;
        const shared_t target = SLABS ? at_slab<ROWS>(tile, row, chunk) : at<T, WIDTH>(tile, row, chunk);
        if (aligned) {
            gemm::fill<T, true>(target, source + column, count, base);
        } else {
            gemm::fill<T, false>(target, source + column, count, base);
        }
    }
}

// The sums of R times 16 rows and 8 GROUPS columns.
template <i32 R, i32 GROUPS> struct Sums {
    f32 at[R][GROUPS][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (i32 i = 0; i < R * GROUPS * 4; ++i) at[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] = 0.0f;
    }
};

template <class T> struct Multiply {
    // sum [16 R, 8 GROUPS] += left [16 R rows from left_row] right [8 GROUPS rows from right_row]^T
    template <i32 WIDTH, i32 R, i32 GROUPS>
    static __device__ __forceinline__ void rows(Sums<R, GROUPS>& sum, shared_t left, i32 left_row, shared_t right,
                                                i32 right_row) {
        const i32 lane = lane_id(), low = lane % 8, pair = lane / 8 % 2, half = lane / 16;
#pragma unroll 4
        for (i32 step = 0; step < WIDTH / 16; ++step) {
            u32 a[R][4];
#pragma unroll
            for (i32 i = 0; i < R; ++i) {
                load_matrices(at<T, WIDTH>(left, left_row + i * 16 + pair * 8 + low, step * 2 + half), a[i][0], a[i][1],
                              a[i][2], a[i][3]);
            }
#pragma unroll
            for (i32 j = 0; j < GROUPS; j += 2) {
                u32 b[2][2];
                load_matrices(at<T, WIDTH>(right, right_row + j * 8 + half * 8 + low, step * 2 + pair), b[0][0], b[0][1],
                              b[1][0], b[1][1]);
#pragma unroll
                for (i32 i = 0; i < R; ++i) {
                    multiply_add<T>(sum.at[i][j], a[i], b[0]);
                    multiply_add<T>(sum.at[i][j + 1], a[i], b[1]);
                }
            }
        }
    }

    // sum [16 R, 8 GROUPS] += weight [16 R, 8 DEPTH] right [8 DEPTH rows from right_row, 8 GROUPS columns]; weights are
    // rounded to T on the way.
    template <i32 WIDTH, i32 R, i32 GROUPS, i32 DEPTH>
    static __device__ __forceinline__ void weighted(Sums<R, GROUPS>& sum, const Sums<R, DEPTH>& weight, shared_t right,
                                                    i32 right_row, f32*) {
        const i32 lane = lane_id(), low = lane % 8, pair = lane / 8 % 2, half = lane / 16;
#pragma unroll
        for (i32 step = 0; step < DEPTH / 2; ++step) {
            u32 a[R][4];
#pragma unroll
            for (i32 i = 0; i < R; ++i) {
#pragma unroll
                for (i32 k = 0; k < 4; ++k) {
                    const f32(&part)[4] = weight.at[i][step * 2 + k / 2];
                    a[i][k] = pack_pair<T>(part[k % 2 * 2], part[k % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (i32 j = 0; j < GROUPS; j += 2) {
                u32 b[2][2];
                load_matrices_transposed(at<T, WIDTH>(right, right_row + step * 16 + pair * 8 + low, j + half), b[0][0],
                                         b[0][1], b[1][0], b[1][1]);
#pragma unroll
                for (i32 i = 0; i < R; ++i) {
                    multiply_add<T>(sum.at[i][j], a[i], b[0]);
                    multiply_add<T>(sum.at[i][j + 1], a[i], b[1]);
                }
            }
        }
    }
};

template <> struct Multiply<f32> {
    template <i32 WIDTH, i32 R, i32 GROUPS>
    static __device__ __forceinline__ void rows(Sums<R, GROUPS>& sum, shared_t left, i32 left_row, shared_t right,
                                                i32 right_row) {
        const i32 down = lane_id() / 4, across = lane_id() % 4 * 2;
#pragma unroll 1
        for (i32 chunk = 0; chunk < WIDTH / 4; ++chunk) {
            f32 a[R][2][4];
#pragma unroll
            for (i32 i = 0; i < R * 2; ++i) {
                load_shared_16(at<f32, WIDTH>(left, left_row + i * 8 + down, chunk), a[i / 2][i % 2]);
            }
#pragma unroll
            for (i32 j = 0; j < GROUPS; ++j) {
#pragma unroll
                for (i32 k = 0; k < 2; ++k) {
                    f32 b[4];
                    load_shared_16(at<f32, WIDTH>(right, right_row + j * 8 + across + k, chunk), b);
#pragma unroll
                    for (i32 i = 0; i < R * 2; ++i) {
#pragma unroll
                        for (i32 d = 0; d < 4; ++d) {
                            f32& total = sum.at[i / 2][j][i % 2 * 2 + k];
                            total = fmaf(a[i / 2][i % 2][d], b[d], total);
                        }
                    }
                }
            }
        }
    }

    // The lanes of a row exchange their weights through `scratch`, [16 R][8 DEPTH] floats of this warp.
    template <i32 WIDTH, i32 R, i32 GROUPS, i32 DEPTH>
    static __device__ __forceinline__ void weighted(Sums<R, GROUPS>& sum, const Sums<R, DEPTH>& weight, shared_t right,
                                                    i32 right_row, f32* scratch) {
        const i32 down = lane_id() / 4, across = lane_id() % 4 * 2;
        warp_barrier();
#pragma unroll
        for (i32 i = 0; i < R * 2; ++i) {
#pragma unroll
            for (i32 j = 0; j < DEPTH; ++j) {
                f32* place = scratch + (i * 8 + down) * (8 * DEPTH) + j * 8 + across;
                place[0] = weight.at[i / 2][j][i % 2 * 2];
                place[1] = weight.at[i / 2][j][i % 2 * 2 + 1];
            }
        }
        warp_barrier();
#pragma unroll 1
        for (i32 row = 0; row < 8 * DEPTH; ++row) {
            f32 a[R * 2];
#pragma unroll
            for (i32 i = 0; i < R * 2; ++i) a[i] = scratch[(i * 8 + down) * (8 * DEPTH) + row];
#pragma unroll
            for (i32 j = 0; j < GROUPS; ++j) {
                const shared_t chunk = at<f32, WIDTH>(right, right_row + row, j * 2 + across / 4) + across % 4 * 4;
                const f32 b[2] = {load_shared(chunk), load_shared(chunk + 4)};
#pragma unroll
                for (i32 i = 0; i < R * 2; ++i) {
#pragma unroll
                    for (i32 k = 0; k < 2; ++k) {
                        f32& total = sum.at[i / 2][j][i % 2 * 2 + k];
                        total = fmaf(a[i], b[k], total);
                    }
                }
            }
        }
    }
};

// Two neighbouring elements of a row; the second exists if `both`.
template <class T> __device__ __forceinline__ void store_two(T* target, f32 first, f32 second, bool aligned, bool both) {
    if constexpr (sizeof(T) == 2) {
        if (aligned) {
            *reinterpret_cast<u32*>(target) = pack_pair<T>(first, second);
            return;
        }
    }
    target[0] = from_f32<T>(first);
    if (both) target[1] = from_f32<T>(second);
}

}  // namespace attention
}  // namespace tilewise
