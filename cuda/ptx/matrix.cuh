// Small matrices spread over a warp: loads from shared memory, and products on the tensor cores (sm_80 and up).
//
// Lane l of an 8 x 8 matrix of 16-bit elements holds row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1, in one word.
#pragma once

#include "../common/types.cuh"
#include "shared.cuh"

namespace tilewise {

// Four 8 x 8 matrices. Lanes 8 i .. 8 i + 7 say where the eight rows of matrix i lie, 16 bytes each.
__device__ __forceinline__ void load_matrices(shared_t row, u32& m0, u32& m1, u32& m2, u32& m3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed on the way: what lies in memory as row i becomes column i.
__device__ __forceinline__ void load_matrices_transposed(shared_t row, u32& m0, u32& m1, u32& m2, u32& m3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
                 : "r"(row)
                 : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], in f32. Of `a` the words are its quarters: upper left, lower left, upper right,
// lower right; of `b`, held transposed, the upper and the lower half. Lane l has rows l / 4 and l / 4 + 8 of `sum`.
template <class T> __device__ __forceinline__ void multiply_add(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <> __device__ __forceinline__ void multiply_add<f16>(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <> __device__ __forceinline__ void multiply_add<bf16>(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tilewise
