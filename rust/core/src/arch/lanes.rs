//! The operations of expressions, by level: as `table`, for `kernel/lanes.rs`. Integers and truth values have the same
//! bits on every level; floating-point functions are accurate to a few units in the last place on each.

use super::kernel::elementary::Elementary;
use super::kernel::lanes as kernel;
use super::{Level, level};
use crate::dtype::{Dtype, Real};
use crate::view::Array;
use half::{bf16, f16};

pub use kernel::{Binary, Compare, Mask, Operand, Own, TRUE, Unary};
pub(crate) use kernel::{floor_divide, modulo};

/// An index along one axis of a captured array.
#[derive(Debug, Clone, Copy)]
pub enum Index<'s> {
    /// 32-bit.
    Short(Operand<'s, i32>),
    /// 64-bit.
    Long(Operand<'s, i64>),
}

/// Operations on floats of one type, and conversions from and to it.
pub struct Floats<T: 'static> {
    unary: unsafe fn(Unary, Operand<'_, T>, &mut [T]),
    binary: unsafe fn(Binary, Operand<'_, T>, Operand<'_, T>, &mut [T]),
    update: unsafe fn(Binary, Own, Operand<'_, T>, &mut [T]),
    add_product: unsafe fn(Operand<'_, T>, Operand<'_, T>, &mut [T]),
    compare: unsafe fn(Compare, Operand<'_, T>, Operand<'_, T>, &mut [Mask]),
    select: unsafe fn(Operand<'_, Mask>, Operand<'_, T>, Operand<'_, T>, &mut [T]),
    blank: unsafe fn(&[Mask], T, &mut [T]),
    spread: unsafe fn(&[T], usize, &mut [T]),
    from_i32: unsafe fn(Operand<'_, i32>, &mut [T]),
    from_i64: unsafe fn(Operand<'_, i64>, &mut [T]),
    from_mask: unsafe fn(Operand<'_, Mask>, &mut [T]),
    to_i64: unsafe fn(Operand<'_, T>, &mut [i64]),
    read: unsafe fn(Dtype, *const u8, &[i64], &mut [T]),
    read_line: unsafe fn(Dtype, *const u8, &[i32], i32, isize, &mut [T]) -> bool,
    read_tile: unsafe fn(Dtype, *const u8, &[i64], &[i64], &mut [T]),
}

/// Operations on integers of one width.
pub struct Integers<I: 'static> {
    unary: unsafe fn(Unary, Operand<'_, I>, &mut [I]),
    binary: unsafe fn(Binary, Operand<'_, I>, Operand<'_, I>, &mut [I]) -> bool,
    compare: unsafe fn(Compare, Operand<'_, I>, Operand<'_, I>, &mut [Mask]),
    select: unsafe fn(Operand<'_, Mask>, Operand<'_, I>, Operand<'_, I>, &mut [I]),
    spread: unsafe fn(&[I], usize, &mut [I]),
    from_mask: unsafe fn(Operand<'_, Mask>, &mut [I]),
    offsets: unsafe fn(Operand<'_, I>, usize, isize, &mut [i64]) -> bool,
    read: unsafe fn(Dtype, *const u8, &[i64], &mut [I]),
    read_line: unsafe fn(Dtype, *const u8, &[i32], i32, isize, &mut [I]) -> bool,
    read_tile: unsafe fn(Dtype, *const u8, &[i64], &[i64], &mut [I]),
}

/// Operations on truth values, and what does not depend on a type.
pub struct Logic {
    binary: unsafe fn(Binary, Operand<'_, Mask>, Operand<'_, Mask>, &mut [Mask]),
    select: unsafe fn(Operand<'_, Mask>, Operand<'_, Mask>, Operand<'_, Mask>, &mut [Mask]),
    spread: unsafe fn(&[Mask], usize, &mut [Mask]),
    widen: unsafe fn(Operand<'_, i32>, &mut [i64]),
    read: unsafe fn(*const u8, &[i64], &mut [Mask]),
    read_line: unsafe fn(*const u8, &[i32], i32, isize, &mut [Mask]) -> bool,
    read_tile: unsafe fn(*const u8, &[i64], &[i64], &mut [Mask]),
}

/// Where elements of one array are, as far as the indices along some of its axes say.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// The array they were computed for: its extents and strides.
    shape: Vec<usize>,
    strides: Vec<isize>,
    /// Which axes are known, one bit each.
    axes: u32,
    offsets: Vec<i64>,
}

impl Addresses {
    /// Computes addresses from indices along some axes, `count` of them. Returns whether every index was inside (others
    /// count as 0).
    pub fn compute(&mut self, array: &Array<'_>, indices: &[(usize, Index<'_>)], count: usize) -> bool {
        self.shape = array.shape().to_vec();
        self.strides = array.strides().to_vec();
        self.axes = 0;
        self.offsets.clear();
        self.offsets.resize(count, 0);
        let mut inside = true;
        for &(axis, index) in indices {
            assert!(self.axes & (1 << axis) == 0, "an axis twice");
            self.axes |= 1 << axis;
            inside &= add_offsets(index, self.shape[axis], self.strides[axis], &mut self.offsets);
        }
        inside
    }
}

/// The offsets of `rows` (from some row on) and of `lanes`, checked to fit the array and an output.
fn complete<'s>(
    array: &Array<'_>,
    rows: &'s Addresses,
    from: usize,
    lanes: &'s Addresses,
    count: usize,
) -> (&'s [i64], &'s [i64]) {
    for part in [rows, lanes] {
        assert!(part.shape == array.shape() && part.strides == array.strides(), "addresses of another array");
    }
    let all = (1u64 << array.shape().len()) - 1;
    assert!(rows.axes & lanes.axes == 0 && u64::from(rows.axes | lanes.axes) == all && !array.is_empty());
    let width = lanes.offsets.len();
    assert!(width > 0 && count.is_multiple_of(width));
    (&rows.offsets[from..from + count / width], &lanes.offsets)
}

fn add_offsets(index: Index<'_>, extent: usize, stride: isize, offsets: &mut [i64]) -> bool {
    match index {
        Index::Short(index) => <i32 as IntegerLane>::integers().offsets(index, extent, stride, offsets),
        Index::Long(index) => <i64 as IntegerLane>::integers().offsets(index, extent, stride, offsets),
    }
}

fn fits<X>(operand: &Operand<'_, X>, count: usize) -> bool {
    match operand {
        Operand::Slice(slice) => slice.len() == count,
        Operand::Splat(_) => true,
    }
}

/// Adds up the offsets of the elements an index list addresses. Returns whether every index was inside.
fn address(array: &Array<'_>, indices: &[Index<'_>], offsets: &mut [i64]) -> bool {
    assert!(indices.len() == array.shape().len() && !array.is_empty(), "gather: rank or extents");
    offsets.fill(0);
    let mut inside = true;
    for ((index, &extent), &stride) in indices.iter().zip(array.shape()).zip(array.strides()) {
        inside &= add_offsets(*index, extent, stride, offsets);
    }
    inside
}

impl<T: Real> Floats<T> {
    /// A function of one number.
    pub fn unary(&self, op: Unary, a: Operand<'_, T>, out: &mut [T]) {
        assert!(fits(&a, out.len()));
        // SAFETY: the level is available (see `table`), here and below.
        unsafe { (self.unary)(op, a, out) }
    }

    /// A function of two numbers.
    pub fn binary(&self, op: Binary, a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T]) {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.binary)(op, a, b, out) }
    }

    /// A function of two numbers, one of which is the output's old value: +, -, *, /, min, max.
    pub fn update(&self, op: Binary, own: Own, other: Operand<'_, T>, out: &mut [T]) {
        assert!(fits(&other, out.len()));
        // SAFETY: as above.
        unsafe { (self.update)(op, own, other, out) }
    }

    /// `out += a * b`, rounded twice.
    pub fn add_product(&self, a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T]) {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.add_product)(a, b, out) }
    }

    /// A comparison.
    pub fn compare(&self, op: Compare, a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [Mask]) {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.compare)(op, a, b, out) }
    }

    /// `a` where `c` holds, else `b`.
    pub fn select(&self, c: Operand<'_, Mask>, a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T]) {
        assert!(fits(&c, out.len()) && fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.select)(c, a, b, out) }
    }

    /// Writes `value` where the mask is false.
    pub fn blank(&self, mask: &[Mask], value: T, block: &mut [T]) {
        assert_eq!(mask.len(), block.len());
        // SAFETY: as above.
        unsafe { (self.blank)(mask, value, block) }
    }

    /// Each value `width` times.
    pub fn spread(&self, from: &[T], width: usize, out: &mut [T]) {
        assert!(width > 0 && from.len() * width == out.len());
        // SAFETY: as above.
        unsafe { (self.spread)(from, width, out) }
    }

    /// Conversion of 32-bit integers.
    pub fn from_i32(&self, a: Operand<'_, i32>, out: &mut [T]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.from_i32)(a, out) }
    }

    /// Conversion of 64-bit integers.
    pub fn from_i64(&self, a: Operand<'_, i64>, out: &mut [T]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.from_i64)(a, out) }
    }

    /// 1 or 0.
    pub fn from_mask(&self, a: Operand<'_, Mask>, out: &mut [T]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.from_mask)(a, out) }
    }

    /// Toward zero, saturating; 0 for NaN.
    pub fn to_i64(&self, a: Operand<'_, T>, out: &mut [i64]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.to_i64)(a, out) }
    }

    /// Reads elements of a floating-point array; returns whether every index was inside (others read element 0).
    pub fn gather(&self, array: &Array<'_>, indices: &[Index<'_>], offsets: &mut [i64], out: &mut [T]) -> bool {
        assert!(matches!(array.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16));
        if let ([Index::Short(Operand::Slice(index))], Ok(extent)) = (indices, i32::try_from(array.len()))
            && array.shape().len() == 1
            && extent > 0
        {
            assert_eq!(index.len(), out.len());
            // SAFETY: indices below the extent are elements; level as above.
            return unsafe { (self.read_line)(array.dtype(), array.as_ptr(), index, extent, array.strides()[0], out) };
        }
        let offsets = &mut offsets[..out.len()];
        let inside = address(array, indices, offsets);
        // SAFETY: every offset is the sum of indices inside their axes times the strides; level as above.
        unsafe { (self.read)(array.dtype(), array.as_ptr(), offsets, out) }
        inside
    }

    /// Reads `out[r][l]` from the sum of a row's and a lane's address.
    pub fn gather_tile(&self, array: &Array<'_>, rows: &Addresses, from: usize, lanes: &Addresses, out: &mut [T]) {
        assert!(matches!(array.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16));
        let (rows, lanes) = complete(array, rows, from, lanes, out.len());
        // SAFETY: together the two know every axis, each with indices inside it; level as above.
        unsafe { (self.read_tile)(array.dtype(), array.as_ptr(), rows, lanes, out) }
    }
}

impl<I: IntegerLane> Integers<I> {
    /// A function of one integer.
    pub fn unary(&self, op: Unary, a: Operand<'_, I>, out: &mut [I]) {
        assert!(fits(&a, out.len()));
        // SAFETY: the level is available (see `table`), here and below.
        unsafe { (self.unary)(op, a, out) }
    }

    /// A function of two integers; false if a divisor was 0 (the result is 0 there).
    pub fn binary(&self, op: Binary, a: Operand<'_, I>, b: Operand<'_, I>, out: &mut [I]) -> bool {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.binary)(op, a, b, out) }
    }

    /// A comparison.
    pub fn compare(&self, op: Compare, a: Operand<'_, I>, b: Operand<'_, I>, out: &mut [Mask]) {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.compare)(op, a, b, out) }
    }

    /// `a` where `c` holds, else `b`.
    pub fn select(&self, c: Operand<'_, Mask>, a: Operand<'_, I>, b: Operand<'_, I>, out: &mut [I]) {
        assert!(fits(&c, out.len()) && fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.select)(c, a, b, out) }
    }

    /// Each value `width` times.
    pub fn spread(&self, from: &[I], width: usize, out: &mut [I]) {
        assert!(width > 0 && from.len() * width == out.len());
        // SAFETY: as above.
        unsafe { (self.spread)(from, width, out) }
    }

    /// 1 or 0.
    pub fn from_mask(&self, a: Operand<'_, Mask>, out: &mut [I]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.from_mask)(a, out) }
    }

    fn offsets(&self, index: Operand<'_, I>, extent: usize, stride: isize, offsets: &mut [i64]) -> bool {
        assert!(fits(&index, offsets.len()));
        // SAFETY: as above.
        unsafe { (self.offsets)(index, extent, stride, offsets) }
    }

    /// Reads elements of an integer array; returns whether every index was inside (others read element 0).
    pub fn gather(&self, array: &Array<'_>, indices: &[Index<'_>], offsets: &mut [i64], out: &mut [I]) -> bool {
        assert!(matches!(array.dtype(), Dtype::I8 | Dtype::I32 | Dtype::I64));
        if let ([Index::Short(Operand::Slice(index))], Ok(extent)) = (indices, i32::try_from(array.len()))
            && array.shape().len() == 1
            && extent > 0
        {
            assert_eq!(index.len(), out.len());
            // SAFETY: indices below the extent are elements; level as above.
            return unsafe { (self.read_line)(array.dtype(), array.as_ptr(), index, extent, array.strides()[0], out) };
        }
        let offsets = &mut offsets[..out.len()];
        let inside = address(array, indices, offsets);
        // SAFETY: every offset is the sum of indices inside their axes times the strides; level as above.
        unsafe { (self.read)(array.dtype(), array.as_ptr(), offsets, out) }
        inside
    }

    /// Reads `out[r][l]` from the sum of a row's and a lane's address.
    pub fn gather_tile(&self, array: &Array<'_>, rows: &Addresses, from: usize, lanes: &Addresses, out: &mut [I]) {
        assert!(matches!(array.dtype(), Dtype::I8 | Dtype::I32 | Dtype::I64));
        let (rows, lanes) = complete(array, rows, from, lanes, out.len());
        // SAFETY: together the two know every axis, each with indices inside it; level as above.
        unsafe { (self.read_tile)(array.dtype(), array.as_ptr(), rows, lanes, out) }
    }
}

impl Logic {
    /// The table of the level in use.
    pub fn table() -> &'static Logic {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &x86::avx2_logic::TABLE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => &x86::avx512_logic::TABLE,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => &arm::neon_logic::TABLE,
            _ => &scalar_logic::TABLE,
        }
    }

    /// And, or, exclusive or.
    pub fn binary(&self, op: Binary, a: Operand<'_, Mask>, b: Operand<'_, Mask>, out: &mut [Mask]) {
        assert!(fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: the level is available (see `table`), here and below.
        unsafe { (self.binary)(op, a, b, out) }
    }

    /// `a` where `c` holds, else `b`.
    pub fn select(&self, c: Operand<'_, Mask>, a: Operand<'_, Mask>, b: Operand<'_, Mask>, out: &mut [Mask]) {
        assert!(fits(&c, out.len()) && fits(&a, out.len()) && fits(&b, out.len()));
        // SAFETY: as above.
        unsafe { (self.select)(c, a, b, out) }
    }

    /// Each value `width` times.
    pub fn spread(&self, from: &[Mask], width: usize, out: &mut [Mask]) {
        assert!(width > 0 && from.len() * width == out.len());
        // SAFETY: as above.
        unsafe { (self.spread)(from, width, out) }
    }

    /// 32-bit integers to 64-bit ones.
    pub fn widen(&self, a: Operand<'_, i32>, out: &mut [i64]) {
        assert!(fits(&a, out.len()));
        // SAFETY: as above.
        unsafe { (self.widen)(a, out) }
    }

    /// Reads elements of a boolean array; returns whether every index was inside (others read element 0).
    pub fn gather(&self, array: &Array<'_>, indices: &[Index<'_>], offsets: &mut [i64], out: &mut [Mask]) -> bool {
        assert!(array.dtype() == Dtype::Bool);
        if let ([Index::Short(Operand::Slice(index))], Ok(extent)) = (indices, i32::try_from(array.len()))
            && array.shape().len() == 1
            && extent > 0
        {
            assert_eq!(index.len(), out.len());
            // SAFETY: indices below the extent are elements; level as above.
            return unsafe { (self.read_line)(array.as_ptr(), index, extent, array.strides()[0], out) };
        }
        let offsets = &mut offsets[..out.len()];
        let inside = address(array, indices, offsets);
        // SAFETY: every offset is the sum of indices inside their axes times the strides; level as above.
        unsafe { (self.read)(array.as_ptr(), offsets, out) }
        inside
    }

    /// Reads `out[r][l]` from the sum of a row's and a lane's address.
    pub fn gather_tile(&self, array: &Array<'_>, rows: &Addresses, from: usize, lanes: &Addresses, out: &mut [Mask]) {
        assert!(array.dtype() == Dtype::Bool);
        let (rows, lanes) = complete(array, rows, from, lanes, out.len());
        // SAFETY: together the two know every axis, each with indices inside it; level as above.
        unsafe { (self.read_tile)(array.as_ptr(), rows, lanes, out) }
    }

    /// Row-major offsets of index lists into extents; returns whether every index was inside (others count as 0).
    pub fn offsets(&self, extents: &[usize], indices: &[Index<'_>], offsets: &mut [i64]) -> bool {
        offsets.fill(0);
        let (mut inside, mut stride) = (true, 1isize);
        for (index, &extent) in indices.iter().zip(extents).rev() {
            inside &= add_offsets(*index, extent, stride, offsets);
            stride *= extent as isize;
        }
        inside
    }
}

/// Floating-point types of expressions.
pub trait FloatLane: Real {
    /// The table of the level in use.
    fn floats() -> &'static Floats<Self>;
    /// Rounds a number of double precision to this type.
    fn rounded(value: f64) -> f64 {
        Self::of(value).f64()
    }
}

/// Integer types of expressions.
pub trait IntegerLane: Copy + 'static {
    /// The table of the level in use.
    fn integers() -> &'static Integers<Self>;
}

macro_rules! floats {
    ($module:ident, $t:ty, $fused:literal, $(#[$gate:meta])*) => {
        pub(super) mod $module {
            use super::*;
            $(#[$gate])*
            unsafe fn unary(op: Unary, a: Operand<'_, $t>, out: &mut [$t]) {
                kernel::float_unary::<$t, $fused>(op, a, out);
            }
            $(#[$gate])*
            unsafe fn binary(op: Binary, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [$t]) {
                kernel::float_binary(op, a, b, out);
            }
            $(#[$gate])*
            unsafe fn update(op: Binary, own: Own, other: Operand<'_, $t>, out: &mut [$t]) {
                kernel::float_update(op, own, other, out);
            }
            $(#[$gate])*
            unsafe fn add_product(a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [$t]) {
                kernel::add_product(a, b, out);
            }
            $(#[$gate])*
            unsafe fn compare(op: Compare, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [Mask]) {
                kernel::compare(op, a, b, out);
            }
            $(#[$gate])*
            unsafe fn select(c: Operand<'_, Mask>, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [$t]) {
                kernel::select(c, a, b, out);
            }
            $(#[$gate])*
            unsafe fn blank(mask: &[Mask], value: $t, block: &mut [$t]) {
                kernel::blank(mask, value, block);
            }
            $(#[$gate])*
            unsafe fn spread(from: &[$t], width: usize, out: &mut [$t]) {
                kernel::spread(from, width, out);
            }
            $(#[$gate])*
            unsafe fn from_i32(a: Operand<'_, i32>, out: &mut [$t]) {
                kernel::map(a, out, <$t as Elementary>::from_i32);
            }
            $(#[$gate])*
            unsafe fn from_i64(a: Operand<'_, i64>, out: &mut [$t]) {
                kernel::map(a, out, <$t as Elementary>::from_i64);
            }
            $(#[$gate])*
            unsafe fn from_mask(a: Operand<'_, Mask>, out: &mut [$t]) {
                kernel::map(a, out, |a| if a != 0 { 1.0 } else { 0.0 });
            }
            $(#[$gate])*
            unsafe fn to_i64(a: Operand<'_, $t>, out: &mut [i64]) {
                kernel::map(a, out, <$t as Elementary>::to_i64);
            }
            $(#[$gate])*
            unsafe fn read(dtype: Dtype, from: *const u8, offsets: &[i64], out: &mut [$t]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe {
                    match dtype {
                        Dtype::F32 => kernel::read(from.cast::<f32>(), offsets, out, |x| x as $t),
                        Dtype::F64 => kernel::read(from.cast::<f64>(), offsets, out, |x| x as $t),
                        Dtype::F16 => kernel::read(from.cast::<f16>(), offsets, out, |x| x.to_f32() as $t),
                        _ => kernel::read(from.cast::<bf16>(), offsets, out, |x| x.to_f32() as $t),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn read_line(dtype: Dtype, from: *const u8, index: &[i32], extent: i32, stride: isize, out: &mut [$t]) -> bool {
                // SAFETY: the caller guarantees the extent and the type.
                unsafe {
                    match dtype {
                        Dtype::F32 => kernel::read_line(from.cast::<f32>(), index, extent, stride, out, |x| x as $t),
                        Dtype::F64 => kernel::read_line(from.cast::<f64>(), index, extent, stride, out, |x| x as $t),
                        Dtype::F16 => kernel::read_line(from.cast::<f16>(), index, extent, stride, out, |x| x.to_f32() as $t),
                        _ => kernel::read_line(from.cast::<bf16>(), index, extent, stride, out, |x| x.to_f32() as $t),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn read_tile(dtype: Dtype, from: *const u8, rows: &[i64], lanes: &[i64], out: &mut [$t]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe {
                    match dtype {
                        Dtype::F32 => kernel::read_tile(from.cast::<f32>(), rows, lanes, out, |x| x as $t),
                        Dtype::F64 => kernel::read_tile(from.cast::<f64>(), rows, lanes, out, |x| x as $t),
                        Dtype::F16 => kernel::read_tile(from.cast::<f16>(), rows, lanes, out, |x| x.to_f32() as $t),
                        _ => kernel::read_tile(from.cast::<bf16>(), rows, lanes, out, |x| x.to_f32() as $t),
                    }
                }
            }
            pub static TABLE: Floats<$t> =
                Floats { unary, binary, update, add_product, compare, select, blank, spread, from_i32, from_i64, from_mask, to_i64, read, read_line, read_tile };
        }
    };
}

macro_rules! integers {
    ($module:ident, $t:ty, $(#[$gate:meta])*) => {
        pub(super) mod $module {
            use super::*;
            $(#[$gate])*
            unsafe fn unary(op: Unary, a: Operand<'_, $t>, out: &mut [$t]) {
                kernel::integer_unary(op, a, out);
            }
            $(#[$gate])*
            unsafe fn binary(op: Binary, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [$t]) -> bool {
                kernel::integer_binary(op, a, b, out)
            }
            $(#[$gate])*
            unsafe fn compare(op: Compare, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [Mask]) {
                kernel::compare(op, a, b, out);
            }
            $(#[$gate])*
            unsafe fn select(c: Operand<'_, Mask>, a: Operand<'_, $t>, b: Operand<'_, $t>, out: &mut [$t]) {
                kernel::select(c, a, b, out);
            }
            $(#[$gate])*
            unsafe fn spread(from: &[$t], width: usize, out: &mut [$t]) {
                kernel::spread(from, width, out);
            }
            $(#[$gate])*
            unsafe fn from_mask(a: Operand<'_, Mask>, out: &mut [$t]) {
                kernel::map(a, out, <$t as kernel::Integer>::from_mask);
            }
            $(#[$gate])*
            unsafe fn offsets(index: Operand<'_, $t>, extent: usize, stride: isize, offsets: &mut [i64]) -> bool {
                kernel::offsets(index, extent, stride, offsets)
            }
            $(#[$gate])*
            unsafe fn read(dtype: Dtype, from: *const u8, offsets: &[i64], out: &mut [$t]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe {
                    match dtype {
                        Dtype::I8 => kernel::read(from.cast::<i8>(), offsets, out, |x| x as $t),
                        Dtype::I32 => kernel::read(from.cast::<i32>(), offsets, out, |x| x as $t),
                        _ => kernel::read(from.cast::<i64>(), offsets, out, |x| x as $t),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn read_line(dtype: Dtype, from: *const u8, index: &[i32], extent: i32, stride: isize, out: &mut [$t]) -> bool {
                // SAFETY: the caller guarantees the extent and the type.
                unsafe {
                    match dtype {
                        Dtype::I8 => kernel::read_line(from.cast::<i8>(), index, extent, stride, out, |x| x as $t),
                        Dtype::I32 => kernel::read_line(from.cast::<i32>(), index, extent, stride, out, |x| x as $t),
                        _ => kernel::read_line(from.cast::<i64>(), index, extent, stride, out, |x| x as $t),
                    }
                }
            }
            $(#[$gate])*
            unsafe fn read_tile(dtype: Dtype, from: *const u8, rows: &[i64], lanes: &[i64], out: &mut [$t]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe {
                    match dtype {
                        Dtype::I8 => kernel::read_tile(from.cast::<i8>(), rows, lanes, out, |x| x as $t),
                        Dtype::I32 => kernel::read_tile(from.cast::<i32>(), rows, lanes, out, |x| x as $t),
                        _ => kernel::read_tile(from.cast::<i64>(), rows, lanes, out, |x| x as $t),
                    }
                }
            }
            pub static TABLE: Integers<$t> =
                Integers { unary, binary, compare, select, spread, from_mask, offsets, read, read_line, read_tile };
        }
    };
}

macro_rules! logic {
    ($module:ident, $(#[$gate:meta])*) => {
        pub(super) mod $module {
            use super::*;
            $(#[$gate])*
            unsafe fn binary(op: Binary, a: Operand<'_, Mask>, b: Operand<'_, Mask>, out: &mut [Mask]) {
                kernel::logic(op, a, b, out);
            }
            $(#[$gate])*
            unsafe fn select(c: Operand<'_, Mask>, a: Operand<'_, Mask>, b: Operand<'_, Mask>, out: &mut [Mask]) {
                kernel::select(c, a, b, out);
            }
            $(#[$gate])*
            unsafe fn spread(from: &[Mask], width: usize, out: &mut [Mask]) {
                kernel::spread(from, width, out);
            }
            $(#[$gate])*
            unsafe fn widen(a: Operand<'_, i32>, out: &mut [i64]) {
                kernel::map(a, out, i64::from);
            }
            $(#[$gate])*
            unsafe fn read(from: *const u8, offsets: &[i64], out: &mut [Mask]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe { kernel::read(from, offsets, out, |x| kernel::truth(x != 0)) }
            }
            $(#[$gate])*
            unsafe fn read_line(from: *const u8, index: &[i32], extent: i32, stride: isize, out: &mut [Mask]) -> bool {
                // SAFETY: the caller guarantees the extent and the type.
                unsafe { kernel::read_line(from, index, extent, stride, out, |x| kernel::truth(x != 0)) }
            }
            $(#[$gate])*
            unsafe fn read_tile(from: *const u8, rows: &[i64], lanes: &[i64], out: &mut [Mask]) {
                // SAFETY: the caller guarantees the offsets and the type.
                unsafe { kernel::read_tile(from, rows, lanes, out, |x| kernel::truth(x != 0)) }
            }
            pub static TABLE: Logic = Logic { binary, select, spread, widen, read, read_line, read_tile };
        }
    };
}

floats!(scalar_f32, f32, false,);
floats!(scalar_f64, f64, false,);
integers!(scalar_i32, i32,);
integers!(scalar_i64, i64,);
logic!(scalar_logic,);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    floats!(avx2_f32, f32, true, #[target_feature(enable = "avx2,fma,f16c")]);
    floats!(avx2_f64, f64, true, #[target_feature(enable = "avx2,fma,f16c")]);
    integers!(avx2_i32, i32, #[target_feature(enable = "avx2,fma,f16c")]);
    integers!(avx2_i64, i64, #[target_feature(enable = "avx2,fma,f16c")]);
    logic!(avx2_logic, #[target_feature(enable = "avx2,fma,f16c")]);
    floats!(avx512_f32, f32, true, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    floats!(avx512_f64, f64, true, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    integers!(avx512_i32, i32, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    integers!(avx512_i64, i64, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
    logic!(avx512_logic, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::*;
    floats!(neon_f32, f32, true, #[target_feature(enable = "neon")]);
    floats!(neon_f64, f64, true, #[target_feature(enable = "neon")]);
    integers!(neon_i32, i32, #[target_feature(enable = "neon")]);
    integers!(neon_i64, i64, #[target_feature(enable = "neon")]);
    logic!(neon_logic, #[target_feature(enable = "neon")]);
}

macro_rules! lane {
    ($trait:ident, $method:ident, $table:ident, $t:ty, $scalar:ident, $avx2:ident, $avx512:ident, $neon:ident) => {
        impl $trait for $t {
            fn $method() -> &'static $table<$t> {
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => &x86::$avx2::TABLE,
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Avx512Bf16 => &x86::$avx512::TABLE,
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon => &arm::$neon::TABLE,
                    _ => &$scalar::TABLE,
                }
            }
        }
    };
}
lane!(FloatLane, floats, Floats, f32, scalar_f32, avx2_f32, avx512_f32, neon_f32);
lane!(FloatLane, floats, Floats, f64, scalar_f64, avx2_f64, avx512_f64, neon_f64);
lane!(IntegerLane, integers, Integers, i32, scalar_i32, avx2_i32, avx512_i32, neon_i32);
lane!(IntegerLane, integers, Integers, i64, scalar_i64, avx2_i64, avx512_i64, neon_i64);
