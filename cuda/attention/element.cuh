// One element of the score matrix: whether it is kept, what its score is, whether its weight is dropped.
//
//   kept      inside the window and the sequence, kept by the boolean mask and, in partial blocks, by the mask program
//   score     scale * (q . k), then the score program
//   dropped   32 random bits of (seed, sequence, head, query, key) are below 2^32 times the probability
#pragma once

#include "../common/philox.cuh"
#include "../common/types.cuh"
#include "../expr.cuh"
#include "../ptx/exponential.cuh"
#include "problem.cuh"

namespace tilewise {
namespace attention {

// 2^x; for f32 to the last bits.
template <class T> __device__ __forceinline__ f32 power_of_two(f32 x) {
    if constexpr (sizeof(T) == 4) return exp2f(x);
    return fast_exp2(x);
}

// A query of a head, and the keys [low, high) that window, length and part leave it.
struct Row {
    i32 query, head, low, high;
    bool real;
};

// `partial`: the key's block leaves the decision to the mask program.
template <class Mod, i32 FEATURES>
__device__ __forceinline__ bool kept(const Problem& p, const typename Mod::Captures& captures, const Sequence& sequence,
                                     const Row& row, i32 key, bool partial) {
    if (key < row.low || key >= row.high) return false;
    if (FEATURES & DENSE) {
        const i64 place = sequence.number * p.mask_at[0] + row.head * p.mask_at[1] + row.query * p.mask_at[2] + key * p.mask_at[3];
        if (p.mask[place] == 0) return false;
    }
    if (Mod::MASK && partial) return Mod::mask(captures, sequence.number, row.head, row.query, key);
    return true;
}

// Purpose `Drop` of rust/core/src/rng.rs. One counter serves four neighbouring keys:
//   [sequence * query heads + head (low 32 bits), query, key / 4, purpose], word key % 4.
constexpr u32 PURPOSE_DROP = 6;

// Bit 0: `key`, which is even, is dropped; bit 1: the next one is.
__device__ __forceinline__ u32 dropped_pair(const Problem& p, const Sequence& sequence, i32 head, i32 query, i32 key) {
    const i64 stream = static_cast<i64>(sequence.number) * p.query_heads + head;
    const Words words = philox({static_cast<u32>(stream), static_cast<u32>(query), static_cast<u32>(key) / 4, PURPOSE_DROP},
                               static_cast<u32>(p.seed), static_cast<u32>(p.seed >> 32));
    const u32 first = key % 4 == 0 ? words.x : words.z, second = key % 4 == 0 ? words.y : words.w;
    return static_cast<u32>(first < p.drop_below) | static_cast<u32>(second < p.drop_below) << 1;
}

// The same for any one key.
__device__ __forceinline__ bool dropped(const Problem& p, const Sequence& sequence, i32 head, i32 query, i32 key) {
    return (dropped_pair(p, sequence, head, query, key & ~1) >> (key & 1) & 1) != 0;
}

}  // namespace attention
}  // namespace tilewise
