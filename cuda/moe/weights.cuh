// Products along an expert's rows: out_e = sum over rows r of e of left[r] (outer) right[r].
//
//   dW1_e = sum of dH[r] (outer) X[token of r]          left plain, right gathered; rows of dW1 in gate_up's order
//   dW2_e = sum of dO[token of r] (outer) A'[r]         left gathered, right plain
//
// For each expert, for each tile of 128 rows and 128 columns (256 for warpgroups): one block forms the tile (gemm/product.cuh) over all rows of the expert
// and stores it. An expert without rows has nothing to sum, and its block stores zeros.
//
// Departures:
//   1. Both operands lie across the summed axis; the gather happens where a row is copied, so no gathered copy exists.
//   2. A tile's sum is never split, so it has one order. An expert with most of the rows is then the last to finish.
#pragma once

#include "../common/index.cuh"
#include "../common/types.cuh"
#include "../gemm/chunk.cuh"
#include "../gemm/product.cuh"
#include "../gemm/warpgroup.cuh"
#include "activation.cuh"

namespace tilewise {
namespace moe {

// Row r of an expert that starts at `first`: row first + r, or the one that a map names for it.
struct ExpertRow {
    const i32* map;
    i64 first;

    __device__ __forceinline__ i64 operator()(i64 row) const {
        return map == nullptr ? first + row : static_cast<i64>(map[first + row]);
    }
};

template <class Engine, class T>
__device__ __forceinline__ void weight_gradient(T* __restrict__ out, const T* __restrict__ left, i64 left_stride,
                                                const i32* __restrict__ left_map, const T* __restrict__ right,
                                                i64 right_stride, const i32* __restrict__ right_map,
                                                const i32* __restrict__ offsets, i64 rows, i64 columns, i64 units,
                                                i32 interleaved) {
    using gemm::CHUNK;
    using gemm::TILE;
    const i64 across = (columns + Engine::COLUMNS - 1) / Engine::COLUMNS, down = (rows + TILE - 1) / TILE;
    const i64 expert = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
    const i64 first_row = tile / across * TILE, first_column = tile % across * Engine::COLUMNS;
    const i64 first = offsets[expert], depth = offsets[expert + 1] - first;

    gemm::Across<Engine, TILE, ExpertRow> a(left, left_stride, depth, first_row, rows, {left_map, first});
    gemm::Across<Engine, Engine::COLUMNS, ExpertRow> b(right, right_stride, depth, first_column, columns, {right_map, first});
    const f32* sums = gemm::multiply<Engine>(a, b, depth, rows - first_row);

    constexpr i32 PER_ROW = Engine::COLUMNS / CHUNK<T>;
    const GateUp order{units, interleaved != 0};
    T* own = row_of(out, expert, rows * columns);
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < TILE * PER_ROW; i += gemm::THREADS) {
        const i64 row = first_row + i / PER_ROW;
        const i64 column = first_column + i % PER_ROW * CHUNK<T>, count = columns - column;
        if (row >= rows || count <= 0) continue;
        f32 value[CHUNK<T>];
        gemm::load_sums(sums + i / PER_ROW * gemm::PITCH<Engine> + i % PER_ROW * CHUNK<T>, value);
        gemm::store_chunk<T, Engine::ALIGNED>(row_of(own, order.row(row), columns) + column, count, value);
    }
}

}  // namespace moe
}  // namespace tilewise

#define INSTANTIATE_MOE_WEIGHT_GRADIENT(NAME, TYPE, ENGINE)                                                           \
    extern "C" __global__ void __launch_bounds__(256, tilewise::gemm::ENGINE::BLOCKS)                                 \
        NAME(TYPE* out, const TYPE* left, long long left_stride, const int* left_map, const TYPE* right,              \
             long long right_stride, const int* right_map, const int* offsets, long long rows, long long columns,     \
             long long units, int interleaved) {                                                                      \
        tilewise::moe::weight_gradient<tilewise::gemm::ENGINE>(out, left, left_stride, left_map, right, right_stride, \
                                                      right_map, offsets, rows, columns, units, interleaved);         \
    }
