//! The function between an expert's two products, and its derivative.

use crate::arch::vector::Vector;
use crate::dtype::Real;

/// The activation between an expert's two products. `gate` and `up` are the two halves of the first product; the
/// plain ones take `gate` alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`
    Swiglu,
    /// `gelu(gate) * up`, exact (erf)
    Geglu,
    /// `gelu(gate) * up`, tanh approximation
    GegluTanh,
    /// `relu(gate) * up`
    Reglu,
    /// MiniMax-M3 and gpt-oss: `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)`, `g = min(gate, limit)`
    SwigluClamped {
        /// Gain inside the sigmoid.
        alpha: f64,
        /// Bound of both halves.
        limit: f64,
    },
    /// `silu(x)`
    Silu,
    /// `gelu(x)`, exact (erf)
    Gelu,
    /// `gelu(x)`, tanh approximation
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)^2`
    Relu2,
}

impl Activation {
    /// Whether the first product has two halves.
    pub fn gated(self) -> bool {
        use Activation::{Geglu, GegluTanh, Reglu, Swiglu, SwigluClamped};
        matches!(self, Swiglu | Geglu | GegluTanh | Reglu | SwigluClamped { .. })
    }
}

#[inline(always)]
unsafe fn sigmoid<V: Vector>(x: V) -> V {
    // SAFETY: lane arithmetic. 2^(-x log2 e) may be inf: then 1 / inf = 0, the limit.
    unsafe {
        let one = V::splat(V::Elem::ONE);
        one.div(one.add(x.mul(V::splat(V::Elem::of(-std::f64::consts::LOG2_E))).exp2()))
    }
}

#[inline(always)]
unsafe fn by_lane<V: Vector>(x: V, f: impl Fn(f64) -> f64) -> V {
    let mut lanes = [V::Elem::ZERO; 16];
    // SAFETY: LANES is at most 16.
    unsafe {
        x.store(lanes.as_mut_ptr());
        for lane in lanes.iter_mut().take(V::LANES) {
            *lane = V::Elem::of(f(lane.f64()));
        }
        V::load(lanes.as_ptr())
    }
}

#[inline(always)]
unsafe fn relu<V: Vector>(x: V) -> V {
    // SAFETY: lane arithmetic; `max` lets a NaN in its second operand through.
    unsafe { V::splat(V::Elem::ZERO).max(x) }
}

#[inline(always)]
unsafe fn gelu_tanh<V: Vector>(x: V) -> V {
    // 0.5 (1 + tanh(y)) = sigmoid(2 y), y = sqrt(2/pi) (x + 0.044715 x^3)
    // SAFETY: lane arithmetic.
    unsafe {
        let cubed = x.mul(x).mul(x);
        let y = cubed.mul_add(V::splat(V::Elem::of(0.044_715)), x);
        x.mul(sigmoid(y.mul(V::splat(V::Elem::of(2.0 * (2.0 / std::f64::consts::PI).sqrt())))))
    }
}

/// Ascending coefficients of `exp(z^2) erfc(z) / t` in `t = 1 / (1 + 0.45 z)`, z >= 0: a minimax fit of relative error
/// 3.2e-8 (Lawson's iteration on 200 Chebyshev nodes of t, values to 40 digits).
pub(crate) const SCALED_ERFC: [f64; 10] = [
    0.253_885_320_938_142_64,
    0.253_883_150_209_516_7,
    0.228_271_898_226_812_32,
    0.175_249_750_137_041_86,
    0.119_962_245_989_987_61,
    -0.022_391_981_095_131_165,
    0.142_459_538_668_973_82,
    -0.300_641_741_456_102_34,
    0.190_720_385_049_365_8,
    -0.041_398_553_088_626_84,
];
/// The constant in `t`.
pub(crate) const SCALED_ERFC_GAIN: f64 = 0.45;

/// (Phi(x), phi(x)): distribution and density of the normal law. Relative error of x Phi(x) below 6e-7 for |x| < 3, then
/// growing with the rounding of x^2 (7e-6 at -13). Double precision goes lane by lane through libm, for correctness.
#[inline(always)]
unsafe fn normal<V: Vector>(x: V) -> (V, V) {
    let scale = 1.0 / (2.0 * std::f64::consts::PI).sqrt();
    // SAFETY: lane arithmetic.
    unsafe {
        if size_of::<V::Elem>() == 8 {
            let distribution = by_lane(x, |x| 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2));
            return (distribution, by_lane(x, |x| libm::exp(-0.5 * x * x) * scale));
        }
        let c = |value: f64| V::splat(V::Elem::of(value));
        let size = c(0.0).sub(x).max(x);
        let t = c(1.0).div(size.mul_add(c(SCALED_ERFC_GAIN * std::f64::consts::FRAC_1_SQRT_2), c(1.0)));
        let mut sum = c(SCALED_ERFC[9]);
        for &coefficient in SCALED_ERFC[..9].iter().rev() {
            sum = sum.mul_add(t, c(coefficient));
        }
        let bell = x.mul(x).mul(c(-0.5 * std::f64::consts::LOG2_E)).exp2();
        let tail = sum.mul(t).mul(bell).mul(c(0.5));
        (x.where_greater(c(0.0), c(1.0).sub(tail), tail), bell.mul(c(scale)))
    }
}

#[inline(always)]
unsafe fn gelu<V: Vector>(x: V) -> V {
    // SAFETY: lane arithmetic.
    unsafe { x.mul(normal(x).0) }
}

#[inline(always)]
unsafe fn activate<V: Vector>(kind: Activation, gate: V, up: V) -> V {
    // SAFETY: lane arithmetic.
    unsafe {
        let c = |value: f64| V::splat(V::Elem::of(value));
        match kind {
            Activation::Swiglu => gate.mul(sigmoid(gate)).mul(up),
            Activation::Geglu => gelu(gate).mul(up),
            Activation::GegluTanh => gelu_tanh(gate).mul(up),
            Activation::Reglu => relu(gate).mul(up),
            Activation::SwigluClamped { alpha, limit } => {
                let gate = c(limit).min(gate);
                let up = c(limit).min(c(-limit).max(up));
                up.add(c(1.0)).mul(gate.mul(sigmoid(gate.mul(c(alpha)))))
            }
            Activation::Silu => gate.mul(sigmoid(gate)),
            Activation::Gelu => gelu(gate),
            Activation::GeluTanh => gelu_tanh(gate),
            Activation::Relu => relu(gate),
            Activation::Relu2 => {
                let x = relu(gate);
                x.mul(x)
            }
        }
    }
}

/// `gate[i] = act(gate[i], up[i])`, in place.
///
/// # Safety
/// Both pointers hold `count` elements, a multiple of the lanes (`up` may equal `gate` for plain activations).
#[inline(always)]
pub(crate) unsafe fn activation<V: Vector>(kind: Activation, gate: *mut V::Elem, up: *const V::Elem, count: usize) {
    let mut i = 0;
    while i < count {
        // SAFETY: i + LANES <= count.
        unsafe { activate(kind, V::load(gate.add(i)), V::load(up.add(i))).store(gate.add(i)) };
        i += V::LANES;
    }
}

/// Derivative of the sigmoid-weighted unit `x sigmoid(a x)`, given `s = sigmoid(a x)`: `s (1 + a x (1 - s))`.
#[inline(always)]
unsafe fn silu_slope<V: Vector>(scaled: V, s: V) -> V {
    // SAFETY: lane arithmetic.
    unsafe {
        let one = V::splat(V::Elem::ONE);
        s.mul(scaled.mul_add(one.sub(s), one))
    }
}

/// `gelu'(x)` of the tanh approximation `x s(2y)`: `s + x s (1 - s) (2y)'`.
#[inline(always)]
unsafe fn gelu_tanh_slope<V: Vector>(x: V) -> V {
    // SAFETY: lane arithmetic.
    unsafe {
        let c = |value: f64| V::splat(V::Elem::of(value));
        let gain = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
        // Beyond +-30 the slope is 1 or 0 in every type; the square of a huge x would make it 0 times infinity.
        let x = c(30.0).min(c(-30.0).max(x));
        let square = x.mul(x);
        let s = sigmoid(x.mul(square.mul_add(c(0.044_715), c(1.0))).mul(c(gain)));
        let inner = square.mul_add(c(3.0 * 0.044_715), c(1.0)).mul(c(gain));
        s.mul(c(1.0).sub(s)).mul(x).mul_add(inner, s)
    }
}

/// `gelu(x) = x Phi(x)` and its derivative `Phi(x) + x phi(x)`.
#[inline(always)]
unsafe fn gelu_with_slope<V: Vector>(x: V) -> (V, V) {
    // SAFETY: lane arithmetic.
    unsafe {
        let (distribution, density) = normal(x);
        (x.mul(distribution), x.mul_add(density, distribution))
    }
}

/// (value, d value / d gate, d value / d up) for one register; the last is unused by plain activations.
#[inline(always)]
unsafe fn differentiate<V: Vector>(kind: Activation, gate: V, up: V) -> (V, V, V) {
    // SAFETY: lane arithmetic.
    unsafe {
        let c = |value: f64| V::splat(V::Elem::of(value));
        let (zero, one) = (c(0.0), c(1.0));
        let step = |x: V, value: V| x.where_greater(zero, value, zero);
        match kind {
            Activation::Swiglu => {
                let s = sigmoid(gate);
                let unit = gate.mul(s);
                (unit.mul(up), up.mul(silu_slope(gate, s)), unit)
            }
            Activation::Geglu => {
                let (unit, slope) = gelu_with_slope(gate);
                (unit.mul(up), up.mul(slope), unit)
            }
            Activation::GegluTanh => {
                let unit = gelu_tanh(gate);
                (unit.mul(up), up.mul(gelu_tanh_slope(gate)), unit)
            }
            Activation::Reglu => {
                let unit = relu(gate);
                (unit.mul(up), step(gate, up), unit)
            }
            Activation::SwigluClamped { alpha, limit } => {
                // A clamp passes the gradient at its bounds and stops it beyond, as torch's does.
                let (high, low) = (c(limit), c(-limit));
                let g = high.min(gate);
                let u = high.min(low.max(up)).add(one);
                let scaled = g.mul(c(alpha));
                let s = sigmoid(scaled);
                let unit = g.mul(s);
                let slope = gate.where_greater(high, zero, u.mul(silu_slope(scaled, s)));
                let inside = up.where_greater(high, zero, low.where_greater(up, zero, unit));
                (unit.mul(u), slope, inside)
            }
            Activation::Silu => {
                let s = sigmoid(gate);
                (gate.mul(s), silu_slope(gate, s), zero)
            }
            Activation::Gelu => {
                let (value, slope) = gelu_with_slope(gate);
                (value, slope, zero)
            }
            Activation::GeluTanh => (gelu_tanh(gate), gelu_tanh_slope(gate), zero),
            Activation::Relu => (relu(gate), step(gate, one), zero),
            Activation::Relu2 => {
                let x = relu(gate);
                (x.mul(x), x.add(x), zero)
            }
        }
    }
}

/// The step back through the activation of one row, in place, with `g = grad`, the gradient of the activated row
/// before the routing weight `scale`:
///
/// `gate = scale g act_gate`, `up = scale g act_up`, `grad = scale act`; returns `<g, act>`, the weight's own gradient.
///
/// # Safety
/// The pointers hold `count` elements, a multiple of the lanes (`up` may be null for plain activations).
#[inline(always)]
pub(crate) unsafe fn gradient<V: Vector>(
    kind: Activation,
    gate: *mut V::Elem,
    up: *mut V::Elem,
    grad: *mut V::Elem,
    scale: V::Elem,
    count: usize,
) -> V::Elem {
    // SAFETY: i + LANES <= count.
    unsafe {
        let factor = V::splat(scale);
        let mut dot = V::splat(V::Elem::ZERO);
        let mut i = 0;
        while i < count {
            let g = V::load(grad.add(i));
            let other = if up.is_null() { factor } else { V::load(up.add(i)) };
            let (value, by_gate, by_up) = differentiate(kind, V::load(gate.add(i)), other);
            dot = g.mul_add(value, dot);
            let scaled = g.mul(factor);
            scaled.mul(by_gate).store(gate.add(i));
            if !up.is_null() {
                scaled.mul(by_up).store(up.add(i));
            }
            value.mul(factor).store(grad.add(i));
            i += V::LANES;
        }
        dot.sum()
    }
}
