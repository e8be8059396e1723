// Attention backward, in the recompute form (Dao 2023). Of each kept element, with delta from delta.cuh:
//
//   weight = 2^(score - lse log2 e);   slope = weight * (grad_out . v - delta), then through the score program
//   grad_query = scale * sum over keys of slope * key
//   grad_key   = scale * sum over queries of slope * query;   grad_value = sum over queries of weight * grad_out
//   with dropout: grad_out . v and the weight of grad_value are 0 where dropped, times 1 / (1 - probability) elsewhere
//
// Two kernels, each of which recomputes scores (seven products in all instead of five): `query_gradient` owns a tile of
// packed rows and walks its columns, `key_gradient` owns a tile of keys and walks the rows that see them. So every sum
// has one owner and one order: no atomics, equal inputs give equal bits.
//
// Departures:
//   1. `key_gradient` forms scores with keys as rows, so that weights and slopes lie in registers as its second products
//      take them. A key sees the rows of all heads of its group, one head part after the other.
//   2. Tiles of the walked side are copied one ahead, into the other of two places. Two barriers a tile.
//   3. Where the sums of keys and values do not fit together, they are two launches of `key_gradient`.
//   4. Gradients of captures are added by atomics, in `query_gradient` alone. Their order is the machine's.
#pragma once

#include "../common/block.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../expr.cuh"
#include "../ptx/async.cuh"
#include "element.cuh"
#include "problem.cuh"
#include "tile.cuh"

namespace tilewise {
namespace attention {

// M rows that a block owns, WALKED rows of a tile of the other side.
template <class Type, i32 K, i32 V, i32 WARPS_, i32 WALKED_, i32 WHAT_> struct BackwardShape {
    using T = Type;
    static constexpr i32 K_WIDTH = K, V_WIDTH = V, WARPS = WARPS_, WALKED = WALKED_, WHAT = WHAT_;
    static constexpr i32 THREADS = WARPS * 32, M = WARPS * 16;
    static constexpr i32 OWN_K = M * ROW_BYTES<T, K>, OWN_V = M * ROW_BYTES<T, V>;
    static constexpr i32 TILE_K = WALKED * ROW_BYTES<T, K>, TILE_V = WALKED * ROW_BYTES<T, V>;
    static constexpr i32 NOTES = OWN_K + OWN_V + 2 * (TILE_K + TILE_V);  // two times WALKED rows of four words
    static constexpr i32 SCRATCH = NOTES + 2 * WALKED * 16;
    static constexpr i32 SCRATCH_OF_WARP = sizeof(T) == 4 ? 16 * WALKED : 0;  // floats
};

enum What { GRAD_KEY = 1, GRAD_VALUE = 2 };

// What one element adds: `score` comes as q . k and leaves as the weight of grad_out, `slope` comes as grad_out . v and
// leaves as d loss / d (scale * q . k). `look`: whether an edge or a mask may drop it.
template <class Mod, i32 FEATURES, bool SCATTER, class T>
__device__ __forceinline__ void differentiate(const Problem& p, const typename Mod::Captures& captures,
                                              const Sequence& sequence, const Row& row, i32 key, bool decides, bool look,
                                              f32 lse_log2, f32 delta, f32& score, f32& slope) {
    const bool keep = !look || kept<Mod, FEATURES>(p, captures, sequence, row, key, decides);
    const f32 plain = score * p.scale;
    f32 x = score * p.scale_log2;
    if (Mod::SCORE && keep) x = Mod::score(captures, plain, sequence.number, row.head, row.query, key) * LOG2_E;
    const f32 weight = keep ? power_of_two<T>(x - lse_log2) : 0.0f;
    f32 factor = 1.0f;
    if (FEATURES & DROPOUT) factor = dropped(p, sequence, row.head, row.query, key) ? 0.0f : p.keep_scale;
    f32 grad = weight * (slope * factor - delta);
    if (Mod::SCORE && keep) {
        grad = Mod::template gradient<SCATTER>(captures, plain, grad, sequence.number, row.head, row.query, key);
    }
    slope = keep ? grad : 0.0f;
    score = weight * factor;
}

// Rows without anything to see have lse = -inf; 0 instead keeps differences finite, and their weights are 0 anyway.
__device__ __forceinline__ f32 log2_of(f32 lse) { return lse == -infinity() ? 0.0f : lse * LOG2_E; }

__device__ __forceinline__ i64 delta_place(const Problem& p, const Sequence& sequence, i32 head, i32 query) {
    return (sequence.query_batch * p.query_heads + head) * p.queries + sequence.query_start + query;
}

// Stores the sums of this thread's rows, times `factor`. place(i): where row group i begins, or null.
template <class T, i32 GROUPS, class Place>
__device__ __forceinline__ void store_rows(const Sums<1, GROUPS>& sum, i32 width, f32 factor, bool aligned, const Place& place) {
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        T* target = place(i * 8 + lane_id() / 4);
        if (target == nullptr) continue;
#pragma unroll
        for (i32 j = 0; j < GROUPS; ++j) {
            const i32 column = j * 8 + lane_id() % 4 * 2;
            if (column < width) {
                store_two<T>(target + column, sum.at[0][j][i * 2] * factor, sum.at[0][j][i * 2 + 1] * factor, aligned,
                             column + 1 < width);
            }
        }
    }
}

template <class Shape, i32 FEATURES, class Mod>
__device__ __forceinline__ void query_gradient(const Problem& p, const typename Mod::Captures& captures) {
    using T = typename Shape::T;
    constexpr i32 N = Shape::WALKED, GROUPS = N / 8;
    constexpr bool HAS_LISTS = (FEATURES & LISTS) != 0;

    const Task<Shape::M> task(p, blockIdx.x);
    if (task.number < 0) return;
    const Sequence sequence(p, task.number);
    const i32 key_head = task.key_head;
    const Rows rows = rows_of(p, sequence, task.tile, Shape::M, task.first_head);
    if (rows.first >= rows.end) return;
    const Columns columns(p, sequence, rows, HAS_LISTS);

    const shared_t q_tile = shared_address(dynamic_shared()), grad_tile = q_tile + Shape::OWN_K;
    const shared_t walked = grad_tile + Shape::OWN_V;
    i32* const key_numbers = reinterpret_cast<i32*>(dynamic_shared() + Shape::NOTES);
    const i32 warp = static_cast<i32>(threadIdx.x) / WARP, lane = lane_id();
    f32* const scratch = reinterpret_cast<f32*>(dynamic_shared() + Shape::SCRATCH) + warp * Shape::SCRATCH_OF_WARP;

    const i32 last_row = (rows.first + Shape::M < rows.end ? rows.first + Shape::M : rows.end) - 1;
    const i32 first_query = rows.query(p, rows.first), last_query = rows.query(p, last_row);
    const i32 begin = (HAS_LISTS ? 0 : sequence.low(p, first_query)) / N * N;
    const i32 end = HAS_LISTS ? columns.total : sequence.high(p, last_query);
    const i32 tiles = end > begin ? (end - begin + N - 1) / N : 0;
    const i32 inner_low = sequence.low(p, last_query), inner_high = sequence.high(p, first_query);

    const auto row_at = [&](i32 i) -> Row {
        const i32 row = rows.first + warp * 16 + i * 8 + lane / 4;
        Row own;
        own.real = row < rows.end;
        own.query = rows.query(p, row);
        own.head = rows.head(p, row);
        own.low = own.real ? sequence.low(p, own.query) : 0;
        own.high = own.real ? sequence.high(p, own.query) : 0;
        return own;
    };
    const auto number_of = [&](i32 c) -> i32 {
        if (HAS_LISTS) return columns.key(p, sequence, c);
        return c < sequence.keys ? c : -1;
    };
    const T* keys = static_cast<const T*>(p.key);
    const T* values = static_cast<const T*>(p.value);
    const auto copy = [&](i32 step) {
        if (step < tiles) {
            const i32 start = begin + step * N, place = step & 1;
            const shared_t target = walked + place * (Shape::TILE_K + Shape::TILE_V);
            stage<T, N, Shape::K_WIDTH, Shape::THREADS>(target, p.key, p.width, p.aligned != 0, [&](i32 row) -> const T* {
                const i32 key = number_of(start + row);
                return key < 0 ? nullptr : keys + key_place<false>(p, p.key_at, sequence, key_head, key);
            });
            stage<T, N, Shape::V_WIDTH, Shape::THREADS>(target + Shape::TILE_K, p.value, p.value_width, p.aligned != 0,
                                                        [&](i32 row) -> const T* {
                const i32 key = number_of(start + row);
                return key < 0 ? nullptr : values + key_place<false>(p, p.value_at, sequence, key_head, key);
            });
            if (HAS_LISTS && static_cast<i32>(threadIdx.x) < N) {
                key_numbers[place * N + threadIdx.x] = number_of(start + static_cast<i32>(threadIdx.x));
            }
        }
        async_commit();
    };

    const T* queries = static_cast<const T*>(p.query);
    const T* grads = static_cast<const T*>(p.grad_out);
    stage<T, Shape::M, Shape::K_WIDTH, Shape::THREADS>(q_tile, p.query, p.width, p.aligned != 0, [&](i32 row) -> const T* {
        const i32 packed = rows.first + row;
        if (packed >= rows.end) return nullptr;
        return queries + query_place(p.query_at, sequence, rows.head(p, packed), rows.query(p, packed));
    });
    stage<T, Shape::M, Shape::V_WIDTH, Shape::THREADS>(grad_tile, p.grad_out, p.value_width, p.aligned != 0, [&](i32 row) -> const T* {
        const i32 packed = rows.first + row;
        if (packed >= rows.end) return nullptr;
        return grads + query_place(p.grad_out_at, sequence, rows.head(p, packed), rows.query(p, packed));
    });
    copy(0);

    f32 lse_log2[2], delta[2];
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const Row own = row_at(i);
        lse_log2[i] = own.real ? log2_of(p.lse[query_place(p.lse_at, sequence, own.head, own.query)]) : 0.0f;
        delta[i] = own.real ? p.delta[delta_place(p, sequence, own.head, own.query)] : 0.0f;
    }
    Sums<1, Shape::K_WIDTH / 8> sum;
    sum.clear();
#pragma unroll 1
    for (i32 step = 0; step < tiles; ++step) {
        copy(step + 1);
        async_wait<1>();
        block_barrier();
        const i32 start = begin + step * N;
        const shared_t key_tile = walked + (step & 1) * (Shape::TILE_K + Shape::TILE_V);
        const i32* numbers = key_numbers + (step & 1) * N;
        Sums<1, GROUPS> score, slope;
        score.clear();
        slope.clear();
        Multiply<T>::template rows<Shape::K_WIDTH>(score, q_tile, warp * 16, key_tile, 0);
        Multiply<T>::template rows<Shape::V_WIDTH>(slope, grad_tile, warp * 16, key_tile + Shape::TILE_K, 0);
        const bool look = HAS_LISTS || Mod::MASK || (FEATURES & DENSE) != 0 || start < inner_low || start + N > inner_high ||
                          rows.first + Shape::M > rows.end;
#pragma unroll
        for (i32 i = 0; i < 2; ++i) {
            const Row own = row_at(i);
#pragma unroll
            for (i32 j = 0; j < GROUPS; ++j) {
#pragma unroll
                for (i32 k = 0; k < 2; ++k) {
                    const i32 column = j * 8 + lane % 4 * 2 + k;
                    differentiate<Mod, FEATURES, true, T>(
                        p, captures, sequence, own, HAS_LISTS ? numbers[column] : start + column,
                        !HAS_LISTS || start + column < columns.partials, look, lse_log2[i], delta[i],
                        score.at[0][j][i * 2 + k], slope.at[0][j][i * 2 + k]);
                }
            }
        }
        Multiply<T>::template weighted<Shape::K_WIDTH>(sum, slope, key_tile, 0, scratch);
        block_barrier();
    }
    async_wait<0>();
    if (p.grad_query == nullptr) return;  // only the gradients of captures are wanted
    store_rows<T>(sum, p.width, p.scale, p.out_aligned != 0, [&](i32 i) -> T* {
        const i32 row = rows.first + warp * 16 + i;
        if (row >= rows.end) return nullptr;
        return static_cast<T*>(p.grad_query) + query_place(p.grad_query_at, sequence, rows.head(p, row), rows.query(p, row));
    });
}

template <class Shape, i32 FEATURES, class Mod>
__device__ __forceinline__ void key_gradient(const Problem& p, const typename Mod::Captures& captures) {
    using T = typename Shape::T;
    constexpr i32 N = Shape::WALKED, GROUPS = N / 8, WHAT = Shape::WHAT;
    constexpr bool HAS_LISTS = (FEATURES & LISTS) != 0, KEYS = (WHAT & GRAD_KEY) != 0, VALUES = (WHAT & GRAD_VALUE) != 0;

    const i32 group = p.query_heads / p.key_heads, parts = group / p.pack;
    i64 tile, number, head;
    if (p.sequences != nullptr) {
        const i64 tiles = gridDim.x / p.key_heads;
        tile = blockIdx.x % tiles;
        head = blockIdx.x / tiles;
        number = find_sequence(p, tile, Shape::M, true);
        if (number < 0) return;
    } else {
        const i64 tiles = gridDim.x / (p.key_heads * p.batches);
        tile = blockIdx.x % tiles;  // under a causal mask the first keys have the longest columns
        head = blockIdx.x / tiles % p.key_heads;
        number = blockIdx.x / (tiles * p.key_heads);
    }
    const Sequence sequence(p, number);
    const i32 key_head = static_cast<i32>(head);
    const i32 each = HAS_LISTS ? (p.key_block + Shape::M - 1) / Shape::M : 1;
    const i32 key_block = HAS_LISTS ? static_cast<i32>(tile / each) : 0;
    const i32 first_key = HAS_LISTS ? key_block * p.key_block + static_cast<i32>(tile % each) * Shape::M
                                    : static_cast<i32>(tile) * Shape::M;
    i32 key_end = HAS_LISTS ? (key_block + 1) * p.key_block : sequence.keys;
    key_end = key_end < sequence.keys ? key_end : sequence.keys;
    if (first_key >= key_end) return;

    const shared_t k_tile = shared_address(dynamic_shared()), v_tile = k_tile + Shape::OWN_K, walked = v_tile + Shape::OWN_V;
    i32* const notes = reinterpret_cast<i32*>(dynamic_shared() + Shape::NOTES);  // [2][4][N]: query, 2 head + full, lse, delta
    const i32 warp = static_cast<i32>(threadIdx.x) / WARP, lane = lane_id();
    f32* const scratch = reinterpret_cast<f32*>(dynamic_shared() + Shape::SCRATCH) + warp * Shape::SCRATCH_OF_WARP;

    // Rows that may see these keys: from the first query whose window reaches the last of them, to the last one whose
    // window begins before the end of the tile.
    const i32 last_key = (first_key + Shape::M < key_end ? first_key + Shape::M : key_end) - 1;
    i32 low_query = p.right >= NO_LIMIT ? 0 : first_key - sequence.shift - p.right;
    i32 high_query = p.left >= NO_LIMIT ? sequence.queries : last_key - sequence.shift + p.left + 1;
    low_query = low_query > 0 ? low_query : 0;
    high_query = high_query < sequence.queries ? high_query : sequence.queries;

    // Walks over the rows of all head parts; row: of the next tile to copy.
    i32 part = -1, row = 0, row_end = 0;
    const i32* list = nullptr;
    const auto advance = [&] {
        row += N;
        while (part < parts && row >= row_end) {
            if (++part >= parts) break;
            if (HAS_LISTS) {
                const i64 place = list_row(p, sequence.number, key_head * group + part * p.pack, p.key_blocks, key_block);
                list = p.turned_list + place * p.query_blocks;
                row = 0;
                row_end = p.turned_count[place] * p.query_block * p.pack;
            } else {
                row = low_query * p.pack / N * N;  // tiles begin at multiples
                row_end = high_query * p.pack;
            }
        }
    };
    // Query, head and whether its block is full, of a row of the walk; -1: no query.
    const auto query_of = [&](i32 r, i32& own_head, bool& full) -> i32 {
        own_head = key_head * group + part * p.pack + r % p.pack;
        full = false;
        if (r >= row_end) return -1;
        if (!HAS_LISTS) return r / p.pack;
        const i32 width = p.query_block * p.pack, code = list[r / width];
        const i32 query = (code >> 1) * p.query_block + r % width / p.pack;
        own_head = key_head * group + part * p.pack + r % width % p.pack;
        full = (code & 1) != 0;
        return query < sequence.queries ? query : -1;
    };
    const T* queries = static_cast<const T*>(p.query);
    const T* grads = static_cast<const T*>(p.grad_out);
    bool more = false, look = false;  // of the tile that was copied last
    const auto copy = [&](i32 place) {
        advance();
        more = part < parts;
        if (more) {
            const shared_t target = walked + place * (Shape::TILE_K + Shape::TILE_V);
            i32 own_head;
            bool full;
            stage<T, N, Shape::K_WIDTH, Shape::THREADS>(target, p.query, p.width, p.aligned != 0, [&](i32 r) -> const T* {
                const i32 query = query_of(row + r, own_head, full);
                return query < 0 ? nullptr : queries + query_place(p.query_at, sequence, own_head, query);
            });
            stage<T, N, Shape::V_WIDTH, Shape::THREADS>(target + Shape::TILE_K, p.grad_out, p.value_width, p.aligned != 0,
                                                        [&](i32 r) -> const T* {
                const i32 query = query_of(row + r, own_head, full);
                return query < 0 ? nullptr : grads + query_place(p.grad_out_at, sequence, own_head, query);
            });
            if (static_cast<i32>(threadIdx.x) < N) {
                const i32 query = query_of(row + static_cast<i32>(threadIdx.x), own_head, full);
                i32* note = notes + place * 4 * N + threadIdx.x;
                note[0] = query;
                note[N] = own_head * 2 + (full ? 1 : 0);
                f32* numbers = reinterpret_cast<f32*>(note);
                numbers[2 * N] = query < 0 ? 0.0f : log2_of(p.lse[query_place(p.lse_at, sequence, own_head, query)]);
                numbers[3 * N] = query < 0 ? 0.0f : p.delta[delta_place(p, sequence, own_head, query)];
            }
            look = HAS_LISTS || Mod::MASK || (FEATURES & DENSE) != 0 || row + N > row_end || first_key + Shape::M > key_end ||
                   first_key < sequence.low(p, (row + N - 1) / p.pack) ||
                   first_key + Shape::M > sequence.high(p, row / p.pack);
        }
        async_commit();
    };

    const T* keys = static_cast<const T*>(p.key);
    const T* values = static_cast<const T*>(p.value);
    stage<T, Shape::M, Shape::K_WIDTH, Shape::THREADS>(k_tile, p.key, p.width, p.aligned != 0, [&](i32 r) -> const T* {
        if (first_key + r >= key_end) return nullptr;
        return keys + key_place<false>(p, p.key_at, sequence, key_head, first_key + r);
    });
    if (KEYS) {
        stage<T, Shape::M, Shape::V_WIDTH, Shape::THREADS>(v_tile, p.value, p.value_width, p.aligned != 0, [&](i32 r) -> const T* {
            if (first_key + r >= key_end) return nullptr;
            return values + key_place<false>(p, p.value_at, sequence, key_head, first_key + r);
        });
    }
    row = -N;
    copy(0);

    Sums<1, KEYS ? Shape::K_WIDTH / 8 : 2> grad_key;
    Sums<1, VALUES ? Shape::V_WIDTH / 8 : 2> grad_value;
    grad_key.clear();
    grad_value.clear();
#pragma unroll 1
    for (i32 place = 0; more; place ^= 1) {
        const bool look_here = look;
        copy(place ^ 1);
        async_wait<1>();
        block_barrier();
        const shared_t query_tile = walked + place * (Shape::TILE_K + Shape::TILE_V), grad_tile = query_tile + Shape::TILE_K;
        const i32* note = notes + place * 4 * N;
        const f32* numbers = reinterpret_cast<const f32*>(note);
        Sums<1, GROUPS> score, slope;
        score.clear();
        slope.clear();
        Multiply<T>::template rows<Shape::K_WIDTH>(score, k_tile, warp * 16, query_tile, 0);
        if (KEYS) Multiply<T>::template rows<Shape::V_WIDTH>(slope, v_tile, warp * 16, grad_tile, 0);
#pragma unroll
        for (i32 j = 0; j < GROUPS; ++j) {
#pragma unroll
            for (i32 k = 0; k < 2; ++k) {
                const i32 column = j * 8 + lane % 4 * 2 + k;
                Row own;
                own.query = note[column];
                own.head = note[N + column] >> 1;
                own.real = own.query >= 0;
                own.low = own.real ? sequence.low(p, own.query) : 0;
                own.high = own.real ? sequence.high(p, own.query) : 0;
                const bool decides = (note[N + column] & 1) == 0;
                const f32 lse_log2 = numbers[2 * N + column], delta = numbers[3 * N + column];
#pragma unroll
                for (i32 i = 0; i < 2; ++i) {
                    const i32 key = first_key + warp * 16 + i * 8 + lane / 4;
                    if (own.high > key_end) own.high = key_end;
                    differentiate<Mod, FEATURES, false, T>(p, captures, sequence, own, key, decides, look_here, lse_log2, delta,
                                                           score.at[0][j][i * 2 + k], slope.at[0][j][i * 2 + k]);
                }
            }
        }
        if constexpr (VALUES) Multiply<T>::template weighted<Shape::V_WIDTH>(grad_value, score, grad_tile, 0, scratch);
        if constexpr (KEYS) Multiply<T>::template weighted<Shape::K_WIDTH>(grad_key, slope, query_tile, 0, scratch);
        block_barrier();
    }
    async_wait<0>();
    const auto key_of = [&](i32 i) -> i32 {
        const i32 key = first_key + warp * 16 + i;
        return key < key_end ? key : -1;
    };
    if constexpr (KEYS) {
        store_rows<T>(grad_key, p.width, p.scale, p.out_aligned != 0, [&](i32 i) -> T* {
            if (key_of(i) < 0) return nullptr;
            return static_cast<T*>(p.grad_key) + key_place<false>(p, p.grad_key_at, sequence, key_head, key_of(i));
        });
    }
    if constexpr (VALUES) {
        store_rows<T>(grad_value, p.value_width, 1.0f, p.out_aligned != 0, [&](i32 i) -> T* {
            if (key_of(i) < 0) return nullptr;
            return static_cast<T*>(p.grad_value) + key_place<false>(p, p.grad_value_at, sequence, key_head, key_of(i));
        });
    }
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_QUERY_GRADIENT(NAME, TYPE, K_WIDTH, V_WIDTH, WARPS, WALKED, BLOCKS, FEATURES, MOD)       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                  \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, const __grid_constant__ MOD::Captures captures) {\
        using Shape = tilewise::attention::BackwardShape<TYPE, K_WIDTH, V_WIDTH, WARPS, WALKED, 0>;                   \
        tilewise::attention::query_gradient<Shape, FEATURES, MOD>(problem, captures);                                 \
    }

#define INSTANTIATE_ATTENTION_KEY_GRADIENT(NAME, TYPE, K_WIDTH, V_WIDTH, WARPS, WALKED, WHAT, BLOCKS, FEATURES, MOD)   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                  \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, const __grid_constant__ MOD::Captures captures) {\
        using Shape = tilewise::attention::BackwardShape<TYPE, K_WIDTH, V_WIDTH, WARPS, WALKED, WHAT>;                \
        tilewise::attention::key_gradient<Shape, FEATURES, MOD>(problem, captures);                                   \
    }
