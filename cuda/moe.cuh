// The moe room on the device: choose experts (route), add their outputs up (aggregate).
//
// Templates over raw pointers. A kernel is one INSTANTIATE_MOE_* line of a stub, which names an instantiation.
#pragma once

#include "common/index.cuh"
#include "common/order.cuh"
#include "common/packet.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

namespace tilewise {
namespace moe {

enum Scoring : i32 { SOFTMAX_TOPK = 0, SOFTMAX = 1, SIGMOID = 2 };

constexpr i32 GROUP = 8;  // slots of a lane that share one "best"

// exp(x - top) that is 1 at the top even if that is infinite: a row of -inf shares evenly, +inf takes all.
__device__ __forceinline__ f32 exponential(f32 x, f32 top) { return x == top ? 1.0f : expf(x - top); }

// The sigmoid of x, relatively exact on both sides; where x < 0, times exp(-shift).
__device__ __forceinline__ f32 sigmoid(f32 x, f32 shift = 0.0f) {
    return x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : expf(x - shift) / (1.0f + expf(x));
}

struct Best {
    u32 key;
    i32 slot;
};

// Strictly larger wins: of equal keys the earlier slot, which is the lower expert, stays.
__device__ __forceinline__ Best best_of_group(const u32 (*key)[WARP], i32 group, i32 lane) {
    Best best{key[group * GROUP][lane], group * GROUP};
#pragma unroll
    for (i32 slot = group * GROUP + 1; slot < (group + 1) * GROUP; ++slot) {
        const u32 other = key[slot][lane];
        if (other > best.key) best = Best{other, slot};
    }
    return best;
}

// Chooses `top_k` experts for each row of logits [tokens, experts] and weighs them. top_k <= 64 (two results a lane),
// experts <= GROUPS * 256; a block is WARPS * 32 threads and does WARPS rows.
//
//   for each row:
//       score  = logit | softmax(row) | sigmoid(logit)           by `scoring`
//       choice = score + bias                                    a bias comes with the sigmoid alone
//       repeat top_k times:
//           e = the expert not yet taken with the largest choice (ties: lower e; NaN ranks last)
//           take e
//       weight = softmax(taken logits) | score[taken] | score[taken] / sum(score[taken])
//       write taken, weight * scale
//
// Departures, each for speed, none for less exactness:
//   1. One warp a row. Lane l looks after experts l, l + 32, l + 64, ... ("slots"), so reads coalesce for every
//      alignment and every number of experts.
//   2. Choices become order keys once (common/order.cuh). The best of a warp is then two integer reductions: the
//      largest key, then the lowest expert among the lanes that hold it. Nothing is packed into mantissa bits.
//   3. Without a bias the key is the logit's: softmax and sigmoid rise with it, so no tie arises from their rounding.
//   4. A lane's keys lie in its own column of shared memory: no bank conflict, no barrier, and they can be indexed,
//      which registers cannot. What every step reads, the best of each group of eight slots, is in registers. A step
//      changes one group of one lane, so it costs GROUP + GROUPS comparisons instead of one for each slot.
//   5. Only the taken expert's number is carried. Lane k reads the logit of the k-th again (the row is in a cache),
//      so weights come from exact logits.
//   6. A softmax over all experts that is renormalised is computed over the taken logits, and a renormalised sigmoid
//      is scaled by its largest logit: the same values, and they survive where every score underflows.
template <class T, i32 GROUPS, i32 WARPS>
__device__ __forceinline__ void route(i32* __restrict__ ids, f32* __restrict__ weights, const T* __restrict__ logits,
                                      i64 stride, const f32* __restrict__ bias, i64 tokens, i32 experts, i32 top_k,
                                      i32 scoring, i32 renormalise, f32 scale) {
    __shared__ u32 keys[WARPS][GROUPS * GROUP][WARP];

    const i32 warp = static_cast<i32>(threadIdx.x) / WARP, lane = lane_id();
    const i64 token = static_cast<i64>(blockIdx.x) * WARPS + warp;
    if (token >= tokens) return;  // the same for all lanes of a warp
    const T* row = row_of(logits, token, stride);
    u32(*key)[WARP] = keys[warp];  // key[slot][lane]

    f32 row_top = -infinity(), row_sum = 0.0f;
    if (scoring == SOFTMAX && !renormalise) {
        for (i32 expert = lane; expert < experts; expert += WARP) row_top = fmaxf(row_top, to_f32(row[expert]));
        row_top = warp_max(row_top);
        for (i32 expert = lane; expert < experts; expert += WARP) row_sum += exponential(to_f32(row[expert]), row_top);
        row_sum = warp_sum(row_sum);
    }

#pragma unroll 8
    for (i32 slot = 0; slot < GROUPS * GROUP; ++slot) {
        const i32 expert = slot * WARP + lane;
        u32 own = KEY_ABSENT;
        if (expert < experts) {
            f32 choice = to_f32(row[expert]);
            if (bias != nullptr) choice = sigmoid(choice) + bias[expert];
            own = order_key(choice);
        }
        key[slot][lane] = own;
    }
    Best best[GROUPS];
#pragma unroll
    for (i32 group = 0; group < GROUPS; ++group) best[group] = best_of_group(key, group, lane);

    u32 taken0 = 0, taken1 = 0;  // results lane and lane + 32
    for (i32 k = 0; k < top_k; ++k) {
        Best own = best[0];
#pragma unroll
        for (i32 group = 1; group < GROUPS; ++group) {
            if (best[group].key > own.key) own = best[group];
        }
        const u32 top_key = warp_max(own.key);
        const u32 expert = warp_min(own.key == top_key ? static_cast<u32>(own.slot * WARP + lane) : 0xffffffffu);
        if (k == lane) taken0 = expert;
        if (k == lane + WARP) taken1 = expert;
        if (expert % WARP != lane) continue;  // the lane it belongs to repairs its group

        key[own.slot][lane] = KEY_ABSENT;
        const i32 changed = own.slot / GROUP;
        const Best next = best_of_group(key, changed, lane);
#pragma unroll
        for (i32 group = 0; group < GROUPS; ++group) {
            if (group == changed) best[group] = next;
        }
    }

    const bool first = lane < top_k, second = lane + WARP < top_k;
    const f32 logit0 = first ? to_f32(row[taken0]) : -infinity();
    const f32 logit1 = second ? to_f32(row[taken1]) : -infinity();
    const f32 top = warp_max(fmaxf(logit0, logit1));
    f32 weight0, weight1, sum;
    if (scoring == SIGMOID) {
        const f32 shift = renormalise && top > -infinity() ? fminf(top, 0.0f) : 0.0f;
        weight0 = sigmoid(logit0, shift);
        weight1 = sigmoid(logit1, shift);
    } else {
        weight0 = exponential(logit0, scoring == SOFTMAX && !renormalise ? row_top : top);
        weight1 = exponential(logit1, scoring == SOFTMAX && !renormalise ? row_top : top);
    }
    if (scoring == SOFTMAX_TOPK || renormalise) {
        sum = warp_sum((first ? weight0 : 0.0f) + (second ? weight1 : 0.0f));
    } else {
        sum = scoring == SOFTMAX ? row_sum : 1.0f;
    }
    weight0 = sum == 0.0f ? 0.0f : weight0 / sum * scale;  // every chosen sigmoid is 0: nothing to renormalise
    weight1 = sum == 0.0f ? 0.0f : weight1 / sum * scale;
    const i64 start = token * top_k;
    if (first) {
        ids[start + lane] = static_cast<i32>(taken0);
        weights[start + lane] = weight0;
    }
    if (second) {
        ids[start + lane + WARP] = static_cast<i32>(taken1);
        weights[start + lane + WARP] = weight1;
    }
}

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
template <class T, i32 WIDTH>
__device__ __forceinline__ void aggregate(T* __restrict__ out, i64 out_stride, const T* __restrict__ y, i64 y_stride,
                                          i64 y_rows, const i32* __restrict__ rows, const f32* __restrict__ weights,
                                          i64 tokens, i32 top_k, i64 columns) {
    constexpr i32 BATCH = 4;
    const i64 token = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= tokens) return;
    const i32* token_rows = row_of(rows, token, top_k);
    const f32* token_weights = weights == nullptr ? nullptr : row_of(weights, token, top_k);
    const i64 step = static_cast<i64>(gridDim.y) * blockDim.x * WIDTH;
    const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
    for (i64 column = start; column < columns; column += step) {
        f32 sum[WIDTH];
#pragma unroll
        for (i32 i = 0; i < WIDTH; ++i) sum[i] = 0.0f;
        for (i32 k = 0; k < top_k; k += BATCH) {
            Packet<T, WIDTH> packet[BATCH];
            f32 weight[BATCH];
#pragma unroll
            for (i32 b = 0; b < BATCH; ++b) {
                const i32 row = k + b < top_k ? token_rows[k + b] : -1;
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

// Instantiations. The parameters stand here, beside the code they belong to; a stub only names, types and sizes.
#define INSTANTIATE_MOE_ROUTE(NAME, TYPE, GROUPS, WARPS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(int* ids, float* weights, const TYPE* logits, long long stride, const float* bias, long long tokens,     \
             int experts, int top_k, int scoring, int renormalise, float scale) {                                     \
        tilewise::moe::route<TYPE, GROUPS, WARPS>(ids, weights, logits, stride, bias, tokens, experts, top_k,         \
                                                  scoring, renormalise, scale);                                       \
    }

#define INSTANTIATE_MOE_AGGREGATE(NAME, TYPE, WIDTH, THREADS)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(TYPE* out, long long out_stride, const TYPE* y, long long y_stride, long long y_rows, const int* rows,   \
             const float* weights, long long tokens, int top_k, long long columns) {                                  \
        tilewise::moe::aggregate<TYPE, WIDTH>(out, out_stride, y, y_stride, y_rows, rows, weights, tokens, top_k,     \
                                              columns);                                                               \
    }
