//! Large buffers that are kept between calls.
//!
//! A fresh allocation of tens of megabytes costs a page fault every 4 KiB when it is first written: a tenth of an
//! expert layer's time. So a few buffers a type are kept, up to [`KEPT_BYTES`]. Contents are whatever the last user left.

use crate::view::large;
use half::{bf16, f16};
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// The most that is kept of one type.
pub const KEPT_BYTES: usize = 256 << 20;

/// Types with kept buffers.
pub trait Kept: Copy + Send + 'static {
    /// What a fresh buffer holds.
    const FRESH: Self;
    /// Where they are kept.
    fn shelf() -> &'static Mutex<Vec<Vec<Self>>>;
}

macro_rules! kept {
    ($($t:ty => $zero:expr),*) => { $(
        impl Kept for $t {
            const FRESH: $t = $zero;
            fn shelf() -> &'static Mutex<Vec<Vec<$t>>> {
                static SHELF: Mutex<Vec<Vec<$t>>> = Mutex::new(Vec::new());
                &SHELF
            }
        }
    )* };
}
kept!(f32 => 0.0, f64 => 0.0, u32 => 0, f16 => f16::ZERO, bf16 => bf16::ZERO);

/// A buffer of `len` elements with arbitrary contents; goes back to the shelf when dropped.
pub struct Buffer<T: Kept> {
    elements: Vec<T>,
    len: usize,
}

impl<T: Kept> Buffer<T> {
    /// Takes the smallest kept buffer that is large enough (never waits: another call may hold the shelf, or held it
    /// during a fork).
    pub fn new(len: usize) -> Self {
        let fitting = |shelf: &mut Vec<Vec<T>>| {
            let best = (0..shelf.len()).filter(|&i| shelf[i].len() >= len).min_by_key(|&i| shelf[i].len());
            best.map(|i| shelf.swap_remove(i))
        };
        let kept = T::shelf().try_lock().ok().and_then(|mut shelf| fitting(&mut shelf));
        Self { elements: kept.unwrap_or_else(|| large(T::FRESH, len)), len }
    }
}

impl<T: Kept> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.elements[..self.len]
    }
}

impl<T: Kept> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements[..self.len]
    }
}

impl<T: Kept> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Ok(mut shelf) = T::shelf().try_lock() {
            shelf.push(std::mem::take(&mut self.elements));
            // The smallest go first: they are the cheapest to make again.
            shelf.sort_by_key(|buffer| std::cmp::Reverse(buffer.len()));
            let mut bytes = 0;
            shelf.retain(|buffer| {
                bytes += buffer.len() * size_of::<T>();
                bytes <= KEPT_BYTES && !buffer.is_empty()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_and_two_can_be_out() {
        let mut first = Buffer::<f64>::new(1000);
        first[999] = 7.0;
        let second = Buffer::<f64>::new(2000);
        assert_eq!((first.len(), second.len()), (1000, 2000));
        drop(second);
        drop(first);
        assert_eq!(Buffer::<f64>::new(10).len(), 10);
    }
}
