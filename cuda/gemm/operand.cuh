// How a tile of an operand gets from global into shared memory.
//
// A tile spans FREE places of the operand's free axis (128 rows of the product for the left one, its columns for the
// right one) and DEPTH places of the axis that is summed over. It is copied in 16-byte chunks by all threads of a block,
// and has one of two shapes, by which of the axes has its elements side by side in memory:
//
//   Along   [FREE][DEPTH]   the summed axis: rows of 64 bytes (128 for warpgroups)
//   Across  [DEPTH][FREE]   the free axis: rows of 256 bytes (512 for f32; for warpgroups cut into slabs of 128)
//
// Chunks of a row are permuted by the row's number, so that eight chunks that an instruction reads together, one above
// the other, lie in eight different groups of banks. For warpgroups that is the permutation that the hardware knows as
// its 128-byte swizzle. Places outside the operand are zeros.
//
// A row of memory is found through a `place`: a function from its number in the tile to its number in memory, or -1.
// Gathers and the order of gates and ups are such functions.
#pragma once

#include "../common/types.cuh"
#include "../ptx/async.cuh"
#include "../ptx/shared.cuh"

namespace tilewise {
namespace gemm {

constexpr i32 TILE = 128, THREADS = 256;  // rows of a product's tile, and threads that share it
template <class T> constexpr i32 CHUNK = 16 / static_cast<i32>(sizeof(T));

// Who multiplies a tile, and of what size: warps on their own, COLUMNS = 128 (gemm/product.cuh), ...
template <class Type, bool IS_ALIGNED> struct Warps {
    using T = Type;
    static constexpr bool ALIGNED = IS_ALIGNED, WARPGROUPS = false;
    static constexpr i32 COLUMNS = 128, DEPTH = 64 / static_cast<i32>(sizeof(T)), STAGES = 4;
    // Blocks that share a multiprocessor, which bounds registers at 128: as many as the tensor cores' sums leave.
    static constexpr i32 BLOCKS = sizeof(T) == 2 && ALIGNED ? 2 : 1;
};

template <class T> using Aligned = Warps<T, true>;
template <class T> using Unaligned = Warps<T, false>;

// ... or, on sm_90a, warpgroups of four warps, COLUMNS = 256 (gemm/warpgroup.cuh). f16 and bf16 only.
template <class Type> struct Warpgroups {
    using T = Type;
    static constexpr bool ALIGNED = true, WARPGROUPS = true;
    static constexpr i32 COLUMNS = 256, DEPTH = 64, STAGES = 4, BLOCKS = 1;
};

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

// FREE: places of the free axis.
template <class Engine, i32 FREE> struct Along {
    using T = typename Engine::T;
    static constexpr bool ALONG = true;
    static constexpr i32 ROW_BYTES = Engine::DEPTH * static_cast<i32>(sizeof(T)), BYTES = FREE * ROW_BYTES;
    static constexpr i32 PER_ROW = ROW_BYTES / 16, STEP = THREADS / PER_ROW, PASSES = FREE / STEP;
    const T* row[PASSES];
    const T* base;
    i64 depth;

    // Place of chunk `chunk` of row `row` in a tile.
    static __device__ __forceinline__ shared_t at(shared_t tile, i32 row, i32 chunk) {
        return tile + row * ROW_BYTES + (chunk ^ (PER_ROW == 4 ? row >> 1 & 3 : row & 7)) * 16;
    }

    template <class Place>
    __device__ __forceinline__ Along(const T* base, i64 stride, i64 depth, const Place& place)
        : base(base), depth(depth) {
#pragma unroll
        for (i32 i = 0; i < PASSES; ++i) {
            const i64 source = place(static_cast<i32>(threadIdx.x) / PER_ROW + i * STEP);
            row[i] = source < 0 ? nullptr : base + source * stride;
        }
    }

    __device__ __forceinline__ void prepare(i64) {}

    __device__ __forceinline__ void issue(shared_t tile, i64 start) const {
        const i32 thread = static_cast<i32>(threadIdx.x);
        const i64 column = start + thread % PER_ROW * CHUNK<T>;
#pragma unroll
        for (i32 i = 0; i < PASSES; ++i) {
            const shared_t target = at(tile, thread / PER_ROW + i * STEP, thread % PER_ROW);
            fill<T, Engine::ALIGNED>(target, row[i] + column, row[i] == nullptr ? 0 : depth - column, base);
        }
    }
};

template <class Engine, i32 FREE, class Place> struct Across {
    using T = typename Engine::T;
    static constexpr bool ALONG = false;
    static constexpr i32 ROW_BYTES = FREE * static_cast<i32>(sizeof(T)), BYTES = Engine::DEPTH * ROW_BYTES;
    static constexpr i32 PER_ROW = ROW_BYTES / 16, STEP = THREADS / PER_ROW, PASSES = Engine::DEPTH / STEP;
    const T* base;
    i64 stride, depth, column, columns;
    Place place;
    i64 next[PASSES];  // rows of the tile to come: looked up one tile ahead, because a gather must wait for its index

    // Warpgroups read slabs of eight chunks (128 bytes), one slab behind the other.
    static __device__ __forceinline__ shared_t at(shared_t tile, i32 row, i32 chunk) {
        if (Engine::WARPGROUPS) {
            return tile + chunk / 8 * (Engine::DEPTH * 128) + row * 128 + (chunk % 8 ^ (row & 7)) * 16;
        }
        return tile + row * ROW_BYTES + (chunk ^ (row & 7)) * 16;
    }

    // `column`: the tile's first place on the free axis, which ends at `columns`.
    __device__ __forceinline__ Across(const T* base, i64 stride, i64 depth, i64 column, i64 columns, Place place)
        : base(base), stride(stride), depth(depth),
          column(column + static_cast<i32>(threadIdx.x) % PER_ROW * CHUNK<T>), columns(columns), place(place) {}

    __device__ __forceinline__ void prepare(i64 start) {
#pragma unroll
        for (i32 i = 0; i < PASSES; ++i) {
            const i64 row = start + static_cast<i32>(threadIdx.x) / PER_ROW + i * STEP;
            next[i] = row < depth ? place(row) : -1;
        }
    }

    __device__ __forceinline__ void issue(shared_t tile, i64) const {
        const i32 thread = static_cast<i32>(threadIdx.x);
#pragma unroll
        for (i32 i = 0; i < PASSES; ++i) {
            const shared_t target = at(tile, thread / PER_ROW + i * STEP, thread % PER_ROW);
            fill<T, Engine::ALIGNED>(target, base + next[i] * stride + column, next[i] < 0 ? 0 : columns - column, base);
        }
    }
};

}  // namespace gemm
}  // namespace tilewise
