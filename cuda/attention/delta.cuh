// What the backward pass knows of a row beforehand, and the sinks' gradients.
//
//   delta = sum over columns of out * grad_out - grad_lse        (one warp a row)
//   grad_sinks[h] = - sum over rows of e^(sink - lse) * delta    (one block a head, rows in a fixed order)
//
// A row that sees nothing, not even a sink, has lse = -inf and adds nothing.
#pragma once

#include "../common/block.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "problem.cuh"

namespace tilewise {
namespace attention {

template <class T, i32 WARPS> __device__ __forceinline__ void row_deltas(const Problem& p) {
    const i64 row = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (row >= p.batches * p.query_heads * p.queries) return;  // the same for all lanes of a warp
    const i64 query = row % p.queries, head = row / p.queries % p.query_heads, batch = row / p.queries / p.query_heads;
    const T* out = static_cast<const T*>(p.out) + batch * p.out_at.batch + head * p.out_at.head + query * p.out_at.row;
    const T* grad = static_cast<const T*>(p.grad_out) + batch * p.grad_out_at.batch + head * p.grad_out_at.head +
                    query * p.grad_out_at.row;
    f32 sum = 0.0f;
    for (i32 column = lane_id(); column < p.value_width; column += WARP) {
        sum = fmaf(to_f32(out[column]), to_f32(grad[column]), sum);
    }
    sum = warp_sum(sum);
    if (p.grad_lse != nullptr) sum -= p.grad_lse[batch * p.grad_lse_at.batch + head * p.grad_lse_at.head + query * p.grad_lse_at.row];
    if (lane_id() == 0) p.delta[row] = sum;
}

template <i32 WARPS> __device__ __forceinline__ void sink_gradient(const Problem& p) {
    const i32 head = static_cast<i32>(blockIdx.x), warp = static_cast<i32>(threadIdx.x) / WARP;
    const f32 sink = p.sinks[head];
    const i64 sequences = p.sequences == nullptr ? p.batches : p.sequence_count;
    f32 sum = 0.0f;
    for (i64 n = 0; n < sequences; ++n) {
        const Sequence sequence(p, n);
        for (i32 query = static_cast<i32>(threadIdx.x); query < sequence.queries; query += WARPS * WARP) {
            const f32 lse = p.lse[query_place(p.lse_at, sequence, head, query)];
            const f32 delta = p.delta[(sequence.query_batch * p.query_heads + head) * p.queries + sequence.query_start + query];
            const f32 share = lse == -infinity() ? 0.0f : expf(sink - lse);
            if (share != 0.0f) sum = fmaf(-share, delta, sum);
        }
    }
    sum = warp_sum(sum);
    f32* const sums = reinterpret_cast<f32*>(dynamic_shared());
    if (lane_id() == 0) sums[warp] = sum;
    block_barrier();
    if (threadIdx.x == 0) {
        f32 total = 0.0f;
        for (i32 w = 0; w < WARPS; ++w) total += sums[w];
        p.grad_sinks[head] = total;
    }
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_DELTA(NAME, TYPE, WARPS)                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(const __grid_constant__ tilewise::attention::Problem problem) {                                          \
        tilewise::attention::row_deltas<TYPE, WARPS>(problem);                                                        \
    }

#define INSTANTIATE_ATTENTION_SINK_GRADIENT(NAME, WARPS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(const __grid_constant__ tilewise::attention::Problem problem) {                                          \
        tilewise::attention::sink_gradient<WARPS>(problem);                                                           \
    }
