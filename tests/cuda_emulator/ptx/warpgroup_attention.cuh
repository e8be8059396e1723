// Stands in for cuda/ptx/warpgroup_attention.cuh, over the descriptors and the delayed products of warpgroup.cuh.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "warpgroup.cuh"

namespace tilewise {

template <i32 GROUPS> inline void warpgroup_settle(f32 (&)[GROUPS][4]) { warpgroup_wait<0>(); }

inline void begin_product(emulator::Product& product, f32* sum, bool add) {
    emulator::Thread& thread = emulator::threads[emulator::current];
    product.seen = product.compute();
    product.sum = sum;
    product.add = add;
    thread.products.push_back(std::move(product));
}

template <class T, i32 GROUPS> inline void warpgroup_scores(T, f32 (&sum)[GROUPS][4], u64 left, u64 right, bool add) {
    const i32 row = static_cast<i32>(threadIdx.x) / WARP % 4 * 16 + lane_id() / 4, pair = lane_id() % 4 * 2;
    emulator::Product product;
    product.compute = [=] {
        std::vector<double> total(GROUPS * 4);
        for (i32 i = 0; i < 2; ++i) {
            for (i32 k = 0; k < 16; ++k) {
                const double value = operand<T>(left, false, row + 8 * i, k);
                for (i32 j = 0; j < GROUPS * 2; ++j) {
                    total[j / 2 * 4 + i * 2 + j % 2] += value * operand<T>(right, false, j / 2 * 8 + pair + j % 2, k);
                }
            }
        }
        return total;
    };
    begin_product(product, &sum[0][0], add);
}

template <class T, i32 GROUPS> inline void warpgroup_weighted(T, f32 (&sum)[GROUPS][4], const u32 (&left)[4], u64 right) {
    const std::uint64_t* all = emulator::exchange({left[0], left[1], left[2], left[3]});
    const i32 group = lane_id() / 4, pair = lane_id() % 4 * 2;
    double own[2][16];  // rows l / 4 and l / 4 + 8 of this warp's operand
    for (i32 i = 0; i < 2; ++i) {
        for (i32 k = 0; k < 16; ++k) {
            const std::uint64_t word = all[(k / 8 * 2 + i) * WARP + group * 4 + k % 8 / 2];
            own[i][k] = to_f32(T{static_cast<u16>(word >> 16 * (k % 2))});
        }
    }
    std::vector<double> weights(&own[0][0], &own[0][0] + 32);
    emulator::Product product;
    product.compute = [=] {
        std::vector<double> total(GROUPS * 4);
        for (i32 k = 0; k < 16; ++k) {
            for (i32 j = 0; j < GROUPS * 2; ++j) {
                const double value = operand<T>(right, true, j / 2 * 8 + pair + j % 2, k);
                for (i32 i = 0; i < 2; ++i) total[j / 2 * 4 + i * 2 + j % 2] += weights[i * 16 + k] * value;
            }
        }
        return total;
    };
    begin_product(product, &sum[0][0], true);
}

}  // namespace tilewise
