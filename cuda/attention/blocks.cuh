// Lists of key blocks a query block, turned into lists of query blocks a key block: what the keys' gradients walk.
//
//   mark   map[row of lists][key block] = 1 (the mask program decides) or 2 (full); zeros elsewhere
//   turn   of each key block, the marked query blocks in ascending order: 2 * query block + (1 if full)
#pragma once

#include "../common/block.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "problem.cuh"

namespace tilewise {
namespace attention {

// One warp a row of lists. The map is zero before; who lists a block twice marks it once.
template <i32 WARPS> __device__ __forceinline__ void mark_blocks(const Problem& p, unsigned char* map) {
    const i64 row = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (row >= p.list_batches * p.list_heads * p.query_blocks) return;
    unsigned char* const own = map + row * p.key_blocks;
    for (i64 block = lane_id(); block < p.key_blocks; block += WARP) own[block] = 0;
    warp_barrier();
    if (p.partial_list != nullptr) {
        const i64 count = p.partial_count == nullptr ? p.partial_slots : p.partial_count[row];
        for (i64 slot = lane_id(); slot < count; slot += WARP) {
            const i32 block = p.partial_list[row * p.partial_slots + slot];
            if (block >= 0 && block < p.key_blocks) own[block] = 1;
        }
    }
    if (p.full_list != nullptr) {
        for (i64 slot = lane_id(); slot < p.full_count[row]; slot += WARP) {
            const i32 block = p.full_list[row * p.full_slots + slot];
            if (block >= 0 && block < p.key_blocks) own[block] = 2;
        }
    }
}

// One warp a column of the map. `turned_list` has room for all query blocks in each row.
template <i32 WARPS>
__device__ __forceinline__ void turn_blocks(const Problem& p, const unsigned char* map, i32* counts, i32* lists) {
    const i64 column = static_cast<i64>(blockIdx.x) * WARPS + static_cast<i32>(threadIdx.x) / WARP;
    if (column >= p.list_batches * p.list_heads * p.key_blocks) return;
    const i64 block = column % p.key_blocks, head = column / p.key_blocks;
    const unsigned char* const own = map + head * p.query_blocks * p.key_blocks + block;
    i32* const list = lists + column * p.query_blocks;
    i32 count = 0;
    for (i64 start = 0; start < p.query_blocks; start += WARP) {
        const i64 row = start + lane_id();
        const u32 mark = row < p.query_blocks ? own[row * p.key_blocks] : 0;
        const u32 all = warp_ballot(mark != 0), before = all & ((1u << lane_id()) - 1);
        if (mark != 0) list[count + count_bits(before)] = static_cast<i32>(2 * row) + (mark == 2 ? 1 : 0);
        count += count_bits(all);
    }
    if (lane_id() == 0) counts[column] = count;
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_MARK_BLOCKS(NAME, WARPS)                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, unsigned char* map) {                      \
        tilewise::attention::mark_blocks<WARPS>(problem, map);                                                        \
    }

#define INSTANTIATE_ATTENTION_TURN_BLOCKS(NAME, WARPS)                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, const unsigned char* map, int* counts,     \
             int* lists) {                                                                                            \
        tilewise::attention::turn_blocks<WARPS>(problem, map, counts, lists);                                         \
    }
