// What the compile gate must report: one kernel that keeps to registers and two that do not.

extern "C" __global__ void clean(float* x) { x[threadIdx.x] = x[threadIdx.x] * 2.0f; }

// 96 values are alive at once where 64 registers are to be had.
extern "C" __global__ void __launch_bounds__(1024) spills(float* x, long long stride, int turns) {
    float value[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) value[i] = x[i * stride + threadIdx.x];
    for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
        for (int i = 0; i < 96; ++i) value[i] = value[i] * value[(i + 31) % 96] + 1.0f;
    }
#pragma unroll
    for (int i = 0; i < 96; ++i) x[i * stride + threadIdx.x] = value[i];
}

// Registers cannot be indexed: the array goes to local memory, without a spill.
extern "C" __global__ void indexed(float* x, const int* index, int turns) {
    float value[64];
    for (int i = 0; i < 64; ++i) value[i] = x[i];
    for (int turn = 0; turn < turns; ++turn) value[index[turn] % 64] *= 2.0f;
    for (int i = 0; i < 64; ++i) x[i] = value[i];
}
