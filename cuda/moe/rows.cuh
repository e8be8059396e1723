// Products whose rows are an expert's rows: up, down, and the gradients of both with respect to their inputs.
//
//   up              H = X[token of row] W1_e^T + b1_e;  A = act(H)             writes H (if asked for) and A
//   linear, along   Y = A W2_e^T + b2_e
//   down_gradient   D = dO[token of row] W2_e;  dH = s act'(H)[D];  A' = s act(H);  <D, act(H)> for the score
//   linear, across  dX' = dH W1_e
//
// For each slot of the schedule that holds a tile of up to 128 rows of expert e, for each tile of columns (128, or 256 for warpgroups): one block forms
// the product of that tile (gemm/product.cuh), then goes over its unloaded sums row by row:
//
//   up              gate, up = sums + bias;  store them to H;  store act(gate, up) to A
//   down_gradient   gate, up = H;  D = sums;  value, slopes = act(gate, up)
//                   partial[row, column tile] = sum over the tile's columns of D * value
//                   store s * D * slopes to dH;  store s * value to A'
//
// Departures:
//   1. A gated `up` takes a unit for every two columns of a tile and arranges their weight rows as 8 gates, 8 ups, 8 gates, ..., whatever the
//      layout of gate_up: gate and up of a unit meet in one tile, and chunks of eight stay together.
//   2. Blocks of one row tile are neighbours in the grid, so the gathered rows are read from memory once.
//   3. The sums of <D, act(H)> over a tile are a tree over the lanes that share a row, in one order: no atomics.
//      `reduce.cuh` adds the tiles of a row up. D is not yet scaled by s, so a score of 0 keeps its gradient.
//   4. Rows of no expert (the schedule's last tiles) are written as zeros to H by `up`, and are left alone elsewhere:
//      nothing reads them.
#pragma once

#include "../common/index.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../gemm/chunk.cuh"
#include "../gemm/product.cuh"
#include "../gemm/warpgroup.cuh"
#include "activation.cuh"

namespace tilewise {
namespace moe {

using gemm::CHUNK;
using gemm::THREADS;
using gemm::TILE;

// What a block of these kernels does: rows first .. first + rows of `expert`, one tile of columns.
struct Share {
    i32 expert, rows;
    i64 first, column_tile;

    __device__ __forceinline__ Share(const i32* __restrict__ schedule, const i32* __restrict__ offsets, i64 tiles) {
        const i64 slot = blockIdx.x / tiles;
        column_tile = blockIdx.x % tiles;
        expert = schedule[2 * slot];
        rows = 0;
        first = 0;
        if (expert < 0) return;
        first = offsets[expert] + static_cast<i64>(schedule[2 * slot + 1]) * TILE;
        const i64 left = offsets[expert + 1] - first;
        rows = static_cast<i32>(left < TILE ? left : TILE);
    }
};

template <class Engine, i32 ACTIVATION, class T>
__device__ __forceinline__ void finish_up(T* __restrict__ h, T* __restrict__ a, const f32* sums,
                                          const f32* __restrict__ bias, const Share& share, bool real, GateUp order,
                                          Constants constants) {
    constexpr bool GATED = ACTIVATION <= SWIGLU_CLAMPED, FAST = sizeof(T) == 2;
    constexpr i32 UNITS = GATED ? Engine::COLUMNS / 2 : Engine::COLUMNS, PER_ROW = UNITS / CHUNK<T>;
    const i64 n = order.units, wide = GATED ? 2 * n : n;
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < share.rows * PER_ROW; i += THREADS) {
        const i32 row = i / PER_ROW, column = i % PER_ROW * CHUNK<T>;
        const i64 unit = share.column_tile * UNITS + column, count = n - unit;
        if (count <= 0) continue;
        const f32* place = sums + row * gemm::PITCH<Engine> + (GATED ? column / 8 * 16 + column % 8 : column);
        f32 gate[CHUNK<T>], up[CHUNK<T>], value[CHUNK<T>];
        gemm::load_sums(place, gate);
        if (GATED) gemm::load_sums(place + 8, up);
#pragma unroll
        for (i32 k = 0; k < CHUNK<T>; ++k) {
            if (!GATED) up[k] = 0.0f;
            if (bias != nullptr && real && k < count) {
                gate[k] += bias[order.row(unit + k)];
                if (GATED) up[k] += bias[order.row(n + unit + k)];
            }
            value[k] = activate<ACTIVATION, FAST>(gate[k], up[k], constants).value;
        }
        if (h != nullptr) {
            T* target = row_of(h, share.first + row, wide) + unit;
            gemm::store_chunk<T, Engine::ALIGNED>(target, count, gate);
            if (GATED) gemm::store_chunk<T, Engine::ALIGNED>(target + n, count, up);
        }
        if (real) gemm::store_chunk<T, Engine::ALIGNED>(row_of(a, share.first + row, n) + unit, count, value);
    }
}

template <class Engine, class T>
__device__ __forceinline__ void up(T* __restrict__ h, T* __restrict__ a, const T* __restrict__ x, i64 x_stride,
                                   const i32* __restrict__ row_token, const i32* __restrict__ offsets,
                                   const i32* __restrict__ schedule, const T* __restrict__ weight, i64 expert_stride,
                                   i64 row_stride, const f32* __restrict__ bias, i64 d, i64 n, i32 experts,
                                   i32 activation, i32 interleaved, f32 alpha, f32 limit) {
    const bool gated = is_gated(activation);
    const i32 units = gated ? Engine::COLUMNS / 2 : Engine::COLUMNS;
    const Share share(schedule, offsets, (n + units - 1) / units);
    if (share.expert < 0) return;  // the same for all threads of a block
    const bool real = share.expert < experts;
    if (!real && h == nullptr) return;
    const GateUp order{n, interleaved != 0};

    gemm::Along<Engine, TILE> left(x, x_stride, d, [&](i32 row) -> i64 {
        return row < share.rows ? row_token[share.first + row] : -1;
    });
    gemm::Along<Engine, Engine::COLUMNS> right(row_of(weight, real ? share.expert : 0, expert_stride), row_stride, d,
                                  [&](i32 column) -> i64 {
        const i64 unit = share.column_tile * units + (gated ? column / 16 * 8 + column % 8 : column);
        if (unit >= n) return -1;
        return order.row(gated && column % 16 >= 8 ? n + unit : unit);
    });
    const f32* sums = gemm::multiply<Engine>(left, right, real ? d : 0, share.rows);
    const f32* own_bias = bias == nullptr || !real ? nullptr : row_of(bias, share.expert, gated ? 2 * n : n);
    with_activation(activation, [&](auto chosen) {
        finish_up<Engine, decltype(chosen)::value>(h, a, sums, own_bias, share, real, order, {alpha, limit});
    });
}

// ACROSS: the weight's rows lie along the summed axis, in the order of gates and ups that `units` and `interleaved` say.
template <class Engine, bool ACROSS, class T>
__device__ __forceinline__ void linear(T* __restrict__ out, const T* __restrict__ in,
                                       const i32* __restrict__ offsets, const i32* __restrict__ schedule,
                                       const T* __restrict__ weight, i64 expert_stride, i64 row_stride,
                                       const f32* __restrict__ bias, i64 depth, i64 columns, i32 experts, i64 units,
                                       i32 interleaved) {
    const Share share(schedule, offsets, (columns + Engine::COLUMNS - 1) / Engine::COLUMNS);
    if (share.expert < 0 || share.expert >= experts) return;  // the same for all threads of a block
    const i64 first_column = share.column_tile * Engine::COLUMNS;
    const T* own = row_of(weight, share.expert, expert_stride);

    gemm::Along<Engine, TILE> left(in, depth, depth,
                                 [&](i32 row) -> i64 { return row < share.rows ? share.first + row : -1; });
    const f32* sums;
    if constexpr (ACROSS) {
        const GateUp order{units, interleaved != 0};
        const auto place = [=](i64 row) -> i64 { return order.row(row); };
        gemm::Across<Engine, Engine::COLUMNS, decltype(place)> right(own, row_stride, depth, first_column, columns, place);
        sums = gemm::multiply<Engine>(left, right, depth, share.rows);
    } else {
        gemm::Along<Engine, Engine::COLUMNS> right(own, row_stride, depth, [&](i32 column) -> i64 {
            return first_column + column < columns ? first_column + column : -1;
        });
        sums = gemm::multiply<Engine>(left, right, depth, share.rows);
    }
    constexpr i32 PER_ROW = Engine::COLUMNS / CHUNK<T>;
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < share.rows * PER_ROW; i += THREADS) {
        const i64 column = first_column + i % PER_ROW * CHUNK<T>, count = columns - column;
        if (count <= 0) continue;
        f32 value[CHUNK<T>];
        gemm::load_sums(sums + i / PER_ROW * gemm::PITCH<Engine> + i % PER_ROW * CHUNK<T>, value);
        if (bias != nullptr) {
            const f32* own_bias = row_of(bias, share.expert, columns) + column;
#pragma unroll
            for (i32 k = 0; k < CHUNK<T>; ++k) value[k] += k < count ? own_bias[k] : 0.0f;
        }
        gemm::store_chunk<T, Engine::ALIGNED>(row_of(out, share.first + i / PER_ROW, columns) + column, count, value);
    }
}

template <class Engine, i32 ACTIVATION, class T>
__device__ __forceinline__ void finish_down_gradient(T* __restrict__ dh, T* __restrict__ scaled,
                                                     f32* __restrict__ partial, const f32* sums,
                                                     const T* __restrict__ h, const i32* __restrict__ row_pair,
                                                     const f32* __restrict__ scores, const Share& share, i64 n,
                                                     i64 tiles, Constants constants) {
    constexpr bool GATED = ACTIVATION <= SWIGLU_CLAMPED, FAST = sizeof(T) == 2;
    constexpr i32 PER_ROW = Engine::COLUMNS / CHUNK<T>;
    const i64 wide = GATED ? 2 * n : n;
    // Whole tiles, because all lanes meet at the sum; rows and columns that do not exist add 0 and store nothing.
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < TILE * PER_ROW; i += THREADS) {
        const i32 row = i / PER_ROW, column = i % PER_ROW * CHUNK<T>;
        const i64 unit = share.column_tile * Engine::COLUMNS + column, count = row < share.rows ? n - unit : 0;
        const i64 place = share.first + row;
        f32 dot = 0.0f;
        if (count > 0) {
            f32 gate[CHUNK<T>], up[CHUNK<T>], grad[CHUNK<T>], value[CHUNK<T>];
            const T* source = row_of(h, place, wide) + unit;
            gemm::load_chunk<T, Engine::ALIGNED>(source, count, gate);
            if (GATED) gemm::load_chunk<T, Engine::ALIGNED>(source + n, count, up);
            gemm::load_sums(sums + row * gemm::PITCH<Engine> + column, grad);
            const f32 score = scores[row_pair[place]];
#pragma unroll
            for (i32 k = 0; k < CHUNK<T>; ++k) {
                const Slopes s = activate<ACTIVATION, FAST>(gate[k], GATED ? up[k] : 0.0f, constants);
                if (k < count) dot = fmaf(grad[k], s.value, dot);
                gate[k] = score * grad[k] * s.gate;
                if (GATED) up[k] = score * grad[k] * s.up;
                value[k] = score * s.value;
            }
            if (dh != nullptr) {
                T* target = row_of(dh, place, wide) + unit;
                gemm::store_chunk<T, Engine::ALIGNED>(target, count, gate);
                if (GATED) gemm::store_chunk<T, Engine::ALIGNED>(target + n, count, up);
            }
            if (scaled != nullptr) gemm::store_chunk<T, Engine::ALIGNED>(row_of(scaled, place, n) + unit, count, value);
        }
        if (partial != nullptr) {
            dot = group_sum<PER_ROW>(dot);
            if (column == 0 && row < share.rows) row_of(partial, place, tiles)[share.column_tile] = dot;
        }
    }
}

template <class Engine, class T>
__device__ __forceinline__ void down_gradient(T* __restrict__ dh, T* __restrict__ scaled, f32* __restrict__ partial,
                                              const T* __restrict__ grad, i64 grad_stride, const T* __restrict__ h,
                                              const i32* __restrict__ row_token, const i32* __restrict__ row_pair,
                                              const f32* __restrict__ scores, const i32* __restrict__ offsets,
                                              const i32* __restrict__ schedule, const T* __restrict__ weight,
                                              i64 expert_stride, i64 row_stride, i64 d, i64 n, i32 experts,
                                              i32 activation, f32 alpha, f32 limit) {
    const i64 tiles = (n + Engine::COLUMNS - 1) / Engine::COLUMNS;
    const Share share(schedule, offsets, tiles);
    if (share.expert < 0 || share.expert >= experts) return;  // the same for all threads of a block

    gemm::Along<Engine, TILE> left(grad, grad_stride, d, [&](i32 row) -> i64 {
        return row < share.rows ? row_token[share.first + row] : -1;
    });
    const auto same = [](i64 row) -> i64 { return row; };
    gemm::Across<Engine, Engine::COLUMNS, decltype(same)> right(row_of(weight, share.expert, expert_stride), row_stride, d,
                                                   share.column_tile * Engine::COLUMNS, n, same);
    const f32* sums = gemm::multiply<Engine>(left, right, d, share.rows);
    with_activation(activation, [&](auto chosen) {
        finish_down_gradient<Engine, decltype(chosen)::value>(dh, scaled, partial, sums, h, row_pair, scores,
                                                                  share, n, tiles, {alpha, limit});
    });
}

}  // namespace moe
}  // namespace tilewise

#define INSTANTIATE_MOE_UP(NAME, TYPE, ENGINE)                                                                        \
    extern "C" __global__ void __launch_bounds__(256, tilewise::gemm::ENGINE::BLOCKS)                                 \
        NAME(TYPE* h, TYPE* a, const TYPE* x, long long x_stride, const int* row_token, const int* offsets,           \
             const int* schedule, const TYPE* weight, long long expert_stride, long long row_stride,                  \
             const float* bias, long long d, long long n, int experts, int activation, int interleaved, float alpha,  \
             float limit) {                                                                                           \
        tilewise::moe::up<tilewise::gemm::ENGINE>(h, a, x, x_stride, row_token, offsets, schedule, weight, expert_stride,\
                                         row_stride, bias, d, n, experts, activation, interleaved, alpha, limit);     \
    }

#define INSTANTIATE_MOE_LINEAR(NAME, TYPE, ENGINE, ACROSS)                                                            \
    extern "C" __global__ void __launch_bounds__(256, tilewise::gemm::ENGINE::BLOCKS)                                 \
        NAME(TYPE* out, const TYPE* in, const int* offsets, const int* schedule, const TYPE* weight,                  \
             long long expert_stride, long long row_stride, const float* bias, long long depth, long long columns,    \
             int experts, long long units, int interleaved) {                                                         \
        tilewise::moe::linear<tilewise::gemm::ENGINE, ACROSS>(out, in, offsets, schedule, weight, expert_stride, row_stride,\
                                                     bias, depth, columns, experts, units, interleaved);              \
    }

#define INSTANTIATE_MOE_DOWN_GRADIENT(NAME, TYPE, ENGINE)                                                             \
    extern "C" __global__ void __launch_bounds__(256, tilewise::gemm::ENGINE::BLOCKS)                                 \
        NAME(TYPE* dh, TYPE* scaled, float* partial, const TYPE* grad, long long grad_stride, const TYPE* h,          \
             const int* row_token, const int* row_pair, const float* scores, const int* offsets, const int* schedule, \
             const TYPE* weight, long long expert_stride, long long row_stride, long long d, long long n,             \
             int experts, int activation, float alpha, float limit) {                                                 \
        tilewise::moe::down_gradient<tilewise::gemm::ENGINE>(dh, scaled, partial, grad, grad_stride, h, row_token, row_pair,\
                                                    scores, offsets, schedule, weight, expert_stride, row_stride, d,  \
                                                    n, experts, activation, alpha, limit);                            \
    }
