// What a call asks for, as every kernel of the room takes it; and which rows and keys a block works on.
//
// Rows. Of one key head and one sequence, query heads come in groups of `pack` that share a tile: packed row r is query
// r / pack, head `first_head + r % pack`. So a key is read once for its whole group of heads.
//
// Columns. Without lists column c is key c. With lists (a block mask, or each query's own blocks) the columns of a query
// block are the keys of its listed blocks, one list after the other: first the blocks in which the mask program decides,
// then the full ones. A column of a block's part behind the last key, or of an unused slot, is no key.
//
// Addresses and counts are 64 bits wide; positions within a sequence 32, which the host checks.
#pragma once

#include "../common/types.cuh"

namespace tilewise {
namespace attention {

// Features that a kernel is compiled with, beside its types and its mod.
enum Feature {
    LISTS = 1,    // rows see listed key blocks alone
    PAGED = 2,    // keys lie in pages
    DROPOUT = 4,
    DENSE = 8,    // a boolean mask
    SPLIT = 16,   // results over a part of the keys, in f32
};

constexpr i32 NO_LIMIT = 1 << 30;  // above every position, and sums of two stay below 2^31

// A number that a lambda takes as a type.
template <i32 VALUE> struct Constant {
    static constexpr i32 value = VALUE;
};

// Strides in elements.
struct Axes {
    i64 batch, head, row;
};

// The kernel argument. python/tilewise/cuda/attention/problem.py has the same fields in the same order.
struct Problem {
    const void *query, *key, *value;  // [batch, heads, length, width]; with pages [pages, heads, page size, width]
    void* out;
    const void* grad_out;
    f32* lse;
    const f32* grad_lse;
    f32* delta;  // [batch, query heads, queries]
    void *grad_query, *grad_key, *grad_value;
    f32* grad_sinks;
    f32 *partial, *partial_lse;  // [splits, batch, query heads, queries, value width], and without the last axis
    const f32* sinks;
    const unsigned char* mask;
    const i32 *partial_count, *partial_list;  // [list batches, list heads, query blocks (, slots)]; no count: all slots
    const i32 *full_count, *full_list;
    const i32 *turned_count, *turned_list;  // the lists of key blocks: 2 * query block + (1 if full)
    const i64* sequences;                   // [sequences, 6], or null: one a batch entry
    const i32* block_table;                 // [sequences, table_width]
    Axes query_at, key_at, value_at, out_at, grad_out_at, lse_at, grad_lse_at, grad_query_at, grad_key_at, grad_value_at;
    i64 mask_at[4];
    i64 batches, queries, keys, sequence_count, table_width, page_size;
    i64 list_batches, list_heads, query_blocks, key_blocks, partial_slots, full_slots;
    i64 splits, split_keys;  // of split_keys = 0 the sequence is cut into `splits` equal parts
    u64 seed, drop_below;    // a weight is dropped if its 32 random bits are below
    i32 query_heads, key_heads, width, value_width;
    i32 left, right;  // NO_LIMIT: no window
    i32 query_block, key_block;
    i32 pack, aligned, out_aligned;
    f32 scale, scale_log2, threshold, keep_scale;
};

constexpr f32 LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Sequence {
    i64 query_batch, query_start, key_batch, key_start;
    i32 number, queries, keys;
    i32 shift;  // keys - queries: the diagonal of row i is column i + shift

    __device__ __forceinline__ Sequence(const Problem& p, i64 n) : number(static_cast<i32>(n)) {
        if (p.sequences == nullptr) {
            query_batch = key_batch = n;
            query_start = key_start = 0;
            queries = static_cast<i32>(p.queries);
            keys = static_cast<i32>(p.keys);
        } else {
            const i64* row = p.sequences + n * 6;
            query_batch = row[0];
            query_start = row[1];
            queries = static_cast<i32>(row[2]);
            key_batch = row[3];
            key_start = row[4];
            keys = static_cast<i32>(row[5]);
        }
        shift = keys - queries;
    }

    // Keys [low, high) that the window leaves to a query.
    __device__ __forceinline__ i32 low(const Problem& p, i32 query) const {
        const i32 first = p.left >= NO_LIMIT ? 0 : query + shift - p.left;
        return first > 0 ? first : 0;
    }
    __device__ __forceinline__ i32 high(const Problem& p, i32 query) const {
        const i32 end = p.right >= NO_LIMIT ? keys : query + shift + p.right + 1;
        return end < keys ? end : keys;
    }
};

// Tiles of `size` rows that `count` queries make: those of a query block do not mix with others.
__device__ __forceinline__ i64 tiles_of(const Problem& p, i32 count, i32 size) {
    if (p.query_block == 0) return (static_cast<i64>(count) * p.pack + size - 1) / size;
    const i64 blocks = (count + p.query_block - 1) / p.query_block;
    return blocks * ((static_cast<i64>(p.query_block) * p.pack + size - 1) / size);
}

// Tiles of `size` keys: those of a key block do not mix with others.
__device__ __forceinline__ i64 key_tiles_of(const Problem& p, i32 count, i32 size) {
    if (p.key_block == 0) return (count + size - 1) / size;
    return static_cast<i64>((count + p.key_block - 1) / p.key_block) * ((p.key_block + size - 1) / size);
}

// The `tile`-th tile among those of all sequences: sets `tile` to its number within its sequence, and returns that
// sequence's number, or -1.
__device__ __forceinline__ i64 find_sequence(const Problem& p, i64& tile, i32 size, bool of_keys) {
    for (i64 n = 0; n < p.sequence_count; ++n) {
        const i32 count = static_cast<i32>(p.sequences[n * 6 + (of_keys ? 5 : 2)]);
        const i64 tiles = of_keys ? key_tiles_of(p, count, size) : tiles_of(p, count, size);
        if (tile < tiles) return n;
        tile -= tiles;
    }
    return -1;
}

// The rows of one block.
struct Rows {
    i32 first, end;   // packed rows within the query block: those of the tile that exist are [first, min(first + M, end))
    i32 block_query;  // first query of the query block
    i32 block;        // number of the query block
    i32 first_head;

    __device__ __forceinline__ i32 query(const Problem& p, i32 row) const { return block_query + row / p.pack; }
    __device__ __forceinline__ i32 head(const Problem& p, i32 row) const { return first_head + row % p.pack; }
};

// `tile` of `size` rows of a sequence.
__device__ __forceinline__ Rows rows_of(const Problem& p, const Sequence& sequence, i64 tile, i32 size, i32 first_head) {
    Rows rows;
    rows.first_head = first_head;
    if (p.query_block == 0) {
        rows.block = rows.block_query = 0;
        rows.first = static_cast<i32>(tile * size);
        rows.end = sequence.queries * p.pack;
        return rows;
    }
    const i32 each = (p.query_block * p.pack + size - 1) / size;
    rows.block = static_cast<i32>(tile / each);
    rows.block_query = rows.block * p.query_block;
    rows.first = static_cast<i32>(tile % each) * size;
    const i32 left = sequence.queries - rows.block_query;
    rows.end = (left < p.query_block ? left : p.query_block) * p.pack;
    return rows;
}

// The tile of packed rows that a block of the grid owns. Tiles of a head follow each other, so its keys stay in the cache;
// the longest rows go first.
template <i32 SIZE> struct Task {
    i64 number;  // of the sequence; -1: none
    i64 tile;
    i32 key_head, first_head;

    __device__ __forceinline__ Task(const Problem& p, i64 block) {
        const i32 group = p.query_heads / p.key_heads, parts = group / p.pack;
        const i64 heads = static_cast<i64>(p.key_heads) * parts;
        i64 part;
        if (p.sequences != nullptr) {
            const i64 tiles = gridDim.x / heads;
            tile = block % tiles;
            part = block / tiles;
            number = find_sequence(p, tile, SIZE, false);
        } else {
            const i64 tiles = gridDim.x / (heads * p.batches);
            tile = tiles - 1 - block % tiles;
            part = block / tiles % heads;
            number = block / (tiles * heads);
        }
        key_head = static_cast<i32>(part / parts);
        first_head = key_head * group + static_cast<i32>(part % parts) * p.pack;
    }
};

// A row of the lists: those of (sequence, head, block), where `blocks` are the blocks of a list row's axis.
__device__ __forceinline__ i64 list_row(const Problem& p, i32 sequence, i32 head, i64 blocks, i64 block) {
    const i64 batch = p.list_batches == 1 ? 0 : sequence;
    const i64 list_head = static_cast<i64>(head) * p.list_heads / p.query_heads;
    return (batch * p.list_heads + list_head) * blocks + block;
}

// The columns of one query block.
struct Columns {
    const i32 *partial, *full;
    i32 partials, total;  // columns of partial blocks, and of all

    __device__ __forceinline__ Columns(const Problem& p, const Sequence& sequence, const Rows& rows, bool lists) {
        partial = full = nullptr;
        partials = total = sequence.keys;
        if (!lists) return;
        const i64 row = list_row(p, sequence.number, rows.first_head, p.query_blocks, rows.block);
        i64 counts[2] = {0, 0};
        if (p.partial_list != nullptr) {
            counts[0] = p.partial_count == nullptr ? p.partial_slots : p.partial_count[row];
            partial = p.partial_list + row * p.partial_slots;
        }
        if (p.full_list != nullptr) {
            counts[1] = p.full_count[row];
            full = p.full_list + row * p.full_slots;
        }
        partials = static_cast<i32>(counts[0]) * p.key_block;
        total = partials + static_cast<i32>(counts[1]) * p.key_block;
    }

    // Key of column `c` of listed blocks, or -1.
    __device__ __forceinline__ i32 key(const Problem& p, const Sequence& sequence, i32 c) const {
        if (c >= total) return -1;
        const i32 within = c < partials ? c : c - partials;
        const i32 block = (c < partials ? partial : full)[within / p.key_block];
        const i64 key = static_cast<i64>(block) * p.key_block + within % p.key_block;
        return block >= 0 && key < sequence.keys ? static_cast<i32>(key) : -1;
    }
};

// A row of keys or values (`at`: their strides), in elements from the first one.
template <bool IN_PAGES>
__device__ __forceinline__ i64 key_place(const Problem& p, const Axes& at, const Sequence& sequence, i32 head, i32 key) {
    if (IN_PAGES) {
        const i64 page = p.block_table[sequence.number * p.table_width + key / p.page_size];
        return page * at.batch + head * at.head + key % p.page_size * at.row;
    }
    return sequence.key_batch * at.batch + head * at.head + (sequence.key_start + key) * at.row;
}

__device__ __forceinline__ i64 query_place(const Axes& at, const Sequence& sequence, i32 head, i32 query) {
    return sequence.query_batch * at.batch + head * at.head + (sequence.query_start + query) * at.row;
}

}  // namespace attention
}  // namespace tilewise
