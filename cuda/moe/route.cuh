// Routers: which experts a token goes to, and with what weight.
#pragma once

#include "../common/index.cuh"
#include "../common/order.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"

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

// Of a row: its largest logit, and the sum of exponentials against it.
struct RowSum {
    f32 top, sum;
};

template <class T> __device__ __forceinline__ RowSum sum_of_row(const T* row, i32 experts) {
    RowSum all{-infinity(), 0.0f};
    for (i32 expert = lane_id(); expert < experts; expert += WARP) all.top = fmaxf(all.top, to_f32(row[expert]));
    all.top = warp_max(all.top);
    for (i32 expert = lane_id(); expert < experts; expert += WARP) all.sum += exponential(to_f32(row[expert]), all.top);
    all.sum = warp_sum(all.sum);
    return all;
}

// Weights of the taken experts before `scale`. A lane has two, the lane-th and the (lane + 32)-th, if they exist.
struct Weights {
    f32 first, second;
};

__device__ __forceinline__ Weights weigh(f32 logit0, f32 logit1, bool first, bool second, i32 scoring, bool renormalise,
                                         RowSum all) {
    const f32 top = warp_max(fmaxf(logit0, logit1));
    f32 weight0, weight1, sum;
    if (scoring == SIGMOID) {
        const f32 shift = renormalise && top > -infinity() ? fminf(top, 0.0f) : 0.0f;
        weight0 = sigmoid(logit0, shift);
        weight1 = sigmoid(logit1, shift);
    } else {
        weight0 = exponential(logit0, scoring == SOFTMAX && !renormalise ? all.top : top);
        weight1 = exponential(logit1, scoring == SOFTMAX && !renormalise ? all.top : top);
    }
    if (scoring == SOFTMAX_TOPK || renormalise) {
        sum = warp_sum((first ? weight0 : 0.0f) + (second ? weight1 : 0.0f));
    } else {
        sum = scoring == SOFTMAX ? all.sum : 1.0f;
    }
    if (sum == 0.0f) return {0.0f, 0.0f};  // every chosen sigmoid is 0: nothing to renormalise
    return {weight0 / sum, weight1 / sum};
}

// Bits of the `top_groups` of at most 32 groups whose two largest choices have the largest sums (a group of one: its one
// choice); ties to the lower group, NaN is passed over.
template <class Choice>
__device__ __forceinline__ u32 open_groups(const Choice& choice, i32 groups, i32 top_groups, i32 size) {
    const i32 lane = lane_id();
    u32 key = KEY_ABSENT;  // of group number `lane`
    for (i32 group = 0; group < groups; ++group) {
        f32 best = -infinity(), next = -infinity();
        for (i32 member = lane; member < size; member += WARP) {
            const f32 own = choice(group * size + member);
            if (own > best) {
                next = best;
                best = own;
            } else if (own > next) {
                next = own;
            }
        }
        const f32 top = warp_max(best);
        const u32 holder = warp_min(best == top ? static_cast<u32>(lane) : 32u);
        const f32 second = warp_max(holder == lane ? next : best);
        if (group == lane) key = order_key(size > 1 ? top + second : top);
    }
    u32 open = 0;
    for (i32 taken = 0; taken < top_groups; ++taken) {
        const u32 top_key = warp_max(key);
        const u32 group = warp_min(key == top_key ? static_cast<u32>(lane) : 32u);
        open |= 1u << group;
        if (group == lane) key = KEY_ABSENT;
    }
    return open;
}

// Chooses `top_k` experts for each row of logits [tokens, experts] and weighs them. top_k <= 64 (two results a lane),
// experts <= GROUPS * 256; a block is WARPS * 32 threads and does WARPS rows.
//
//   for each row:
//       score  = logit | softmax(row) | sigmoid(logit)           by `scoring`
//       choice = score + bias                                    a bias and groups come with the sigmoid alone
//       close all groups of experts but the best top_groups      (open_groups)
//       repeat top_k times:
//           e = the open expert not yet taken with the largest choice (ties: lower e; NaN ranks last)
//           take e
//       weight = softmax(taken logits) | score[taken] | score[taken] / sum(score[taken])
//       write taken, weight * scale
//
// Departures, each for speed, none for less exactness:
//   1. One warp a row. Lane l looks after experts l, l + 32, l + 64, ... ("slots"), so reads coalesce for every
//      alignment and every number of experts.
//   2. Choices become order keys once (common/order.cuh). The best of a warp is then two integer reductions: the
//      largest key, then the lowest expert among the lanes that hold it. Nothing is packed into mantissa bits.
//   3. Without a bias or groups the key is the logit's: softmax and sigmoid rise with it, so no tie arises from their rounding.
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
                                      i32 scoring, i32 renormalise, f32 scale, i32 groups, i32 top_groups) {
    __shared__ u32 keys[WARPS][GROUPS * GROUP][WARP];

    const i32 warp = static_cast<i32>(threadIdx.x) / WARP, lane = lane_id();
    const i64 token = static_cast<i64>(blockIdx.x) * WARPS + warp;
    if (token >= tokens) return;  // the same for all lanes of a warp
    const T* row = row_of(logits, token, stride);
    u32(*key)[WARP] = keys[warp];  // key[slot][lane]

    RowSum all{-infinity(), 0.0f};
    if (scoring == SOFTMAX && !renormalise) all = sum_of_row(row, experts);

    const auto choice = [&](i32 expert) {
        const f32 logit = to_f32(row[expert]);
        return bias != nullptr ? sigmoid(logit) + bias[expert] : groups > 1 ? sigmoid(logit) : logit;
    };
#pragma unroll 8
    for (i32 slot = 0; slot < GROUPS * GROUP; ++slot) {
        const i32 expert = slot * WARP + lane;
        u32 own = KEY_ABSENT;
        if (expert < experts) own = order_key(choice(expert));
        key[slot][lane] = own;
    }
    if (top_groups < groups) {
        const i32 size = experts / groups;
        const u32 open = open_groups(choice, groups, top_groups, size);
#pragma unroll 1
        for (i32 slot = 0; slot < GROUPS * GROUP; ++slot) {
            const i32 expert = slot * WARP + lane;
            if (expert < experts && (open >> expert / size & 1) == 0) key[slot][lane] = KEY_ABSENT;
        }
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
    const Weights weight = weigh(logit0, logit1, first, second, scoring, renormalise, all);
    const i64 start = token * top_k;
    if (first) {
        ids[start + lane] = static_cast<i32>(taken0);
        weights[start + lane] = weight.first * scale;
    }
    if (second) {
        ids[start + lane + WARP] = static_cast<i32>(taken1);
        weights[start + lane + WARP] = weight.second * scale;
    }
}

// Gradient of the logits: the choice is a constant, the weights' gradients flow through their formula. A warp a row.
//
//   for each row, with g = scale * gradient of the weights, S the weights before scale, mean = sum of S_k g_k:
//       softmax over the taken, or renormalised    S_k (g_k - mean) at the taken, 0 elsewhere
//       softmax over all                           p_e (g_e - mean) everywhere, g = 0 where not taken
//       sigmoid                                    g_k s_k (1 - s_k) at the taken, 0 elsewhere
//       sigmoid, renormalised                      S_k (1 - s_k) (g_k - mean) at the taken, 0 elsewhere
//
// An id outside the row is passed over.
template <class T, i32 WARPS>
__device__ __forceinline__ void route_gradient(T* out, const T* __restrict__ logits, i64 stride,
                                               const i32* __restrict__ ids, const f32* __restrict__ grad, i64 tokens,
                                               i32 experts, i32 top_k, i32 scoring, i32 renormalise, f32 scale) {
    const i32 lane = lane_id();
    const i64 token = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (token >= tokens) return;  // the same for all lanes of a warp
    const T* row = row_of(logits, token, stride);
    const i64 start = token * top_k;
    i32 expert[2];
    bool taken[2];
    f32 logit[2], g[2];
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const i32 k = lane + i * WARP;
        expert[i] = k < top_k ? ids[start + k] : -1;
        taken[i] = expert[i] >= 0 && expert[i] < experts;
        logit[i] = taken[i] ? to_f32(row[expert[i]]) : -infinity();
        g[i] = taken[i] ? grad[start + k] * scale : 0.0f;
    }
    const bool dense = scoring == SOFTMAX && !renormalise;
    RowSum all{-infinity(), 0.0f};
    if (dense) all = sum_of_row(row, experts);
    const Weights weight = weigh(logit[0], logit[1], taken[0], taken[1], scoring, renormalise, all);
    const f32 score[2] = {taken[0] ? weight.first : 0.0f, taken[1] ? weight.second : 0.0f};
    const f32 mean = warp_sum(score[0] * g[0] + score[1] * g[1]);

    T* target = row_of(out, token, experts);
    for (i32 other = lane; other < experts; other += WARP) {
        const f32 p = dense ? exponential(to_f32(row[other]), all.top) / all.sum : 0.0f;
        target[other] = from_f32<T>(-p * mean);
    }
    warp_barrier();  // the values of the taken come last
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        if (!taken[i]) continue;
        const f32 centred = scoring == SIGMOID && !renormalise ? g[i] : g[i] - mean;
        const f32 against = scoring == SIGMOID ? sigmoid(-logit[i]) : 1.0f;  // 1 - s, without cancellation
        target[expert[i]] = from_f32<T>(score[i] * against * centred);
    }
}

}  // namespace moe
}  // namespace tilewise

// The parameters stand here, beside the code they belong to; a stub only names, types and sizes.
// 32 warps a multiprocessor leave 64 registers a thread: left alone, the assembler aims at more warps and spills.
#define INSTANTIATE_MOE_ROUTE(NAME, TYPE, GROUPS, WARPS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 32 / WARPS)                                              \
        NAME(int* ids, float* weights, const TYPE* logits, long long stride, const float* bias, long long tokens,     \
             int experts, int top_k, int scoring, int renormalise, float scale, int groups, int top_groups) {         \
        tilewise::moe::route<TYPE, GROUPS, WARPS>(ids, weights, logits, stride, bias, tokens, experts, top_k,         \
                                                  scoring, renormalise, scale, groups, top_groups);                   \
    }

#define INSTANTIATE_MOE_ROUTE_GRADIENT(NAME, TYPE, WARPS)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(TYPE* out, const TYPE* logits, long long stride, const int* ids, const float* grad, long long tokens,    \
             int experts, int top_k, int scoring, int renormalise, float scale) {                                     \
        tilewise::moe::route_gradient<TYPE, WARPS>(out, logits, stride, ids, grad, tokens, experts, top_k, scoring,   \
                                                   renormalise, scale);                                               \
    }
