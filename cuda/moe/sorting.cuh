// Pairs (token, expert) sorted by expert: a stable counting sort that never tells the host a count.
//
//   rows of expert e        offsets[e] .. offsets[e + 1]; within an expert pairs keep their order
//   rows of no expert       offsets[experts] .. offsets[experts + 1] = pairs: as many as there are sentinels
//   row -> pair, token      row_pair, row_token; -1 for rows of no expert
//   pair -> row             pair_row; -1 for sentinels
//   schedule                (expert, tile of TILE rows); the rows of no expert are "expert" number `experts`;
//                           (-1, 0) past the end, because the host only knows an upper bound
//
// A pair is a sentinel if its expert is outside 0 .. experts or its token outside 0 .. tokens.
//
//   for each chunk of pairs: counts[chunk, e] = how many of its pairs chose e                        count
//   counts[chunk, e] = how many pairs of earlier chunks chose e; totals[e]                           scan_chunks
//   offsets[e] = sum of totals before e; the same for tiles                                          scan_experts
//   for each slot of the schedule: find its expert by bisection                                      schedule
//   for each chunk, for each pair in order: row = offsets[e] + counts[chunk, e]++                    place
//
// Departures:
//   1. A warp does a chunk, 32 pairs a step. Lanes with one expert find each other (match), so the rank of a pair is a
//      count of bits, and one lane updates the counter: no atomics, and the order is the pairs'.
//   2. Counters lie in global memory, each chunk's own line of them, so there may be any number of experts.
#pragma once

#include "../common/block.cuh"
#include "../common/index.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"

namespace tilewise {
namespace moe {

// The expert of a pair, or -1.
template <class I>
__device__ __forceinline__ i32 expert_of(const I* ids, const I* token_ids, i64 pair, i32 experts, i64 tokens) {
    const i64 expert = ids[pair];
    if (expert < 0 || expert >= experts) return -1;
    if (token_ids != nullptr && (token_ids[pair] < 0 || token_ids[pair] >= tokens)) return -1;
    return static_cast<i32>(expert);
}

template <class I, i32 WARPS>
__device__ __forceinline__ void count(i32* __restrict__ counts, const I* __restrict__ ids,
                                      const I* __restrict__ token_ids, i64 pairs, i64 chunk, i32 experts, i64 tokens) {
    const i32 lane = lane_id();
    const i64 number = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    const i64 first = number * chunk, last = first + chunk < pairs ? first + chunk : pairs;
    if (first >= pairs) return;  // the same for all lanes of a warp
    i32* own = row_of(counts, number, experts);
    for (i32 expert = lane; expert < experts; expert += WARP) own[expert] = 0;
    warp_barrier();
    for (i64 start = first; start < last; start += WARP) {
        const i64 pair = start + lane;
        const i32 expert = pair < last ? expert_of(ids, token_ids, pair, experts, tokens) : -1;
        const u32 same = warp_match(static_cast<u32>(expert));
        if (expert >= 0 && (same & ((1u << lane) - 1)) == 0) own[expert] += count_bits(same);
        warp_barrier();
    }
}

// A block does 32 experts; warp s sums the s-th part of the chunks.
__device__ __forceinline__ void scan_chunks(i32* counts, i32* __restrict__ totals, i64 chunks, i32 experts) {
    __shared__ i32 sums[WARP][WARP];
    const i32 lane = lane_id(), part = static_cast<i32>(threadIdx.x) / WARP;
    const i32 expert = static_cast<i32>(blockIdx.x) * WARP + lane;
    const i64 length = (chunks + WARP - 1) / WARP, first = part * length;
    const i64 last = first + length < chunks ? first + length : chunks;
    i32 sum = 0;
    if (expert < experts) {
        for (i64 chunk = first; chunk < last; ++chunk) sum += row_of(counts, chunk, experts)[expert];
    }
    sums[part][lane] = sum;
    block_barrier();
    i32 running = 0;
    for (i32 before = 0; before < part; ++before) running += sums[before][lane];
    if (expert >= experts) return;
    if (part == WARP - 1) totals[expert] = running + sum;
    for (i64 chunk = first; chunk < last; ++chunk) {
        i32* place = row_of(counts, chunk, experts) + expert;
        const i32 here = *place;
        *place = running;
        running += here;
    }
}

// One block. offsets [experts + 2], tiles [experts + 2]: the first tile of each expert, and how many there are.
template <i32 THREADS, i32 TILE>
__device__ __forceinline__ void scan_experts(i32* __restrict__ offsets, i32* __restrict__ tiles,
                                             const i32* __restrict__ totals, i32 pairs, i32 experts) {
    __shared__ i32 row_sums[THREADS], tile_sums[THREADS];
    const i32 thread = static_cast<i32>(threadIdx.x);
    const i32 length = (experts + THREADS - 1) / THREADS;
    const i32 first = thread * length < experts ? thread * length : experts;
    const i32 last = first + length < experts ? first + length : experts;
    i32 rows = 0, own = 0;
    for (i32 expert = first; expert < last; ++expert) {
        rows += totals[expert];
        own += (totals[expert] + TILE - 1) / TILE;
    }
    row_sums[thread] = rows;
    tile_sums[thread] = own;
    block_barrier();
    for (i32 step = 1; step < THREADS; step *= 2) {
        const i32 more_rows = thread >= step ? row_sums[thread - step] : 0;
        const i32 more_tiles = thread >= step ? tile_sums[thread - step] : 0;
        block_barrier();
        row_sums[thread] += more_rows;
        tile_sums[thread] += more_tiles;
        block_barrier();
    }
    rows = row_sums[thread] - rows;
    own = tile_sums[thread] - own;
    for (i32 expert = first; expert < last; ++expert) {
        offsets[expert] = rows;
        tiles[expert] = own;
        rows += totals[expert];
        own += (totals[expert] + TILE - 1) / TILE;
    }
    if (thread == THREADS - 1) {
        const i32 all = row_sums[thread], count = tile_sums[thread];
        offsets[experts] = all;
        offsets[experts + 1] = pairs;
        tiles[experts] = count;
        tiles[experts + 1] = count + (pairs - all + TILE - 1) / TILE;
    }
}

__device__ __forceinline__ void schedule(i32* __restrict__ slots, const i32* __restrict__ tiles, i64 count,
                                         i32 experts) {
    const i64 slot = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot >= count) return;
    i32 low = 0, high = experts + 1;  // the last expert whose first tile is at or before the slot lies in low .. high
    while (high - low > 1) {
        const i32 middle = low + (high - low) / 2;
        if (tiles[middle] <= slot) low = middle;
        else high = middle;
    }
    const bool used = slot < tiles[experts + 1];
    slots[2 * slot] = used ? low : -1;
    slots[2 * slot + 1] = used ? static_cast<i32>(slot) - tiles[low] : 0;
}

template <class I, i32 WARPS>
__device__ __forceinline__ void place(i32* __restrict__ pair_row, i32* __restrict__ row_pair,
                                      i32* __restrict__ row_token, i32* counts, const i32* __restrict__ offsets,
                                      const I* __restrict__ ids, const I* __restrict__ token_ids, i64 pairs, i64 chunk,
                                      i32 experts, i64 tokens, i32 slots) {
    const i32 lane = lane_id();
    const i64 number = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    const i64 first = number * chunk, last = first + chunk < pairs ? first + chunk : pairs;
    if (first >= pairs) return;  // the same for all lanes of a warp
    i32* own = row_of(counts, number, experts);
    for (i64 start = first; start < last; start += WARP) {
        const i64 pair = start + lane;
        const i32 expert = pair < last ? expert_of(ids, token_ids, pair, experts, tokens) : -1;
        const u32 same = warp_match(static_cast<u32>(expert));
        const i32 rank = count_bits(same & ((1u << lane) - 1));
        const i32 before = expert >= 0 ? own[expert] : 0;
        warp_barrier();  // every lane has read the counter that one of them is about to move
        if (expert >= 0 && rank == 0) own[expert] = before + count_bits(same);
        warp_barrier();
        if (pair >= last) continue;
        const i32 row = expert >= 0 ? offsets[expert] + before + rank : -1;
        pair_row[pair] = row;
        if (row >= 0) {
            row_pair[row] = static_cast<i32>(pair);
            row_token[row] = static_cast<i32>(token_ids != nullptr ? static_cast<i64>(token_ids[pair]) : pair / slots);
        }
        if (pair >= offsets[experts]) row_pair[pair] = row_token[pair] = -1;  // a row of no expert, by its number
    }
}

// starts[t] = the first pair whose token is t or later, for t = 0 .. tokens; token_ids ascend.
template <class I>
__device__ __forceinline__ void token_starts(i32* __restrict__ starts, const I* __restrict__ token_ids, i64 pairs,
                                             i64 tokens) {
    const i64 token = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (token > tokens) return;
    i64 low = 0, high = pairs;
    while (low < high) {
        const i64 middle = low + (high - low) / 2;
        if (token_ids[middle] < token) low = middle + 1;
        else high = middle;
    }
    starts[token] = static_cast<i32>(low);
}

}  // namespace moe
}  // namespace tilewise

#define INSTANTIATE_MOE_COUNT(NAME, INDEX, WARPS)                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(int* counts, const INDEX* ids, const INDEX* token_ids, long long pairs, long long chunk, int experts,    \
             long long tokens) {                                                                                      \
        tilewise::moe::count<INDEX, WARPS>(counts, ids, token_ids, pairs, chunk, experts, tokens);                    \
    }

#define INSTANTIATE_MOE_SCAN_CHUNKS(NAME)                                                                             \
    extern "C" __global__ void __launch_bounds__(1024) NAME(int* counts, int* totals, long long chunks, int experts) { \
        tilewise::moe::scan_chunks(counts, totals, chunks, experts);                                                  \
    }

#define INSTANTIATE_MOE_SCAN_EXPERTS(NAME, THREADS, TILE)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(int* offsets, int* tiles, const int* totals, int pairs, int experts) {                                   \
        tilewise::moe::scan_experts<THREADS, TILE>(offsets, tiles, totals, pairs, experts);                           \
    }

#define INSTANTIATE_MOE_SCHEDULE(NAME)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) NAME(int* slots, const int* tiles, long long count,             \
                                                           int experts) {                                             \
        tilewise::moe::schedule(slots, tiles, count, experts);                                                        \
    }

#define INSTANTIATE_MOE_PLACE(NAME, INDEX, WARPS)                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(int* pair_row, int* row_pair, int* row_token, int* counts, const int* offsets, const INDEX* ids,         \
             const INDEX* token_ids, long long pairs, long long chunk, int experts, long long tokens, int slots) {    \
        tilewise::moe::place<INDEX, WARPS>(pair_row, row_pair, row_token, counts, offsets, ids, token_ids, pairs,     \
                                           chunk, experts, tokens, slots);                                            \
    }

#define INSTANTIATE_MOE_TOKEN_STARTS(NAME, INDEX)                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        NAME(int* starts, const INDEX* token_ids, long long pairs, long long tokens) {                                \
        tilewise::moe::token_starts<INDEX>(starts, token_ids, pairs, tokens);                                         \
    }
