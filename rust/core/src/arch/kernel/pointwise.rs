//! Lane-wise functions: gated activations, scaling, conversions.

use crate::arch::vector::{Half, Vector};
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

#[inline(always)]
unsafe fn gelu<V: Vector>(x: V) -> V {
    // The error function has no short polynomial of full accuracy: lane by lane through libm.
    // SAFETY: lane arithmetic.
    unsafe { by_lane(x, |x| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))) }
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

/// Rows 2i and 2i + 1 of a lane-major block become row i of bfloat16 pairs; an odd last row is paired with zeros.
///
/// # Safety
/// `block` holds `rows * width` lanes, `pairs` `ceil(rows / 2) * width` units; `width` is a multiple of the lanes.
#[inline(always)]
pub(crate) unsafe fn interleave<V: Half>(block: *const f32, rows: usize, width: usize, pairs: *mut u32) {
    for pair in 0..rows.div_ceil(2) {
        let mut lane = 0;
        while lane < width {
            // SAFETY: both rows are inside the block.
            unsafe {
                let low = V::load(block.add(2 * pair * width + lane));
                let mut high = V::splat(0.0);
                if 2 * pair + 1 < rows {
                    high = V::load(block.add((2 * pair + 1) * width + lane));
                }
                V::store_pairs(low, high, pairs.add(pair * width + lane));
            }
            lane += V::LANES;
        }
    }
}

/// Rounds `count` elements to bfloat16.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn round<V: Half>(from: *const f32, to: *mut u16, count: usize) {
    // SAFETY: inside both rows; the ragged end goes through a buffer of one register.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            V::load(from.add(i)).store_bf16(to.add(i));
            i += V::LANES;
        }
        if whole < count {
            let (mut lanes, mut rounded) = ([0f32; 16], [0u16; 16]);
            std::ptr::copy_nonoverlapping(from.add(whole), lanes.as_mut_ptr(), count - whole);
            V::load(lanes.as_ptr()).store_bf16(rounded.as_mut_ptr());
            std::ptr::copy_nonoverlapping(rounded.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// `row[lane] *= factor[lane]` for every row of a lane-major block.
///
/// # Safety
/// `block` holds `rows * width` lanes and `factor` `width`; `width` is a multiple of the lanes.
#[inline(always)]
pub(crate) unsafe fn scale_rows<V: Vector>(block: *mut V::Elem, rows: usize, width: usize, factor: *const V::Elem) {
    for row in 0..rows {
        let mut lane = 0;
        while lane < width {
            // SAFETY: inside the block.
            unsafe {
                let at = block.add(row * width + lane);
                V::load(at).mul(V::load(factor.add(lane))).store(at);
            }
            lane += V::LANES;
        }
    }
}

/// `sum[i] += weight * x[i]` over `count` elements of any number.
///
/// # Safety
/// Both pointers hold `count` elements.
#[inline(always)]
pub(crate) unsafe fn add_scaled<V: Vector>(sum: *mut V::Elem, x: *const V::Elem, weight: V::Elem, count: usize) {
    // SAFETY: inside both rows.
    unsafe {
        let factor = V::splat(weight);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            V::load(x.add(i)).mul_add(factor, V::load(sum.add(i))).store(sum.add(i));
            i += V::LANES;
        }
        while i < count {
            *sum.add(i) = *sum.add(i) + *x.add(i) * weight;
            i += 1;
        }
    }
}

/// The largest `row[i] * factor`.
///
/// # Safety
/// `row` holds `count` elements.
#[inline(always)]
pub(crate) unsafe fn row_max<V: Vector>(row: *const V::Elem, factor: V::Elem, count: usize) -> V::Elem {
    // SAFETY: inside the row.
    unsafe {
        let mut tops = V::splat(V::Elem::NEG_INFINITY);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            tops = V::load(row.add(i)).mul(V::splat(factor)).max(tops);
            i += V::LANES;
        }
        let mut lanes = [V::Elem::NEG_INFINITY; 16];
        tops.store(lanes.as_mut_ptr());
        let mut top = V::Elem::NEG_INFINITY;
        for value in lanes.into_iter().take(V::LANES).chain((whole..count).map(|i| *row.add(i) * factor)) {
            if value > top {
                top = value;
            }
        }
        top
    }
}

/// `row[i] = 2^(row[i] * factor - reference)`; returns the sum.
///
/// # Safety
/// `row` holds `count` elements.
#[inline(always)]
pub(crate) unsafe fn row_exp2<V: Vector>(
    row: *mut V::Elem,
    factor: V::Elem,
    reference: V::Elem,
    count: usize,
) -> V::Elem {
    // SAFETY: inside the row; the ragged end goes through a buffer of one register.
    unsafe {
        let (scale, minus) = (V::splat(factor), V::splat(-reference));
        let mut sums = V::splat(V::Elem::ZERO);
        let whole = count / V::LANES * V::LANES;
        let mut i = 0;
        while i < whole {
            let p = V::load(row.add(i)).mul_add(scale, minus).exp2();
            sums = sums.add(p);
            p.store(row.add(i));
            i += V::LANES;
        }
        if whole < count {
            let mut lanes = [V::Elem::NEG_INFINITY; 16];
            std::ptr::copy_nonoverlapping(row.add(whole), lanes.as_mut_ptr(), count - whole);
            let mut p = [V::Elem::ZERO; 16];
            V::load(lanes.as_ptr()).mul_add(scale, minus).exp2().store(p.as_mut_ptr());
            let mut rest = V::Elem::ZERO;
            for (at, &value) in p.iter().enumerate().take(count - whole) {
                row.add(whole + at).write(value);
                rest = rest + value;
            }
            return sums.sum() + rest;
        }
        sums.sum()
    }
}
