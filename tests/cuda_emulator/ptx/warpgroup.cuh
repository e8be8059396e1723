// Stands in for cuda/ptx/warpgroup.cuh: descriptors are taken apart again, and elements found through the canonical
// layouts of the 128-byte swizzle. A product happens when it is waited for, and must then still read what it read when it
// was issued: operands that change in between, or that were not published to the tensor cores, are faults.
#pragma once

#include "../common/types.cuh"
#include "../common/warp.cuh"
#include "shared.cuh"

namespace tilewise {

// An address in a descriptor has 18 bits; here it counts from the start of dynamic shared memory.
inline u64 descriptor(shared_t tile, i32 slab) {
    const u64 address = tile - shared_address(emulator::dynamic_shared);
    if (address >= 1 << 18 || address % 16 != 0) emulator::fault = "an operand that no descriptor can name";
    return address >> 4 | static_cast<u64>(slab >> 4) << 16 | static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}

inline void publish_copies() { emulator::publish(); }

inline void warpgroup_begin() {}

inline void warpgroup_commit() {
    emulator::Thread& thread = emulator::threads[emulator::current];
    thread.product_groups.push_back(thread.products.size());
}

template <i32 PENDING> inline void warpgroup_wait() {
    emulator::Thread& thread = emulator::threads[emulator::current];
    if (thread.product_groups.size() <= PENDING) return;
    const std::size_t arrived = thread.product_groups.size() - PENDING, count = thread.product_groups[arrived - 1];
    for (std::size_t i = 0; i < count; ++i) {
        emulator::Product& product = thread.products[i];
        const std::vector<double> now = product.compute();
        if (std::memcmp(now.data(), product.seen.data(), now.size() * sizeof(double)) != 0) {
            emulator::fault = "an operand of a product changed while it was read";
        }
        for (std::size_t k = 0; k < now.size(); ++k) {
            product.sum[k] = static_cast<f32>((product.add ? static_cast<double>(product.sum[k]) : 0.0) + now[k]);
        }
    }
    thread.products.erase(thread.products.begin(), thread.products.begin() + static_cast<std::ptrdiff_t>(count));
    thread.product_groups.erase(thread.product_groups.begin(),
                                thread.product_groups.begin() + static_cast<std::ptrdiff_t>(arrived));
    for (std::size_t& end : thread.product_groups) end -= count;
}

inline void warpgroup_finish(f32 (&)[128]) { warpgroup_wait<0>(); }

// Element (free, depth) of an operand. The swizzle exchanges chunks of 16 bytes by the address's own bits.
template <class T> inline double operand(u64 descriptor, bool across, i32 free, i32 depth) {
    const u64 start = (descriptor & 0x3fff) << 4, lead = (descriptor >> 16 & 0x3fff) << 4, step = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) emulator::fault = "not the 128-byte swizzle";
    u64 address = across ? start + free / 64 * lead + free % 64 * 2 + depth / 8 * step + depth % 8 * 128
                         : start + free / 8 * step + free % 8 * 128 + depth * 2;
    address ^= (address >> 7 & 7) << 4;
    if (emulator::unpublished[address / 16]) emulator::fault = "operands were not published to the tensor cores";
    return to_f32(*shared_pointer<T>(shared_address(emulator::dynamic_shared) + address, 2));
}

// sum [64, 256] += left [64, 16] right [16, 256]: which lane holds which sums is written out as in the PTX manual.
template <bool LEFT_ACROSS, bool RIGHT_ACROSS, class T>
inline void warpgroup_multiply_add(T, f32 (&sum)[128], u64 left, u64 right, bool add) {
    const i32 row = static_cast<i32>(threadIdx.x) / WARP % 4 * 16 + lane_id() / 4, pair = lane_id() % 4 * 2;
    emulator::Thread& thread = emulator::threads[emulator::current];
    emulator::Product product;
    product.compute = [=] {
        double upper[16], lower[16];
        for (i32 k = 0; k < 16; ++k) {
            upper[k] = operand<T>(left, LEFT_ACROSS, row, k);
            lower[k] = operand<T>(left, LEFT_ACROSS, row + 8, k);
        }
        std::vector<double> total(128);
        for (i32 j = 0; j < 64; ++j) {
            const i32 column = j / 2 * 8 + pair + j % 2;
            for (i32 k = 0; k < 16; ++k) {
                const double value = operand<T>(right, RIGHT_ACROSS, column, k);
                total[j / 2 * 4 + j % 2] += upper[k] * value;
                total[j / 2 * 4 + 2 + j % 2] += lower[k] * value;
            }
        }
        return total;
    };
    product.seen = product.compute();
    product.sum = sum;
    product.add = add;
    thread.products.push_back(std::move(product));
}

}  // namespace tilewise
