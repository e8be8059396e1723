// Philox4x32-10, as rust/core/src/rng.rs has it: four numbers are a function of a key and a counter.
#pragma once

#include "types.cuh"

namespace tilewise {

struct Words {
    u32 x, y, z, w;
};

__device__ __forceinline__ Words philox(Words c, u32 key0, u32 key1) {
#pragma unroll
    for (i32 round = 0; round < 10; ++round) {
        const u64 wide0 = static_cast<u64>(0xD2511F53u) * c.x, wide1 = static_cast<u64>(0xCD9E8D57u) * c.z;
        c = {static_cast<u32>(wide1 >> 32) ^ c.y ^ key0, static_cast<u32>(wide1),
             static_cast<u32>(wide0 >> 32) ^ c.w ^ key1, static_cast<u32>(wide0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

}  // namespace tilewise
