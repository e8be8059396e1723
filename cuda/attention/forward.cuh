// Attention forward: out = softmax(mod(scale q k^T)) v over the kept keys, and the logarithm of the softmax's sum.
//
//   for each tile of packed rows (problem.cuh), for each tile of its columns:
//       score = mod(scale * (q . k)) * log2 e, -inf where not kept
//       new = max(reference, row maximum of score)
//       sum = sum * 2^(reference - new) + row sum of 2^(score - new)
//       out = out * 2^(reference - new) + 2^(score - new) v;   reference = new
//   out / sum, lse = (reference + log2 sum) * ln 2
//
// This is the online softmax (Milakov and Gimelshein 2018) in the order of FlashAttention-2 (Dao 2023). Departures:
//   1. The reference may stay `threshold` behind the maximum (FlashAttention-4): any reference gives the same quotient,
//      so a row is rescaled only when its weights could grow beyond 2^threshold. Each row decides alone, so that its
//      bits do not depend on its neighbours; a warp skips the products when none of its rows needs them.
//   2. While nothing is seen the reference is -inf, and 0 takes its place in differences: -inf - -inf never happens.
//   3. Columns are visited last to first, keys in two steps of a pipeline: values arrive while scores are computed, the
//      next keys while weights meet values. Two barriers a tile.
//   4. Elements are looked at one by one only in tiles that an edge crosses, or under a mod.
//   5. SPREAD: for few rows. All warps share one set of 16 rows and take turns in the columns of a tile; they are put
//      together at the end (decode).
//   6. A weight of 0 does not protect from a value that is not finite: 0 * NaN is NaN. Rows of which a column comes out
//      so are computed once more, by a warp, key by key over the kept keys alone: what a mask hides stays hidden.
//   7. SPLIT: a block sees a part of the columns and stores f32 and its lse; combine.cuh puts the parts together, and
//      adds the sinks.
#pragma once

#include "../common/block.cuh"
#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "../expr.cuh"
#include "../ptx/async.cuh"
#include "element.cuh"
#include "problem.cuh"
#include "tile.cuh"
#include "warpgroup.cuh"

namespace tilewise {
namespace attention {

// T: element type. K_WIDTH, V_WIDTH: widths in shared memory, multiples of 64. R: 16-row groups of a warp. COLUMNS: of a tile.
template <class Type, i32 K, i32 V, i32 ROWS_16, i32 WARPS_, i32 COLUMNS_, bool SPREAD_, bool WARPGROUPS_ = false> struct ForwardShape {
    using T = Type;
    static constexpr i32 K_WIDTH = K, V_WIDTH = V, R = ROWS_16, WARPS = WARPS_, COLUMNS = COLUMNS_;
    static constexpr bool SPREAD = SPREAD_, WARPGROUPS = WARPGROUPS_;
    static_assert(!WARPGROUPS || (R == 1 && WARPS % 4 == 0 && !SPREAD), "four warps hold 64 rows");
    static constexpr i32 THREADS = WARPS * 32, M = R * 16 * (SPREAD ? 1 : WARPS);
    static constexpr i32 OWN = SPREAD ? COLUMNS / WARPS : COLUMNS;  // columns of a warp
    static constexpr i32 Q_BYTES = M * ROW_BYTES<T, K>, K_BYTES = COLUMNS * ROW_BYTES<T, K>, V_BYTES = COLUMNS * ROW_BYTES<T, V>;
    static constexpr i32 KEYS = Q_BYTES + K_BYTES + V_BYTES;                // offset of two tiles of key numbers
    static constexpr i32 SCRATCH = KEYS + 2 * COLUMNS * 4;                  // f32: of each warp
    static constexpr i32 SCRATCH_OF_WARP = sizeof(T) == 4 ? R * 16 * OWN : 0;  // floats
};

// One row by all lanes of a warp: the definition, over the columns [begin, end). Lane l leaves columns l, l + 32, ... of the
// quotient in `value`. key_of(c): key of a column, or -1.
template <class Shape, i32 FEATURES, class Mod, class KeyOf>
__device__ __forceinline__ void row_by_row(f32 (&value)[Shape::V_WIDTH / 32], const Problem& p,
                                           const typename Mod::Captures& captures, const Sequence& sequence, const Row& row,
                                           i32 key_head, i32 begin, i32 end, i32 partials, f32 sink, const KeyOf& key_of) {
    using T = typename Shape::T;
    const T* query = static_cast<const T*>(p.query) + query_place(p.query_at, sequence, row.head, row.query);
    f32 peak = sink, sum = sink == -infinity() ? 0.0f : 1.0f;
#pragma unroll
    for (i32 i = 0; i < Shape::V_WIDTH / 32; ++i) value[i] = 0.0f;
#pragma unroll 1
    for (i32 c = begin; c < end; ++c) {
        const i32 key = key_of(c);
        if (key < 0 || !kept<Mod, FEATURES>(p, captures, sequence, row, key, c < partials)) continue;
        constexpr bool IN_PAGES = (FEATURES & PAGED) != 0;
        const T* own_key = static_cast<const T*>(p.key) + key_place<IN_PAGES>(p, p.key_at, sequence, key_head, key);
        const T* own_value = static_cast<const T*>(p.value) + key_place<IN_PAGES>(p, p.value_at, sequence, key_head, key);
        f32 dot = 0.0f;
#pragma unroll 1
        for (i32 d = lane_id(); d < p.width; d += WARP) dot = fmaf(to_f32(query[d]), to_f32(own_key[d]), dot);
        dot = warp_sum(dot) * p.scale;
        if (Mod::SCORE) dot = Mod::score(captures, dot, sequence.number, row.head, row.query, key);
        const f32 score = dot * LOG2_E, larger = fmaxf(peak, score), safe = larger == -infinity() ? 0.0f : larger;
        const f32 factor = exp2f(peak - safe);
        f32 weight = exp2f(score - safe);
        sum = sum * factor + weight;
        peak = larger;
        if (FEATURES & DROPOUT) weight = dropped(p, sequence, row.head, row.query, key) ? 0.0f : weight;
#pragma unroll
        for (i32 i = 0; i < Shape::V_WIDTH / 32; ++i) {
            const i32 column = i * WARP + lane_id();
            value[i] *= factor;
            if (column < p.value_width && weight != 0.0f) value[i] = fmaf(weight, to_f32(own_value[column]), value[i]);
        }
    }
    const f32 quotient = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (i32 i = 0; i < Shape::V_WIDTH / 32; ++i) value[i] *= quotient;
}

template <class Shape, i32 FEATURES, class Mod>
__device__ __forceinline__ void forward(const Problem& p, const typename Mod::Captures& captures) {
    using T = typename Shape::T;
    constexpr i32 R = Shape::R, GROUPS = Shape::OWN / 8, OUT = Shape::V_WIDTH / 8, N = Shape::COLUMNS;
    constexpr bool HAS_LISTS = (FEATURES & LISTS) != 0, IN_PAGES = (FEATURES & PAGED) != 0;
    static_assert(GROUPS % 2 == 0 && OUT % 2 == 0, "matrices are loaded in pairs");

    const Task<Shape::M> task(p, blockIdx.x);
    if (task.number < 0) return;
    const Sequence sequence(p, task.number);
    const i32 key_head = task.key_head;
    const Rows rows = rows_of(p, sequence, task.tile, Shape::M, task.first_head);
    if (rows.first >= rows.end) return;
    const Columns columns(p, sequence, rows, HAS_LISTS);

    const shared_t q_tile = shared_address(dynamic_shared()), k_tile = q_tile + Shape::Q_BYTES, v_tile = k_tile + Shape::K_BYTES;
    i32* const key_numbers = reinterpret_cast<i32*>(dynamic_shared() + Shape::KEYS);
    const i32 warp = static_cast<i32>(threadIdx.x) / WARP, lane = lane_id();
    f32* const scratch = reinterpret_cast<f32*>(dynamic_shared() + Shape::SCRATCH) + warp * Shape::SCRATCH_OF_WARP;
    const i32 warp_row = Shape::SPREAD ? 0 : warp * R * 16, warp_column = Shape::SPREAD ? warp * Shape::OWN : 0;

    // Which columns: of the first and the last query of the tile, then of this block's part.
    const i32 last_row = (rows.first + Shape::M < rows.end ? rows.first + Shape::M : rows.end) - 1;
    const i32 first_query = rows.query(p, rows.first), last_query = rows.query(p, last_row);
    i32 begin = HAS_LISTS ? 0 : sequence.low(p, first_query), end = HAS_LISTS ? columns.total : sequence.high(p, last_query);
    i32 part_begin = 0, part_end = NO_LIMIT;
    if (FEATURES & SPLIT) {
        const i64 all = HAS_LISTS ? columns.total : sequence.keys;
        const i64 each = p.split_keys > 0 ? p.split_keys : (all + p.splits - 1) / p.splits;
        const i64 from = each * blockIdx.y, to = from + each;
        part_begin = static_cast<i32>(from < all ? from : all);
        part_end = static_cast<i32>(to < all ? to : all);
        begin = begin > part_begin ? begin : part_begin;
        end = end < part_end ? end : part_end;
    }
    begin = begin / N * N;  // tiles begin at multiples, whoever visits them
    const i32 tiles = end > begin ? (end - begin + N - 1) / N : 0;
    // Between these keys every row of the tile keeps every key, as far as window and length say.
    const i32 inner_low = sequence.low(p, last_query), inner_high = sequence.high(p, first_query);

    // The rows of this thread: computed where they are needed, which is cheaper than registers all along.
    const auto row_at = [&](i32 i) -> Row {
        const i32 row = rows.first + warp_row + i * 8 + lane / 4;
        Row own;
        own.real = row < rows.end;
        own.query = rows.query(p, row);
        own.head = rows.head(p, row);
        own.low = own.real ? sequence.low(p, own.query) : 0;
        own.high = own.real ? sequence.high(p, own.query) : 0;
        if (!HAS_LISTS && own.low < part_begin) own.low = part_begin;
        if (!HAS_LISTS && own.high > part_end) own.high = part_end;
        return own;
    };

    const auto number_of = [&](i32 c) -> i32 {  // key of a column, or -1
        if (HAS_LISTS) return c < part_end && c >= part_begin ? columns.key(p, sequence, c) : -1;
        return c < sequence.keys ? c : -1;
    };
    const auto note_keys = [&](i32 step) {
        if (HAS_LISTS && static_cast<i32>(threadIdx.x) < N) {
            key_numbers[(step & 1) * N + threadIdx.x] = number_of(begin + (tiles - 1 - step) * N + static_cast<i32>(threadIdx.x));
        }
    };
    const auto copy_rows = [&](shared_t target, const void* base, const Axes& at, i32 width, i32 step, auto width_in_shared) {
        const T* from = static_cast<const T*>(base);
        const i32 start = begin + (tiles - 1 - step) * N;
        stage<T, N, decltype(width_in_shared)::value, Shape::THREADS, Shape::WARPGROUPS>(target, base, width, p.aligned != 0, [&](i32 row) -> const T* {
            const i32 key = number_of(start + row);
            return key < 0 ? nullptr : from + key_place<IN_PAGES>(p, at, sequence, key_head, key);
        });
        async_commit();
    };
    const auto copy_keys = [&](i32 step) {
        if (step < tiles) copy_rows(k_tile, p.key, p.key_at, p.width, step, Constant<Shape::K_WIDTH>{});
    };
    const auto copy_values = [&](i32 step) {
        copy_rows(v_tile, p.value, p.value_at, p.value_width, step, Constant<Shape::V_WIDTH>{});
    };

    Sums<R, OUT> out;
    out.clear();
    f32 reference[R][2], total[R][2];
#pragma unroll
    for (i32 i = 0; i < R * 2; ++i) {
        reference[i / 2][i % 2] = -infinity();
        total[i / 2][i % 2] = 0.0f;
    }

    const T* queries = static_cast<const T*>(p.query);
    stage<T, Shape::M, Shape::K_WIDTH, Shape::THREADS, Shape::WARPGROUPS>(q_tile, p.query, p.width, p.aligned != 0, [&](i32 row) -> const T* {
        const i32 packed = rows.first + row;
        if (packed >= rows.end) return nullptr;
        return queries + query_place(p.query_at, sequence, rows.head(p, packed), rows.query(p, packed));
    });
    async_commit();
    note_keys(0);
    copy_keys(0);

#pragma unroll 1
    for (i32 step = 0; step < tiles; ++step) {
        const i32 start = begin + (tiles - 1 - step) * N;
        async_wait<0>();
        if constexpr (Shape::WARPGROUPS) publish_copies();
        block_barrier();  // keys are here; values of the tile before are done with
        copy_values(step);

        Sums<R, GROUPS> score;
        if constexpr (Shape::WARPGROUPS) {
            MultiplyWarpgroup<T>::template rows<Shape::K_WIDTH, Shape::M, N>(score, q_tile, warp / 4 * 64, k_tile);
        } else {
            score.clear();
            Multiply<T>::template rows<Shape::K_WIDTH>(score, q_tile, warp_row, k_tile, warp_column);
        }
        note_keys(step + 1);

        const bool partial = !HAS_LISTS || start < columns.partials;
        bool edge;
        if (HAS_LISTS) {
            const i32 first = number_of(start), last = number_of(start + N - 1);
            const i32 within = start < columns.partials ? start : start - columns.partials;
            edge = first < inner_low || last < 0 || last >= inner_high || within / p.key_block != (within + N - 1) / p.key_block ||
                   (Mod::MASK && partial);
        } else {
            edge = start < inner_low || start + N > inner_high || start < part_begin || start + N > part_end || Mod::MASK;
        }
        if (edge || Mod::SCORE || (FEATURES & DENSE) != 0) {
            const i32* numbers = key_numbers + (step & 1) * N;
#pragma unroll
            for (i32 i = 0; i < R * 2; ++i) {
                const Row own = row_at(i);
#pragma unroll
                for (i32 j = 0; j < GROUPS; ++j) {
#pragma unroll
                    for (i32 k = 0; k < 2; ++k) {
                        const i32 column = warp_column + j * 8 + lane % 4 * 2 + k;
                        const i32 key = HAS_LISTS ? numbers[column] : start + column;
                        const bool decides = !HAS_LISTS || start + column < columns.partials;
                        f32& x = score.at[i / 2][j][i % 2 * 2 + k];
                        const bool keep = kept<Mod, FEATURES>(p, captures, sequence, own, key, decides);
                        if (Mod::SCORE) {
                            if (keep) x = Mod::score(captures, x * p.scale, sequence.number, own.head, own.query, key) * LOG2_E;
                        } else {
                            x *= p.scale_log2;
                        }
                        x = keep ? x : -infinity();
                    }
                }
            }
        } else {
#pragma unroll
            for (i32 i = 0; i < R * GROUPS * 4; ++i) score.at[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] *= p.scale_log2;
        }

        async_wait<0>();
        if constexpr (Shape::WARPGROUPS) publish_copies();
        block_barrier();  // values are here; keys are done with
        copy_keys(step + 1);

        f32 factor[R][2];
        bool rescale = false;
#pragma unroll
        for (i32 i = 0; i < R * 2; ++i) {
            f32 peak = -infinity();
#pragma unroll
            for (i32 j = 0; j < GROUPS; ++j) {
                peak = fmaxf(peak, fmaxf(score.at[i / 2][j][i % 2 * 2], score.at[i / 2][j][i % 2 * 2 + 1]));
            }
            peak = group_max<4>(peak);
            f32& own = reference[i / 2][i % 2];
            const bool grows = peak - own > p.threshold;  // NaN from -inf - -inf: nothing seen yet, no growth
            factor[i / 2][i % 2] = grows ? power_of_two<T>(own - peak) : 1.0f;
            if (grows) own = peak;
            rescale |= grows;
        }
        if (warp_any(rescale)) {
#pragma unroll
            for (i32 i = 0; i < R * 2; ++i) {
                total[i / 2][i % 2] *= factor[i / 2][i % 2];
#pragma unroll
                for (i32 j = 0; j < OUT; ++j) {
                    out.at[i / 2][j][i % 2 * 2] *= factor[i / 2][i % 2];
                    out.at[i / 2][j][i % 2 * 2 + 1] *= factor[i / 2][i % 2];
                }
            }
        }
#pragma unroll
        for (i32 i = 0; i < R * 2; ++i) {
            const f32 own = reference[i / 2][i % 2] == -infinity() ? 0.0f : reference[i / 2][i % 2];
#pragma unroll
            for (i32 j = 0; j < GROUPS; ++j) {
#pragma unroll
                for (i32 k = 0; k < 2; ++k) {
                    f32& x = score.at[i / 2][j][i % 2 * 2 + k];
                    x = power_of_two<T>(x - own);
                    total[i / 2][i % 2] += x;
                }
            }
        }
        if (FEATURES & DROPOUT) {
            const i32* numbers = key_numbers + (step & 1) * N;
#pragma unroll
            for (i32 i = 0; i < R * 2; ++i) {
                const Row own = row_at(i);
#pragma unroll
                for (i32 j = 0; j < GROUPS; ++j) {
                    const i32 column = warp_column + j * 8 + lane % 4 * 2;
                    u32 drop;
                    if (HAS_LISTS) {
                        drop = static_cast<u32>(dropped(p, sequence, own.head, own.query, numbers[column])) |
                               static_cast<u32>(dropped(p, sequence, own.head, own.query, numbers[column + 1])) << 1;
                    } else {
                        drop = dropped_pair(p, sequence, own.head, own.query, start + column);
                    }
                    if (drop & 1) score.at[i / 2][j][i % 2 * 2] = 0.0f;
                    if (drop & 2) score.at[i / 2][j][i % 2 * 2 + 1] = 0.0f;
                }
            }
        }
        if constexpr (Shape::WARPGROUPS) {
            MultiplyWarpgroup<T>::template weighted<N>(out, score, v_tile);
        } else {
            Multiply<T>::template weighted<Shape::V_WIDTH>(out, score, v_tile, warp_column, scratch);
        }
    }
    async_wait<0>();

#pragma unroll
    for (i32 i = 0; i < R * 2; ++i) total[i / 2][i % 2] = group_sum<4>(total[i / 2][i % 2]);

    if (Shape::SPREAD) {
        // Each warp's rows to shared memory; then every warp adds up a share of the columns, in the order of warps.
        constexpr i32 PITCH = Shape::V_WIDTH + 8;
        f32* const parts_of = reinterpret_cast<f32*>(dynamic_shared());  // [WARPS][16 R][PITCH]
        f32* const states = parts_of + Shape::WARPS * R * 16 * PITCH;    // [WARPS][16 R][2]
        block_barrier();
#pragma unroll
        for (i32 i = 0; i < R * 2; ++i) {
            const i32 row = warp * R * 16 + i * 8 + lane / 4;
#pragma unroll
            for (i32 j = 0; j < OUT; ++j) {
                parts_of[row * PITCH + j * 8 + lane % 4 * 2] = out.at[i / 2][j][i % 2 * 2];
                parts_of[row * PITCH + j * 8 + lane % 4 * 2 + 1] = out.at[i / 2][j][i % 2 * 2 + 1];
            }
            if (lane % 4 == 0) {
                states[row * 2] = reference[i / 2][i % 2];
                states[row * 2 + 1] = total[i / 2][i % 2];
            }
        }
        block_barrier();
#pragma unroll
        for (i32 i = 0; i < R * 2; ++i) {
            const i32 row = i * 8 + lane / 4;
            f32 peak = -infinity();
#pragma unroll
            for (i32 w = 0; w < Shape::WARPS; ++w) peak = fmaxf(peak, states[(w * R * 16 + row) * 2]);
            const f32 safe = peak == -infinity() ? 0.0f : peak;
            f32 sum = 0.0f, weight[Shape::WARPS];
#pragma unroll
            for (i32 w = 0; w < Shape::WARPS; ++w) {
                weight[w] = power_of_two<f32>(states[(w * R * 16 + row) * 2] - safe);
                sum += weight[w] * states[(w * R * 16 + row) * 2 + 1];
            }
            reference[i / 2][i % 2] = peak;
            total[i / 2][i % 2] = sum;
#pragma unroll
            for (i32 j = 0; j < OUT; ++j) {
                if (j % Shape::WARPS != warp) continue;
#pragma unroll
                for (i32 k = 0; k < 2; ++k) {
                    f32 value = 0.0f;
#pragma unroll
                    for (i32 w = 0; w < Shape::WARPS; ++w) {
                        value += weight[w] * parts_of[(w * R * 16 + row) * PITCH + j * 8 + lane % 4 * 2 + k];
                    }
                    out.at[i / 2][j][i % 2 * 2 + k] = value;
                }
            }
        }
    }

    // Sinks, the quotient, the stores.
    u32 odd = 0;  // bit i: row i of this thread has a column that is not finite, though its scores are
    // Where they go is found again: it need not stay in registers while tiles are multiplied.
    i64 block = blockIdx.x;
    forget(block);
    const Task<Shape::M> again(p, block);
    const Sequence place(p, again.number);
    const Rows targets = rows_of(p, place, again.tile, Shape::M, again.first_head);
#pragma unroll
    for (i32 i = 0; i < R * 2; ++i) {
        const i32 row = targets.first + warp_row + i * 8 + lane / 4;
        if (row >= targets.end) continue;
        const i32 own_query = targets.query(p, row), own_head = targets.head(p, row);
        f32 sum = total[i / 2][i % 2], peak = reference[i / 2][i % 2], factor = 1.0f;
        if ((FEATURES & SPLIT) == 0 && p.sinks != nullptr) {
            const f32 sink = p.sinks[own_head] * LOG2_E, larger = fmaxf(peak, sink), safe = larger == -infinity() ? 0.0f : larger;
            factor = power_of_two<f32>(peak - safe);
            sum = sum * factor + power_of_two<f32>(sink - safe);
            peak = larger;
        }
        const f32 quotient = sum == 0.0f ? 0.0f : factor / sum;
        const f32 lse = sum == 0.0f ? -infinity() : (peak + log2f(sum)) * LN_2;
#pragma unroll
        for (i32 j = 0; j < OUT; ++j) {
            if (Shape::SPREAD && j % Shape::WARPS != warp) continue;
            const f32 both = fabsf(out.at[i / 2][j][i % 2 * 2]) + fabsf(out.at[i / 2][j][i % 2 * 2 + 1]);
            if (!(both < infinity()) && sum < infinity()) odd |= 1u << i;
        }
        const bool stores_lse = lane % 4 == 0 && (!Shape::SPREAD || warp == 0);
        if (FEATURES & SPLIT) {
            const i64 part = ((blockIdx.y * p.batches + place.query_batch) * p.query_heads + own_head) * p.queries +
                            place.query_start + own_query;
            if (stores_lse) p.partial_lse[part] = lse;
            f32* target = p.partial + part * p.value_width;
#pragma unroll
            for (i32 j = 0; j < OUT; ++j) {
                const i32 column = j * 8 + lane % 4 * 2;
                if (column >= p.value_width || (Shape::SPREAD && j % Shape::WARPS != warp)) continue;
                store_two<f32>(target + column, out.at[i / 2][j][i % 2 * 2] * quotient, out.at[i / 2][j][i % 2 * 2 + 1] * quotient,
                               false, column + 1 < p.value_width);
            }
        } else {
            const f32 scaled = quotient * p.keep_scale;
            if (stores_lse) p.lse[query_place(p.lse_at, place, own_head, own_query)] = lse;
            T* target = static_cast<T*>(p.out) + query_place(p.out_at, place, own_head, own_query);
#pragma unroll
            for (i32 j = 0; j < OUT; ++j) {
                const i32 column = j * 8 + lane % 4 * 2;
                if (column >= p.value_width || (Shape::SPREAD && j % Shape::WARPS != warp)) continue;
                store_two<T>(target + column, out.at[i / 2][j][i % 2 * 2] * scaled, out.at[i / 2][j][i % 2 * 2 + 1] * scaled,
                             p.out_aligned != 0, column + 1 < p.value_width);
            }
        }
    }

    if (!warp_any(odd != 0)) return;
    warp_barrier();  // the stores above come first
#pragma unroll 1
    for (i32 i = 0; i < R * 16; ++i) {
        const u32 lanes = warp_ballot((odd >> (i / 8) & 1) != 0);
        const i32 row = targets.first + warp_row + i;
        if ((lanes >> (i % 8 * 4) & 15) == 0 || row >= targets.end) continue;
        Row own;
        own.real = true;
        own.query = targets.query(p, row);
        own.head = targets.head(p, row);
        own.low = place.low(p, own.query);
        own.high = place.high(p, own.query);
        if (!HAS_LISTS && own.low < part_begin) own.low = part_begin;
        if (!HAS_LISTS && own.high > part_end) own.high = part_end;
        const bool with_sink = (FEATURES & SPLIT) == 0 && p.sinks != nullptr;
        f32 value[Shape::V_WIDTH / 32];
        row_by_row<Shape, FEATURES, Mod>(value, p, captures, place, own, again.key_head, begin, end,
                                         HAS_LISTS ? columns.partials : NO_LIMIT,
                                         with_sink ? p.sinks[own.head] * LOG2_E : -infinity(), number_of);
        const i64 part = ((blockIdx.y * p.batches + place.query_batch) * p.query_heads + own.head) * p.queries +
                         place.query_start + own.query;
        T* target = static_cast<T*>(p.out) + query_place(p.out_at, place, own.head, own.query);
#pragma unroll
        for (i32 k = 0; k < Shape::V_WIDTH / 32; ++k) {
            const i32 column = k * WARP + lane;
            if (column >= p.value_width) continue;
            if (FEATURES & SPLIT) p.partial[part * p.value_width + column] = value[k];
            else target[column] = from_f32<T>(value[k] * p.keep_scale);
        }
    }
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_FORWARD(NAME, TYPE, K_WIDTH, V_WIDTH, R, WARPS, COLUMNS, SPREAD, WARPGROUPS, FEATURES,  \
                                      MOD)                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                                  \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, const __grid_constant__ MOD::Captures captures) {\
        using Shape = tilewise::attention::ForwardShape<TYPE, K_WIDTH, V_WIDTH, R, WARPS, COLUMNS, SPREAD, WARPGROUPS>;\
        tilewise::attention::forward<Shape, FEATURES, MOD>(problem, captures);                                        \
    }
