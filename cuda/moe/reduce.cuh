// Gradients of scores and of biases: sums in one fixed order, in f32.
#pragma once

#include "../common/block.cuh"
#include "../common/index.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "activation.cuh"

namespace tilewise {
namespace moe {

// out[pair] = sum of partial[row of pair, :] + <dO[token of row], b2 of its expert>; 0 for a sentinel. A warp a pair.
template <class T, class I, i32 WARPS>
__device__ __forceinline__ void score_gradient(f32* __restrict__ out, const f32* __restrict__ partial, i64 tiles,
                                               const i32* __restrict__ pair_row, const i32* __restrict__ row_token,
                                               const I* __restrict__ ids, const T* __restrict__ grad, i64 grad_stride,
                                               const f32* __restrict__ bias, i64 pairs, i64 d) {
    const i32 lane = lane_id();
    const i64 pair = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (pair >= pairs) return;  // the same for all lanes of a warp
    const i64 row = pair_row[pair];
    f32 sum = 0.0f;
    if (row >= 0) {
        for (i64 tile = lane; tile < tiles; tile += WARP) sum += row_of(partial, row, tiles)[tile];
        if (bias != nullptr) {
            const T* gradient = row_of(grad, row_token[row], grad_stride);
            const f32* own_bias = row_of(bias, ids[pair], d);
            for (i64 column = lane; column < d; column += WARP) {
                sum = fmaf(to_f32(gradient[column]), own_bias[column], sum);
            }
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) out[pair] = sum;
}

// out[e, c] = sum over rows r of e of scale[pair of r] * in[r or its token, c], rounded once. A block does 32 columns of
// an expert, its warp w the rows w, w + WARPS, ...; then the warps' sums are added in their order.
template <class T, i32 WARPS>
__device__ __forceinline__ void bias_gradient(T* __restrict__ out, const T* __restrict__ in, i64 stride,
                                              const i32* __restrict__ map, const i32* __restrict__ row_pair,
                                              const f32* __restrict__ scale, const i32* __restrict__ offsets,
                                              i64 columns, i64 units, i32 interleaved) {
    __shared__ f32 sums[WARPS][WARP];
    const i32 lane = lane_id(), warp = static_cast<i32>(threadIdx.x) / WARP;
    const i64 tiles = (columns + WARP - 1) / WARP;
    const i64 expert = blockIdx.x / tiles, column = blockIdx.x % tiles * WARP + lane;
    const i64 first = offsets[expert], last = offsets[expert + 1];
    f32 sum = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (i64 row = first + warp; row < last; row += WARPS) {
            const i64 source = map == nullptr ? row : map[row];
            const f32 factor = scale == nullptr ? 1.0f : scale[row_pair[row]];
            sum = fmaf(factor, to_f32(row_of(in, source, stride)[column]), sum);
        }
    }
    sums[warp][lane] = sum;
    block_barrier();
    if (warp > 0 || column >= columns) return;
    for (i32 other = 1; other < WARPS; ++other) sum += sums[other][lane];
    row_of(out, expert, columns)[GateUp{units, interleaved != 0}.row(column)] = from_f32<T>(sum);
}

}  // namespace moe
}  // namespace tilewise

#define INSTANTIATE_MOE_SCORE_GRADIENT(NAME, TYPE, INDEX, WARPS)                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(float* out, const float* partial, long long tiles, const int* pair_row, const int* row_token,            \
             const INDEX* ids, const TYPE* grad, long long grad_stride, const float* bias, long long pairs,           \
             long long d) {                                                                                           \
        tilewise::moe::score_gradient<TYPE, INDEX, WARPS>(out, partial, tiles, pair_row, row_token, ids, grad,        \
                                                          grad_stride, bias, pairs, d);                               \
    }

#define INSTANTIATE_MOE_BIAS_GRADIENT(NAME, TYPE, WARPS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(TYPE* out, const TYPE* in, long long stride, const int* map, const int* row_pair, const float* scale,    \
             const int* offsets, long long columns, long long units, int interleaved) {                               \
        tilewise::moe::bias_gradient<TYPE, WARPS>(out, in, stride, map, row_pair, scale, offsets, columns, units,     \
                                                  interleaved);                                                       \
    }
