// The product of one tile: TILE x TILE sums in registers, left and right operand staged through shared memory.
//
//   sum = 0
//   for start = 0, DEPTH, 2 DEPTH, ... below depth:
//       stage both tiles
//       sum += left tile * right tile
//   unload sum
//
// Departures:
//   1. Copies of later tiles run while tile i is multiplied. One barrier a tile says both that tile i has arrived and
//      that all warps have left the place that the next copy will fill.
//   2. Eight warps, two down and four across, hold 64 x 32 sums each. f16 and bf16 go through the tensor cores
//      (ldmatrix, mma.sync); an operand that lies across is transposed by the load. f32 is plain fused multiply-adds:
//      the tensor cores have no f32, and three products of split numbers would not reach its last bits.
//   3. Warps whose rows all lie past the end multiply nothing; they still copy and keep the barriers.
//   4. Sums leave through shared memory as f32 (`unload`), so that what follows, an activation or a store, has whole
//      rows before it, and its code stands in one loop instead of unrolled over registers.
#pragma once

#include "../common/block.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../ptx/async.cuh"
#include "../ptx/matrix.cuh"
#include "../ptx/shared.cuh"
#include "../ptx/warpgroup.cuh"
#include "operand.cuh"

namespace tilewise {
namespace gemm {

// Of unloaded rows, in f32: eight rows apart is eight banks apart.
template <class Engine> constexpr i32 PITCH = Engine::COLUMNS + 8;

// The sums of a tile, spread over a block.
template <class Engine, class Left, class Right> struct Product {
    using T = typename Engine::T;
    f32 sum[4][4][4];  // [16 rows][8 columns][of a lane: row l / 4 twice, row l / 4 + 8 twice]

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (i32 i = 0; i < 64; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    static __device__ __forceinline__ i32 first_row() { return static_cast<i32>(threadIdx.x) / WARP / 4 * 64; }
    static __device__ __forceinline__ i32 first_column() { return static_cast<i32>(threadIdx.x) / WARP % 4 * 32; }

    __device__ __forceinline__ void accumulate(shared_t left, shared_t right) {
        const i32 lane = lane_id(), low = lane % 8, pair = lane / 8 % 2, half = lane / 16;
#pragma unroll
        for (i32 step = 0; step < 2; ++step) {  // 16 of the 32 places along the depth
            u32 b[4][2];
#pragma unroll
            for (i32 j = 0; j < 4; j += 2) {
                const i32 column = first_column() + j * 8;
                if (Right::ALONG) {
                    load_matrices(Right::at(right, column + half * 8 + low, step * 2 + pair), b[j][0], b[j][1],
                                  b[j + 1][0], b[j + 1][1]);
                } else {
                    load_matrices_transposed(Right::at(right, step * 16 + pair * 8 + low, column / 8 + half), b[j][0],
                                             b[j][1], b[j + 1][0], b[j + 1][1]);
                }
            }
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                const i32 row = first_row() + i * 16;
                u32 a[4];
                if (Left::ALONG) {
                    load_matrices(Left::at(left, row + pair * 8 + low, step * 2 + half), a[0], a[1], a[2], a[3]);
                } else {
                    load_matrices_transposed(Left::at(left, step * 16 + half * 8 + low, row / 8 + pair), a[0], a[1],
                                             a[2], a[3]);
                }
#pragma unroll
                for (i32 j = 0; j < 4; ++j) multiply_add<T>(sum[i][j], a, b[j]);
            }
        }
    }

    __device__ __forceinline__ void finish() {}

    __device__ __forceinline__ void unload(f32* stage) const {
        const i32 lane = lane_id();
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
#pragma unroll
            for (i32 j = 0; j < 4; ++j) {
                f32* place = stage + (first_row() + i * 16 + lane / 4) * PITCH<Engine> + first_column() + j * 8 + lane % 4 * 2;
                place[0] = sum[i][j][0];
                place[1] = sum[i][j][1];
                place[8 * PITCH<Engine>] = sum[i][j][2];
                place[8 * PITCH<Engine> + 1] = sum[i][j][3];
            }
        }
    }
};

// f32: thread (y, x) of 16 x 16 holds rows y, y + 16, ... and columns x, x + 16, ...
template <bool ALIGNED, class Left, class Right> struct Product<Warps<f32, ALIGNED>, Left, Right> {
    using Engine = Warps<f32, ALIGNED>;
    f32 sum[8][8];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (i32 i = 0; i < 64; ++i) sum[i / 8][i % 8] = 0.0f;
    }

    // Rows of a warp are y = 2 warp, 2 warp + 1 and those 16, 32, ... further down.
    static __device__ __forceinline__ i32 first_row() { return static_cast<i32>(threadIdx.x) / WARP * 2; }

    // Four places along the depth, from 4 * quad, of place `free` on the free axis.
    template <class Operand>
    static __device__ __forceinline__ void four(shared_t tile, i32 free, i32 quad, f32 (&value)[4]) {
        if (Operand::ALONG) {
            load_shared_16(Operand::at(tile, free, quad), value);
        } else {
#pragma unroll
            for (i32 k = 0; k < 4; ++k) value[k] = load_shared(Operand::at(tile, quad * 4 + k, free / 4) + free % 4 * 4);
        }
    }

    __device__ __forceinline__ void accumulate(shared_t left, shared_t right) {
        const i32 y = static_cast<i32>(threadIdx.x) / 16, x = static_cast<i32>(threadIdx.x) % 16;
#pragma unroll 1
        for (i32 quad = 0; quad < Engine::DEPTH / 4; ++quad) {
            f32 a[8][4];
#pragma unroll
            for (i32 i = 0; i < 8; ++i) four<Left>(left, y + 16 * i, quad, a[i]);
#pragma unroll
            for (i32 j = 0; j < 8; ++j) {
                f32 b[4];
                four<Right>(right, x + 16 * j, quad, b);
#pragma unroll
                for (i32 i = 0; i < 8; ++i) {
#pragma unroll
                    for (i32 k = 0; k < 4; ++k) sum[i][j] = fmaf(a[i][k], b[k], sum[i][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void finish() {}

    __device__ __forceinline__ void unload(f32* stage) const {
        const i32 y = static_cast<i32>(threadIdx.x) / 16, x = static_cast<i32>(threadIdx.x) % 16;
#pragma unroll
        for (i32 i = 0; i < 8; ++i) {
#pragma unroll
            for (i32 j = 0; j < 8; ++j) stage[(y + 16 * i) * PITCH<Engine> + x + 16 * j] = sum[i][j];
        }
    }
};

// Left times right over `depth` places, of which `rows` rows matter; returns the unloaded sums, f32 [TILE][PITCH] in
// shared memory, and all threads may read them.
template <class Engine, class Left, class Right>
__device__ __forceinline__ f32* multiply(Left& left, Right& right, i64 depth, i64 rows) {
    constexpr i32 STAGES = Engine::STAGES, BYTES = Left::BYTES + Right::BYTES;
    // At a time when tile i is multiplied, AHEAD more are on their way. Warpgroups still read tile i - 1 then.
    constexpr i32 AHEAD = Engine::WARPGROUPS ? STAGES - 2 : STAGES - 1;
    char* memory = dynamic_shared();
    const shared_t base = shared_address(memory);
    const i64 steps = (depth + Engine::DEPTH - 1) / Engine::DEPTH;

    i64 start = 0;  // of the next tile to copy
    i32 free = 0;   // its place
    left.prepare(0);
    right.prepare(0);
    const auto copy = [&] {
        if (start < depth) {
            left.issue(base + free * BYTES, start);
            right.issue(base + free * BYTES + Left::BYTES, start);
            start += Engine::DEPTH;
            free = free + 1 == STAGES ? 0 : free + 1;
            left.prepare(start);
            right.prepare(start);
        }
        async_commit();
    };
#pragma unroll 1
    for (i32 i = 0; i < AHEAD; ++i) copy();

    Product<Engine, Left, Right> product;
    product.clear();
    i32 stage = 0;
#pragma unroll 1
    for (i64 step = 0; step < steps; ++step) {
        async_wait<AHEAD - 1>();
        if (Engine::WARPGROUPS) publish_copies();
        block_barrier();
        const shared_t here = base + stage * BYTES;
        if (!Engine::WARPGROUPS) copy();
        if (Engine::WARPGROUPS || Product<Engine, Left, Right>::first_row() < rows) product.accumulate(here, here + Left::BYTES);
        if (Engine::WARPGROUPS) copy();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    product.finish();
    async_wait<0>();
    block_barrier();
    f32* unloaded = reinterpret_cast<f32*>(memory);
    product.unload(unloaded);
    block_barrier();
    return unloaded;
}

}  // namespace gemm
}  // namespace tilewise
