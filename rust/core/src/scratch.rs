//! Large buffers that are kept between calls.
//!
//! A fresh allocation of tens of megabytes costs a page fault every 4 KiB when it is first written: a tenth of an
//! expert layer's time. So one buffer a type is kept, up to [`KEPT_BYTES`]. Contents are whatever the last user left.

use crate::dtype::Real;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// The largest buffer that is kept.
pub const KEPT_BYTES: usize = 256 << 20;

/// Types with a kept buffer.
pub trait Kept: Real {
    /// Where it is kept.
    fn shelf() -> &'static Mutex<Vec<Self>>;
}

macro_rules! kept {
    ($t:ty) => {
        impl Kept for $t {
            fn shelf() -> &'static Mutex<Vec<$t>> {
                static SHELF: Mutex<Vec<$t>> = Mutex::new(Vec::new());
                &SHELF
            }
        }
    };
}
kept!(f32);
kept!(f64);

/// A buffer of `len` elements with arbitrary contents; goes back to the shelf when dropped.
pub struct Buffer<T: Kept> {
    elements: Vec<T>,
    len: usize,
}

impl<T: Kept> Buffer<T> {
    /// Takes the kept buffer if nobody has it (never waits: another call may hold it, or held it during a fork).
    pub fn new(len: usize) -> Self {
        let mut elements = T::shelf().try_lock().map(|mut shelf| std::mem::take(&mut *shelf)).unwrap_or_default();
        if elements.len() < len {
            elements = vec![T::ZERO; len];
        }
        Self { elements, len }
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
        let elements = std::mem::take(&mut self.elements);
        if elements.len() * size_of::<T>() <= KEPT_BYTES
            && let Ok(mut shelf) = T::shelf().try_lock()
            && shelf.len() < elements.len()
        {
            *shelf = elements;
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
