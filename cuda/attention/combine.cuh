// The parts of a row put together: each part has its own quotient and lse, over its keys alone.
//
//   peak = max over parts of lse (and the sink);  weight = e^(lse - peak)
//   out = sum of weight * part / sum of weight;  lse = peak + ln(sum of weight)
//
// A sink takes part in the sum of weights, with no value. One warp a row, parts in order: equal inputs, equal bits.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "problem.cuh"

namespace tilewise {
namespace attention {

template <class T, i32 WARPS> __device__ __forceinline__ void combine(const Problem& p) {
    const i64 index = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (index >= p.batches * p.queries * p.query_heads) return;  // the same for all lanes of a warp
    const i32 head = static_cast<i32>(index % p.query_heads), lane = lane_id();
    i64 query = index / p.query_heads, number = 0;
    if (p.sequences == nullptr) {
        number = query / p.queries;
        query %= p.queries;
    } else {
        for (; number < p.sequence_count && query >= p.sequences[number * 6 + 2]; ++number) query -= p.sequences[number * 6 + 2];
        if (number == p.sequence_count) return;
    }
    const Sequence sequence(p, number);
    const i64 parts = p.batches * p.query_heads * p.queries;
    const i64 row = (sequence.query_batch * p.query_heads + head) * p.queries + sequence.query_start + query;
    const f32 sink = p.sinks == nullptr ? -infinity() : p.sinks[head];

    f32 peak = sink;
    for (i64 s = lane; s < p.splits; s += WARP) peak = fmaxf(peak, p.partial_lse[s * parts + row]);
    peak = warp_max(peak);
    const f32 safe = peak == -infinity() ? 0.0f : peak;
    f32 sum = 0.0f;
    for (i64 s = lane; s < p.splits; s += WARP) sum += expf(p.partial_lse[s * parts + row] - safe);
    sum = warp_sum(sum) + expf(sink - safe);
    const f32 quotient = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (lane == 0) p.lse[query_place(p.lse_at, sequence, head, static_cast<i32>(query))] = sum == 0.0f ? -infinity() : peak + logf(sum);

    T* target = static_cast<T*>(p.out) + query_place(p.out_at, sequence, head, static_cast<i32>(query));
    for (i32 column = lane; column < p.value_width; column += WARP) {
        f32 value = 0.0f;
        for (i64 s = 0; s < p.splits; ++s) {
            const f32 weight = expf(p.partial_lse[s * parts + row] - safe);
            if (weight != 0.0f) value = fmaf(weight, p.partial[(s * parts + row) * p.value_width + column], value);
        }
        target[column] = from_f32<T>(value * quotient);
    }
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_COMBINE(NAME, TYPE, WARPS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(const __grid_constant__ tilewise::attention::Problem problem) {                                          \
        tilewise::attention::combine<TYPE, WARPS>(problem);                                                           \
    }
