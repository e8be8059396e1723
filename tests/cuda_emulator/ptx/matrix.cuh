// Stands in for cuda/ptx/matrix.cuh: which lane holds which element is written out as in the PTX manual.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "shared.cuh"

namespace tilewise {

inline void load_matrices(shared_t row, u32& m0, u32& m1, u32& m2, u32& m3) {
    const std::uint64_t* rows = emulator::exchange(row);
    const i32 lane = lane_id();
    u32* const words[4] = {&m0, &m1, &m2, &m3};
    for (i32 i = 0; i < 4; ++i) {
        std::memcpy(words[i], shared_pointer<char>(rows[8 * i + lane / 4], 16) + lane % 4 * 4, 4);
    }
}

inline void load_matrices_transposed(shared_t row, u32& m0, u32& m1, u32& m2, u32& m3) {
    const std::uint64_t* rows = emulator::exchange(row);
    const i32 lane = lane_id();
    u32* const words[4] = {&m0, &m1, &m2, &m3};
    for (i32 i = 0; i < 4; ++i) {
        u16 pair[2];
        for (i32 k = 0; k < 2; ++k) {
            std::memcpy(&pair[k], shared_pointer<char>(rows[8 * i + lane % 4 * 2 + k], 16) + lane / 4 * 2, 2);
        }
        *words[i] = pair[0] | static_cast<u32>(pair[1]) << 16;
    }
}

// Products are exact and sums are rounded once: hardware adds in an order of its own, in about f32.
template <class T> inline void multiply_add(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const std::uint64_t* all = emulator::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const i32 lane = lane_id(), group = lane / 4, member = lane % 4;
    const auto element = [&](i32 word, i32 holder, i32 half) {
        return static_cast<double>(to_f32(T{static_cast<u16>(all[word * WARP + holder] >> 16 * half)}));
    };
    double total[4] = {sum[0], sum[1], sum[2], sum[3]};
    for (i32 k = 0; k < 16; ++k) {
        const i32 within = k % 8 / 2, half = k % 2;
        const double upper = element(k < 8 ? 0 : 2, group * 4 + within, half);
        const double lower = element(k < 8 ? 1 : 3, group * 4 + within, half);
        for (i32 c = 0; c < 2; ++c) {
            const double right = element(k < 8 ? 4 : 5, (member * 2 + c) * 4 + within, half);
            total[c] += upper * right;
            total[2 + c] += lower * right;
        }
    }
    for (i32 i = 0; i < 4; ++i) sum[i] = static_cast<f32>(total[i]);
}

}  // namespace tilewise
