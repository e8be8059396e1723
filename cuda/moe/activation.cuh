// The activations of the expert layer, their slopes, and the choice of one at run time.
//
//   plain    A = curve(gate)                       silu, gelu, gelu_tanh, relu, relu2
//   gated    A = curve(gate) * up                  swiglu, geglu, geglu_tanh, reglu
//   clamped  A = g sigmoid(alpha g) * (u + 1),     g = min(gate, limit), u = clamp(up, -limit, limit)
//
// Slopes at a kink are torch's: 0 for relu at 0, 1 for a clamp at its bound.
#pragma once

#include "../common/math.cuh"
#include "../common/types.cuh"

namespace tilewise {
namespace moe {

enum Activation : i32 {
    SWIGLU = 0,
    GEGLU = 1,
    GEGLU_TANH = 2,
    REGLU = 3,
    SWIGLU_CLAMPED = 4,
    SILU = 5,
    GELU = 6,
    GELU_TANH = 7,
    RELU = 8,
    RELU2 = 9,
};

__device__ __forceinline__ bool is_gated(i32 activation) { return activation <= SWIGLU_CLAMPED; }

struct Constants {
    f32 alpha, limit;  // of SWIGLU_CLAMPED
};

// A function of one number, and its slope.
struct Curve {
    f32 value, slope;
};

// x sigmoid(gain x). Beyond |gain x| = 1e4 the slope is 0 or 1 for long; the bound keeps 0 * infinity away.
template <bool FAST> __device__ __forceinline__ Curve silu_curve(f32 x, f32 gain) {
    const f32 z = gain * x;
    const f32 share = logistic<FAST>(z);
    const f32 bounded = fminf(fmaxf(z, -1e4f), 1e4f);
    return {x * share, share * (1.0f + bounded * (1.0f - share))};
}

template <bool FAST> __device__ __forceinline__ Curve gelu_curve(f32 x) {
    const f32 share = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return {x * share, share + x * 0.39894228040143268f * exponential_of<FAST>(-0.5f * x * x)};
}

// 0.5 x (1 + tanh(s)) = x sigmoid(2 s), s = sqrt(2 / pi) (x + 0.044715 x^3). From |x| = 12 on a share is 0 or 1.
template <bool FAST> __device__ __forceinline__ Curve gelu_tanh_curve(f32 x) {
    const f32 near = fminf(fmaxf(x, -12.0f), 12.0f), square = near * near;
    const f32 share = logistic<FAST>(1.5957691216057308f * near * (1.0f + 0.044715f * square));
    const f32 steep = 1.5957691216057308f * (1.0f + 0.134145f * square);
    return {x * share, share + near * share * (1.0f - share) * steep};
}

template <i32 ACTIVATION, bool FAST> __device__ __forceinline__ Curve curve(f32 x) {
    if (ACTIVATION == SWIGLU || ACTIVATION == SILU) return silu_curve<FAST>(x, 1.0f);
    if (ACTIVATION == GEGLU || ACTIVATION == GELU) return gelu_curve<FAST>(x);
    if (ACTIVATION == GEGLU_TANH || ACTIVATION == GELU_TANH) return gelu_tanh_curve<FAST>(x);
    const f32 positive = x > 0.0f || x != x ? x : 0.0f;  // NaN stays
    if (ACTIVATION == RELU2) return {positive * positive, 2.0f * positive};
    return {positive, x > 0.0f ? 1.0f : 0.0f};
}

// The activation of one unit, and its slopes in gate and up.
struct Slopes {
    f32 value, gate, up;
};

template <i32 ACTIVATION, bool FAST>
__device__ __forceinline__ Slopes activate(f32 gate, f32 up, Constants constants) {
    if (ACTIVATION == SWIGLU_CLAMPED) {
        const f32 limit = constants.limit;
        const f32 g = gate > limit ? limit : gate;
        const f32 u = up > limit ? limit : up < -limit ? -limit : up;
        const Curve c = silu_curve<FAST>(g, constants.alpha);
        return {c.value * (u + 1.0f), gate > limit ? 0.0f : c.slope * (u + 1.0f), up == u || up != up ? c.value : 0.0f};
    }
    const Curve c = curve<ACTIVATION, FAST>(gate);
    if (!is_gated(ACTIVATION)) return {c.value, c.slope, 0.0f};
    return {c.value * up, c.slope * up, c.value};
}

template <i32 VALUE> struct Chosen {
    static constexpr i32 value = VALUE;
};

// Calls `body` with the activation as a constant: one jump a tile, and no test within it.
template <class Body> __device__ __forceinline__ void with_activation(i32 activation, const Body& body) {
    switch (activation) {
        case SWIGLU: body(Chosen<SWIGLU>{}); break;
        case GEGLU: body(Chosen<GEGLU>{}); break;
        case GEGLU_TANH: body(Chosen<GEGLU_TANH>{}); break;
        case REGLU: body(Chosen<REGLU>{}); break;
        case SWIGLU_CLAMPED: body(Chosen<SWIGLU_CLAMPED>{}); break;
        case SILU: body(Chosen<SILU>{}); break;
        case GELU: body(Chosen<GELU>{}); break;
        case GELU_TANH: body(Chosen<GELU_TANH>{}); break;
        case RELU: body(Chosen<RELU>{}); break;
        default: body(Chosen<RELU2>{}); break;
    }
}

// Row of gate_up that holds column `column` of H: H has all gates, then all ups; gate_up may alternate them.
struct GateUp {
    i64 units;  // n
    bool interleaved;

    __device__ __forceinline__ i64 row(i64 column) const {
        if (!interleaved) return column;
        return column < units ? 2 * column : 2 * (column - units) + 1;
    }
};

}  // namespace moe
}  // namespace tilewise
