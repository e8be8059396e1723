// How a tile of an operand gets from global into shared memory.
//
// A tile spans TILE places of the operand's free axis (rows of the product for the left one, columns for the right one)
// and DEPTH places of the axis that is summed over. It is 8 KiB in 16-byte chunks, two for each thread of a block, in
// one of two shapes, by which of the axes has its elements side by side in memory:
//
//   Along   [TILE][DEPTH]   the summed axis: rows of 64 bytes
//   Across  [DEPTH][TILE]   the free axis: rows of 256 bytes (512 for f32)
//
// Chunks of a row are permuted by the row's number, so that eight chunks that an instruction reads together, one above
// the other, lie in eight different groups of banks. Places outside the operand are zeros.
//
// A row of memory is found through a `place`: a function from its number in the tile to its number in memory, or -1.
// Gathers and the order of gates and ups are such functions.
#pragma once

#include "../common/types.cuh"
#include "../ptx/async.cuh"
#include "../ptx/shared.cuh"

namespace tilewise {
namespace gemm {

constexpr i32 TILE = 128, THREADS = 256, OPERAND_BYTES = 8192;
template <class T> constexpr i32 CHUNK = 16 / static_cast<i32>(sizeof(T));
template <class T> constexpr i32 DEPTH = 64 / static_cast<i32>(sizeof(T));

// `count` elements (at most a chunk) from `source`, zeros after them. If ALIGNED, sources are aligned to 16 bytes, and
// a chunk is whole or absent.
template <class T, bool ALIGNED>
__device__ __forceinline__ void fill(shared_t target, const T* source, i64 count, const T* anywhere) {
    if (ALIGNED) {
        async_copy_16(target, count > 0 ? source : anywhere, count > 0);
    } else {
        union {
            T element[CHUNK<T>];
            u32 word[4];
        } packet;
        packet.word[0] = packet.word[1] = packet.word[2] = packet.word[3] = 0;
#pragma unroll
        for (i32 i = 0; i < CHUNK<T>; ++i) {
            if (i < count) packet.element[i] = source[i];
        }
        store_shared_16(target, packet.word);
    }
}

template <class T, bool ALIGNED> struct Along {
    static constexpr bool ALONG = true;
    const T* row[2];
    const T* base;
    i64 depth;

    // Place of chunk `chunk` of row `row` in a tile.
    static __device__ __forceinline__ shared_t at(shared_t tile, i32 row, i32 chunk) {
        return tile + row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
    }

    template <class Place>
    __device__ __forceinline__ Along(const T* base, i64 stride, i64 depth, const Place& place)
        : base(base), depth(depth) {
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const i64 source = place(static_cast<i32>(threadIdx.x) / 4 + i * (THREADS / 4));
            row[i] = source < 0 ? nullptr : base + source * stride;
        }
    }

    __device__ __forceinline__ void prepare(i64) {}

    __device__ __forceinline__ void issue(shared_t tile, i64 start) const {
        const i32 thread = static_cast<i32>(threadIdx.x);
        const i64 column = start + thread % 4 * CHUNK<T>;
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const shared_t target = at(tile, thread / 4 + i * (THREADS / 4), thread % 4);
            fill<T, ALIGNED>(target, row[i] + column, row[i] == nullptr ? 0 : depth - column, base);
        }
    }
};

template <class T, bool ALIGNED, class Place> struct Across {
    static constexpr bool ALONG = false;
    static constexpr i32 PER_ROW = TILE / CHUNK<T>, STEP = THREADS / PER_ROW;
    const T* base;
    i64 stride, depth, column, columns;
    Place place;
    i64 next[2];  // rows of the tile to come: looked up one tile ahead, because a gather must wait for its index

    static __device__ __forceinline__ shared_t at(shared_t tile, i32 row, i32 chunk) {
        return tile + row * (TILE * static_cast<i32>(sizeof(T))) + (chunk ^ (row & 7)) * 16;
    }

    // `column`: the tile's first place on the free axis, which ends at `columns`.
    __device__ __forceinline__ Across(const T* base, i64 stride, i64 depth, i64 column, i64 columns, Place place)
        : base(base), stride(stride), depth(depth),
          column(column + static_cast<i32>(threadIdx.x) % PER_ROW * CHUNK<T>), columns(columns), place(place) {}

    __device__ __forceinline__ void prepare(i64 start) {
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const i64 row = start + static_cast<i32>(threadIdx.x) / PER_ROW + i * STEP;
            next[i] = row < depth ? place(row) : -1;
        }
    }

    __device__ __forceinline__ void issue(shared_t tile, i64) const {
        const i32 thread = static_cast<i32>(threadIdx.x);
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const shared_t target = at(tile, thread / PER_ROW + i * STEP, thread % PER_ROW);
            fill<T, ALIGNED>(target, base + next[i] * stride + column, next[i] < 0 ? 0 : columns - column, base);
        }
    }
};

}  // namespace gemm
}  // namespace tilewise
