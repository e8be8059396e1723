// Each token gathers the rows of its experts and adds them up.
#pragma once

#include "../common/index.cuh"
#include "../common/packet.cuh"
#include "../common/types.cuh"

namespace tilewise {
namespace moe {

// out[t] = sum over k of weights[t, k] * y[rows[t, k]], in f32 with one rounding at the end. Threads of a block:
// packets of one token along x, tokens along y; the grid: tokens along x, column ranges along y.
//
//   for each token, for each column:
//       sum = 0
//       for k = 0 .. top_k - 1:                 in this order, so runs agree bit for bit
//           r = rows[t, k]
//           if r < 0: continue                  a sentinel
//           sum += weights[t, k] * y[r]
//       out[t] = round(sum)
//
// Departures:
//   1. A thread owns WIDTH neighbouring columns: one 16-byte load a row where alignment allows.
//   2. Rows come in batches of four: four loads are under way before the first is added. The order of additions
//      does not change.
//   3. A skipped row adds 0 * 0 instead of branching around the addition; neither its weight nor y is read into it.
//   4. A row at or past `y_rows` is a bug of the caller. It is never read: it makes the token NaN.
//   5. No weights (a null pointer) means ones: the backward pass sums input gradients so.
//   6. `starts` [tokens + 1] gives every token its own number of rows: pairs starts[t] .. starts[t + 1] are token t's.
//      Without it (a null pointer) every token has top_k.
template <class T, i32 WIDTH>
__device__ __forceinline__ void aggregate(T* __restrict__ out, i64 out_stride, const T* __restrict__ y, i64 y_stride,
                                          i64 y_rows, const i32* __restrict__ rows, const f32* __restrict__ weights,
                                          const i32* __restrict__ starts, i64 tokens, i32 top_k, i64 columns) {
    constexpr i32 BATCH = 4;
    const i64 token = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= tokens) return;
    const i64 first = starts == nullptr ? token * top_k : starts[token];
    const i32 pairs = starts == nullptr ? top_k : starts[token + 1] - starts[token];
    const i32* token_rows = rows + first;
    const f32* token_weights = weights == nullptr ? nullptr : weights + first;
    const i64 step = static_cast<i64>(gridDim.y) * blockDim.x * WIDTH;
    const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
    for (i64 column = start; column < columns; column += step) {
        f32 sum[WIDTH];
#pragma unroll
        for (i32 i = 0; i < WIDTH; ++i) sum[i] = 0.0f;
        for (i32 k = 0; k < pairs; k += BATCH) {
            Packet<T, WIDTH> packet[BATCH];
            f32 weight[BATCH];
#pragma unroll
            for (i32 b = 0; b < BATCH; ++b) {
                const i32 row = k + b < pairs ? token_rows[k + b] : -1;
                packet[b].clear();
                weight[b] = 0.0f;
                if (row >= y_rows) {
                    weight[b] = not_a_number();
                } else if (row >= 0) {
                    packet[b].load_once(row_of(y, row, y_stride) + column);
                    weight[b] = token_weights == nullptr ? 1.0f : token_weights[k + b];
                }
            }
#pragma unroll
            for (i32 b = 0; b < BATCH; ++b) {
#pragma unroll
                for (i32 i = 0; i < WIDTH; ++i) sum[i] = fmaf(weight[b], to_f32(packet[b].element[i]), sum[i]);
            }
        }
        Packet<T, WIDTH> result;
#pragma unroll
        for (i32 i = 0; i < WIDTH; ++i) result.element[i] = from_f32<T>(sum[i]);
        result.store(row_of(out, token, out_stride) + column);
    }
}

}  // namespace moe
}  // namespace tilewise

// The parameters stand here, beside the code they belong to; a stub only names, types and sizes.
#define INSTANTIATE_MOE_AGGREGATE(NAME, TYPE, WIDTH, THREADS)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(TYPE* out, long long out_stride, const TYPE* y, long long y_stride, long long y_rows, const int* rows,   \
             const float* weights, const int* starts, long long tokens, int top_k, long long columns) {               \
        tilewise::moe::aggregate<TYPE, WIDTH>(out, out_stride, y, y_stride, y_rows, rows, weights, starts, tokens,    \
                                              top_k, columns);                                                        \
    }
