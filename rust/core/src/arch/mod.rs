//! Instruction sets: which there are, which one is in use, and the kernels of each.
//!
//! * [`Level`]: the levels, their detection, and the choice (once, overridable);
//! * `vector`: the traits kernels are written in; `scalar`, `avx2`, `avx512`, `neon`: one implementation each;
//! * `kernel/`: the algorithms, once, over the traits;
//! * [`table`]: a table of function pointers per level, with safe, checked methods. Rooms use nothing else.
//! * [`ranking`]: the same for the kernels of choosing; [`laws`]: of sampling; [`lanes`]: for the operations of expressions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod kernel;
pub mod lanes;
pub mod laws;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod ranking;
mod scalar;
pub mod table;
mod vector;

use crate::error::{Error, Result};
use crate::view::Matrix;
use std::sync::atomic::{AtomicU8, Ordering};

pub use kernel::activation::Activation;
pub use kernel::tile::Ahead;
pub use table::{HalfTable, Kernel, Online, Piece, Round, Slopes, Table, half_table};

/// Instruction-set levels, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Portable Rust.
    Scalar = 1,
    /// AVX2, FMA, F16C.
    Avx2 = 2,
    /// AVX-512 F, BW, VL, DQ.
    Avx512 = 3,
    /// AVX-512 with the bfloat16 dot product.
    Avx512Bf16 = 4,
    /// Arm NEON.
    Neon = 5,
}

impl Level {
    /// Levels compiled into this build, weakest first.
    #[cfg(target_arch = "x86_64")]
    pub const COMPILED: &'static [Level] = &[Level::Scalar, Level::Avx2, Level::Avx512, Level::Avx512Bf16];
    /// Levels compiled into this build, weakest first.
    #[cfg(target_arch = "aarch64")]
    pub const COMPILED: &'static [Level] = &[Level::Scalar, Level::Neon];
    /// Levels compiled into this build, weakest first.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub const COMPILED: &'static [Level] = &[Level::Scalar];

    /// The name used in `TILEWISE_CPU_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512_bf16",
            Level::Neon => "neon",
        }
    }

    /// Whether this build has the level and the machine (with its operating system) can run it.
    pub fn is_available(self) -> bool {
        if !Self::COMPILED.contains(&self) {
            return false;
        }
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            };
            match self {
                Level::Scalar => true,
                Level::Avx2 => avx2(),
                Level::Avx512 => avx512(),
                Level::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                Level::Neon => false,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            true // scalar anywhere; NEON is part of the aarch64 baseline
        }
    }

    fn best() -> Level {
        Self::COMPILED.iter().copied().rev().find(|level| level.is_available()).unwrap_or(Level::Scalar)
    }

    fn named(name: &str) -> Result<Level> {
        let available: Vec<Level> = Self::COMPILED.iter().copied().filter(|level| level.is_available()).collect();
        available.iter().copied().find(|level| level.name() == name.trim().to_ascii_lowercase()).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|level| level.name()).collect();
            Error::value(
                "TILEWISE_CPU_ISA",
                format!("one of {} (what this machine can run)", names.join(", ")),
                format!("'{name}'"),
            )
            .hint("unset it to use the best one")
        })
    }

    fn from_code(code: u8) -> Level {
        Self::COMPILED.iter().copied().find(|level| *level as u8 == code).unwrap_or(Level::Scalar)
    }
}

/// 0 = not chosen yet.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The level that kernels use. Chosen at the first call: `TILEWISE_CPU_ISA`, else the best available.
///
/// # Panics
/// If `TILEWISE_CPU_ISA` names something this machine cannot run (the Python package checks it at import and
/// raises a proper error instead).
pub fn level() -> Level {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => {
            force(None).unwrap_or_else(|error| panic!("{error}"));
            level()
        }
        code => Level::from_code(code),
    }
}

/// Forces a level for the whole process; `None` goes back to `TILEWISE_CPU_ISA` or the best one.
///
/// # Errors
/// A name that is unknown here or that the machine cannot run.
pub fn force(name: Option<&str>) -> Result<()> {
    let level = match name {
        Some(name) => Level::named(name)?,
        None => match std::env::var("TILEWISE_CPU_ISA") {
            Ok(name) if !name.trim().is_empty() => Level::named(&name)?,
            _ => Level::best(),
        },
    };
    CHOSEN.store(level as u8, Ordering::Relaxed);
    Ok(())
}

/// While it lives, the thread computes with subnormal numbers, whatever its caller asked the processor for
/// (`torch.set_flush_denormal`): results must not depend on which thread computes them.
#[must_use]
pub struct Subnormals {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl Subnormals {
    /// Flush-to-zero and denormals-are-zero in the control register.
    const FLUSH: u32 = 1 << 15 | 1 << 6;

    /// From now on, until it is dropped.
    #[inline]
    pub fn kept() -> Self {
        let mut before = 0u32;
        // SAFETY: stores the control register into a local; SSE is part of x86-64.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack, preserves_flags)) };
        if before & Self::FLUSH != 0 {
            Self::set(before & !Self::FLUSH);
        }
        Self { before }
    }

    fn set(value: u32) {
        // SAFETY: a value that was read from the register, with two valid bits changed.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Subnormals {
    fn drop(&mut self) {
        if self.before & Self::FLUSH != 0 {
            Self::set(self.before);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Subnormals {
    /// Nothing to do: elsewhere nobody offers to flush.
    pub fn kept() -> Self {
        Self {}
    }
}

/// Asks for the memory of a matrix whose rows are contiguous (others are left alone). A hint.
#[inline]
pub fn prefetch<T: Copy>(matrix: Matrix<'_, T>) {
    const LINE: usize = 64;
    for i in 0..matrix.rows() {
        let Some(row) = matrix.row(i) else { return };
        let start = row.as_ptr().cast::<u8>();
        let mut at = 0;
        while at < std::mem::size_of_val(row) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint; SSE is part of x86-64.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(start.wrapping_add(at).cast());
            }
            at += LINE;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_named_and_refused_by_name() {
        for level in Level::COMPILED.iter().filter(|level| level.is_available()) {
            assert_eq!(Level::named(level.name()), Ok(*level));
        }
        let text = Level::named("sse9").unwrap_err().to_string();
        assert!(text.contains("sse9") && text.contains("scalar"), "{text}");
    }
}
