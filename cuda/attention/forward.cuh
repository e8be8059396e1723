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
//   6. SPLIT: a block sees a part of the columns and stores f32 and its lse; combine.cuh puts the parts together, and
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

namespace tilewise {
namespace attention {

// T: element type. K_WIDTH, V_WIDTH: widths in shared memory, multiples of 64. R: 16-row groups of a warp. COLUMNS: of a tile.
template <class Type, i32 K, i32 V, i32 ROWS_16, i32 WARPS_, i32 COLUMNS_, bool SPREAD_> struct ForwardShape {
    using T = Type;
    static constexpr i32 K_WIDTH = K, V_WIDTH = V, R = ROWS_16, WARPS = WARPS_, COLUMNS = COLUMNS_;
    static constexpr bool SPREAD = SPREAD_;
    static constexpr i32 THREADS = WARPS * 32, M = R * 16 * (SPREAD ? 1 : WARPS);
    static constexpr i32 OWN = SPREAD ? COLUMNS / WARPS : COLUMNS;  // columns of a warp
    static constexpr i32 Q_BYTES = M * ROW_BYTES<T, K>, K_BYTES = COLUMNS * ROW_BYTES<T, K>, V_BYTES = COLUMNS * ROW_BYTES<T, V>;
    static constexpr i32 KEYS = Q_BYTES + K_BYTES + V_BYTES;                // offset of two tiles of key numbers
    static constexpr i32 SCRATCH = KEYS + 2 * COLUMNS * 4;                  // f32: of each warp
    static constexpr i32 SCRATCH_OF_WARP = sizeof(T) == 4 ? R * 16 * OWN : 0;  // floats
};

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
        stage<T, N, decltype(width_in_shared)::value, Shape::THREADS>(target, base, width, p.aligned != 0, [&](i32 row) -> const T* {
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
    stage<T, Shape::M, Shape::K_WIDTH, Shape::THREADS>(q_tile, p.query, p.width, p.aligned != 0, [&](i32 row) -> const T* {
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
        block_barrier();  // keys are here; values of the tile before are done with
        copy_values(step);

        Sums<R, GROUPS> score;
        score.clear();
        Multiply<T>::template rows<Shape::K_WIDTH>(score, q_tile, warp_row, k_tile, warp_column);
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
        Multiply<T>::template weighted<Shape::V_WIDTH>(out, score, v_tile, warp_column, scratch);
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
}

}  // namespace attention
}  // namespace tilewise

#define INSTANTIATE_ATTENTION_FORWARD(NAME, TYPE, K_WIDTH, V_WIDTH, R, WARPS, COLUMNS, SPREAD, BLOCKS, FEATURES, MOD)  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                  \
        NAME(const __grid_constant__ tilewise::attention::Problem problem, const __grid_constant__ MOD::Captures captures) {\
        using Shape = tilewise::attention::ForwardShape<TYPE, K_WIDTH, V_WIDTH, R, WARPS, COLUMNS, SPREAD>;           \
        tilewise::attention::forward<Shape, FEATURES, MOD>(problem, captures);                                        \
    }
