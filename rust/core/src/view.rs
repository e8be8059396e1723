//! Borrowed, strided views of memory that somebody else owns.
//!
//! [`Array`] is an untyped read-only view of any rank; [`Matrix`] is a typed view of two axes with arbitrary
//! strides (zero and negative included); [`ArrayMut`] and [`Rows`] are the writable side: `Rows` hands out each
//! row at most once, so tasks on many threads can fill one output without a lock and without aliasing.
//!
//! This is one of the three places with `unsafe`: constructors state what must hold, everything else is checked.

use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// An untyped, read-only, strided view.
#[derive(Debug, Clone)]
pub struct Array<'a> {
    data: *const u8,
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<isize>,
    marker: PhantomData<&'a u8>,
}

// SAFETY: the view only reads, and `from_raw_parts` requires memory that nobody writes during 'a.
unsafe impl Send for Array<'_> {}
// SAFETY: as above.
unsafe impl Sync for Array<'_> {}

impl<'a> Array<'a> {
    /// Wraps foreign memory. Strides count elements.
    ///
    /// # Safety
    /// Every index inside `shape` must address readable, initialised memory of `dtype` that lives and is not
    /// written during `'a`.
    ///
    /// # Errors
    /// A pointer that is not aligned to its element is refused.
    pub unsafe fn from_raw_parts(
        data: *const u8,
        dtype: Dtype,
        shape: Vec<usize>,
        strides: Vec<isize>,
    ) -> Result<Self> {
        assert_eq!(shape.len(), strides.len());
        check_alignment(data, dtype, &shape)?;
        Ok(Self { data, dtype, shape, strides, marker: PhantomData })
    }

    /// A row-major view of a slice.
    ///
    /// # Errors
    /// The product of `shape` must be the length of the slice.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let strides = row_major(shape);
        Self::from_slice_strided(data, 0, shape, &strides)
    }

    /// A view of a slice with any offset and strides that stay inside it.
    ///
    /// # Errors
    /// Indices that would leave the slice are refused.
    pub fn from_slice_strided<T: Element>(
        data: &'a [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        check_bounds(data.len(), offset, shape, strides)?;
        let pointer = if shape.contains(&0) { data.as_ptr() } else { &raw const data[offset] };
        Ok(Self {
            data: pointer.cast(),
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            marker: PhantomData,
        })
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides
    }

    /// Address of the element at index 0 of every axis; dangling if the array is empty.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.data
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// The same memory with its axes reordered: axis `i` of the result is axis `order[i]` of this view.
    pub fn permuted(&self, order: &[usize]) -> Self {
        assert_eq!(order.len(), self.shape.len());
        Self {
            shape: order.iter().map(|&axis| self.shape[axis]).collect(),
            strides: order.iter().map(|&axis| self.strides[axis]).collect(),
            ..self.clone()
        }
    }

    /// The last two axes at one index of the leading ones.
    ///
    /// # Panics
    /// On a wrong type, rank or index: callers validate first.
    pub fn matrix<T: Element>(&self, lead: &[usize]) -> Matrix<'a, T> {
        let rank = self.shape.len();
        assert!(self.dtype == T::DTYPE && lead.len() + 2 == rank, "matrix(): wrong type or rank");
        let (rows, cols) = (self.shape[rank - 2], self.shape[rank - 1]);
        let empty = rows == 0 || cols == 0;
        let pointer = if empty { std::ptr::NonNull::<T>::dangling().as_ptr() } else { self.address(lead) };
        Matrix {
            data: pointer,
            rows,
            cols,
            row_stride: self.strides[rank - 2],
            col_stride: self.strides[rank - 1],
            marker: PhantomData,
        }
    }

    /// The last axis at one index of the leading ones, as a matrix of one row.
    ///
    /// # Panics
    /// On a wrong type, rank or index.
    pub fn vector<T: Element>(&self, lead: &[usize]) -> Matrix<'a, T> {
        let rank = self.shape.len();
        assert!(self.dtype == T::DTYPE && lead.len() + 1 == rank, "vector(): wrong type or rank");
        let cols = self.shape[rank - 1];
        let pointer = if cols == 0 { std::ptr::NonNull::<T>::dangling().as_ptr() } else { self.address(lead) };
        Matrix { data: pointer, rows: 1, cols, row_stride: 0, col_stride: self.strides[rank - 1], marker: PhantomData }
    }

    /// One element.
    ///
    /// # Panics
    /// On a wrong type, rank or index.
    pub fn get<T: Element>(&self, index: &[usize]) -> T {
        assert!(self.dtype == T::DTYPE && index.len() == self.shape.len(), "get(): wrong type or rank");
        // SAFETY: `address` checks every coordinate against the shape.
        unsafe { *self.address::<T>(index) }
    }

    /// One element of an int32 or int64 array.
    ///
    /// # Panics
    /// On another type, a wrong rank or index.
    pub fn integer(&self, index: &[usize]) -> i64 {
        match self.dtype {
            Dtype::I32 => i64::from(self.get::<i32>(index)),
            _ => self.get::<i64>(index),
        }
    }

    fn address<T>(&self, lead: &[usize]) -> *const T {
        let mut offset = 0isize;
        for (axis, &index) in lead.iter().enumerate() {
            assert!(index < self.shape[axis], "index {index} outside axis {axis} of {:?}", self.shape);
            offset += index as isize * self.strides[axis];
        }
        // SAFETY: the offset addresses an element inside the shape (or the base of a non-empty tail).
        unsafe { self.data.cast::<T>().offset(offset) }
    }
}

/// A typed, read-only matrix with arbitrary strides (in elements).
#[derive(Debug)]
pub struct Matrix<'a, T> {
    data: *const T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    marker: PhantomData<&'a T>,
}

impl<T> Clone for Matrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Matrix<'_, T> {}
// SAFETY: reads only; see `Array`.
unsafe impl<T: Sync> Send for Matrix<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Matrix<'_, T> {}

impl<'a, T: Copy> Matrix<'a, T> {
    /// A row-major matrix over a slice whose rows lie `stride` apart.
    ///
    /// # Panics
    /// If the rows do not fit the slice.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(), "matrix does not fit its slice");
        Self { data: data.as_ptr(), rows, cols, row_stride: stride as isize, col_stride: 1, marker: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance between rows, in elements.
    pub fn row_stride(&self) -> isize {
        self.row_stride
    }

    /// Distance between columns, in elements.
    pub fn col_stride(&self) -> isize {
        self.col_stride
    }

    /// Address of element (0, 0); dangling if the matrix is empty.
    pub fn as_ptr(&self) -> *const T {
        self.data
    }

    /// Element (i, j).
    ///
    /// # Panics
    /// If the index is outside.
    #[inline(always)]
    pub fn at(&self, i: usize, j: usize) -> T {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: checked just above; the invariant of the type covers every index inside.
        unsafe { *self.data.offset(i as isize * self.row_stride + j as isize * self.col_stride) }
    }

    /// Row `i` as a slice, if its elements are adjacent.
    ///
    /// # Panics
    /// If the row is outside.
    #[inline(always)]
    pub fn row(&self, i: usize) -> Option<&'a [T]> {
        assert!(i < self.rows);
        if self.col_stride != 1 && self.cols > 1 {
            return None;
        }
        // SAFETY: the row's `cols` adjacent elements are inside the matrix and initialised.
        Some(unsafe { std::slice::from_raw_parts(self.data.offset(i as isize * self.row_stride), self.cols) })
    }

    /// A rectangular part.
    ///
    /// # Panics
    /// If the part leaves the matrix.
    #[inline]
    pub fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        let mut data = self.data;
        if !rows.is_empty() && !cols.is_empty() {
            // SAFETY: (rows.start, cols.start) is an element of this matrix.
            data =
                unsafe { data.offset(rows.start as isize * self.row_stride + cols.start as isize * self.col_stride) };
        }
        Self { data, rows: rows.len(), cols: cols.len(), ..*self }
    }

    /// `count` rows from `first`, `step` apart.
    ///
    /// # Panics
    /// If a row is outside.
    pub fn every(&self, first: usize, count: usize, step: usize) -> Self {
        assert!(count == 0 || first + (count - 1) * step < self.rows);
        let part = self.part(first.min(self.rows)..self.rows, 0..self.cols);
        Self { rows: count, row_stride: self.row_stride * step as isize, ..part }
    }

    /// Two rows as a matrix, in any order and at any distance.
    ///
    /// # Panics
    /// If a row is outside.
    #[inline]
    pub fn pick(&self, first: usize, second: usize) -> Self {
        assert!(first < self.rows && second < self.rows);
        let apart = second as isize - first as isize;
        Self { rows: 2, row_stride: self.row_stride * apart, ..self.part(first..first + 1, 0..self.cols) }
    }

    /// Rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..*self }
    }
}

/// Rows of one width that lie anywhere, each with adjacent elements.
#[derive(Debug)]
pub struct Listed<'a, T> {
    rows: Vec<*const T>,
    cols: usize,
    marker: PhantomData<&'a T>,
}

impl<'a, T: Element> Listed<'a, T> {
    /// Rows of the third axis of an array of four: for each `(i, first, count)`, rows `first..first + count` of `[i, j]`.
    /// Nothing if elements of a row are not adjacent.
    ///
    /// # Panics
    /// On another rank or type, and if a row is outside.
    pub fn new(array: &Array<'a>, j: usize, pieces: impl Iterator<Item = (usize, usize, usize)>) -> Option<Self> {
        let (&[extent, columns, length, cols], &[outer, middle, step, last]) = (array.shape(), array.strides()) else {
            panic!("listed rows are of an array of four axes");
        };
        assert!(array.dtype() == T::DTYPE && j < columns, "listed rows: wrong type or column");
        if last != 1 && cols > 1 {
            return None;
        }
        let mut rows = Vec::new();
        for (i, first, count) in pieces {
            assert!(i < extent && first + count <= length, "listed rows outside the array");
            let base = array.data.cast::<T>().wrapping_offset(i as isize * outer + j as isize * middle);
            // Inside the array, whose invariant covers every row.
            rows.extend((first..first + count).map(|row| base.wrapping_offset(row as isize * step)));
        }
        Some(Self { rows, cols, marker: PhantomData })
    }
}

impl<'a> Listed<'a, half::bf16> {
    /// As 32-bit pairs, where [`Matrix::pairs`] could.
    pub fn pairs(self) -> Option<Listed<'a, u32>> {
        let aligned = self.rows.iter().all(|row| (*row as usize).is_multiple_of(4));
        if !aligned || !self.cols.is_multiple_of(2) || cfg!(target_endian = "big") {
            return None;
        }
        let rows = self.rows.into_iter().map(<*const half::bf16>::cast).collect();
        Some(Listed { rows, cols: self.cols / 2, marker: PhantomData })
    }
}

impl<T> Listed<'_, T> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Elements in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Addresses of the rows.
    pub fn rows(&self) -> &[*const T] {
        &self.rows
    }
}

impl<'a> Matrix<'a, half::bf16> {
    /// Adjacent columns read as 32-bit pairs (the even column in the low half), if the layout allows it: adjacent
    /// columns, an even number of them, and rows that start on a multiple of four bytes.
    pub fn pairs(&self) -> Option<Matrix<'a, u32>> {
        let aligned = (self.data as usize).is_multiple_of(4) && (self.row_stride % 2 == 0 || self.rows <= 1);
        if !aligned
            || !self.cols.is_multiple_of(2)
            || (self.col_stride != 1 && self.cols > 0)
            || cfg!(target_endian = "big")
        {
            return None;
        }
        Some(Matrix {
            data: self.data.cast(),
            rows: self.rows,
            cols: self.cols / 2,
            row_stride: self.row_stride / 2,
            col_stride: 1,
            marker: PhantomData,
        })
    }
}

/// An untyped, writable view whose last axis is contiguous.
#[derive(Debug)]
pub struct ArrayMut<'a> {
    data: *mut u8,
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<isize>,
    marker: PhantomData<&'a mut u8>,
}

// SAFETY: the view is the only access to its memory during 'a (see `from_raw_parts`).
unsafe impl Send for ArrayMut<'_> {}

impl<'a> ArrayMut<'a> {
    /// Wraps foreign memory that will be written. Strides count elements.
    ///
    /// # Safety
    /// Every index inside `shape` must address writable memory of `dtype` that lives during `'a`, that nothing
    /// else touches during `'a`, and no two indices may share an address.
    ///
    /// # Errors
    /// The pointer must be aligned and the last axis contiguous.
    pub unsafe fn from_raw_parts(data: *mut u8, dtype: Dtype, shape: Vec<usize>, strides: Vec<isize>) -> Result<Self> {
        assert_eq!(shape.len(), strides.len());
        check_alignment(data, dtype, &shape)?;
        if let (Some(&extent), Some(&stride)) = (shape.last(), strides.last())
            && extent > 1
            && stride != 1
        {
            return Err(Error::value("out", "an output whose last axis is contiguous", format!("stride {stride}")));
        }
        Ok(Self { data, dtype, shape, strides, marker: PhantomData })
    }

    /// A row-major writable view of a slice.
    ///
    /// # Errors
    /// The product of `shape` must be the length of the slice.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let strides = row_major(shape);
        check_bounds(data.len(), 0, shape, &strides)?;
        Ok(Self {
            data: data.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            strides,
            marker: PhantomData,
        })
    }

    /// A writable view of a slice whose rows (all axes but the last) lie apart; strides in elements.
    ///
    /// # Errors
    /// Strides that leave the slice, that let two indices share an address, or a last axis that is not contiguous.
    pub fn from_slice_strided<T: Element>(data: &'a mut [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let signed: Vec<isize> = strides.iter().map(|&stride| stride as isize).collect();
        check_bounds(data.len(), 0, shape, &signed)?;
        // Each axis steps over everything that the axes after it reach.
        let mut reach = 1;
        for (&extent, &stride) in shape.iter().zip(strides).rev() {
            if extent > 1 && stride < reach && !shape.contains(&0) {
                return Err(Error::shape("view", format!("strides {strides:?} that keep elements apart"), shape));
            }
            reach = reach.max(extent.saturating_sub(1) * stride + reach);
        }
        if shape.last().is_some_and(|&extent| extent > 1) && strides.last() != Some(&1) {
            return Err(Error::shape("view", "a contiguous last axis", shape));
        }
        Ok(Self {
            data: data.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            strides: signed,
            marker: PhantomData,
        })
    }

    /// Says that all of a contiguous view will be written, most likely for the first time: a hint to the system to
    /// put large pages under it.
    pub fn fresh(self) -> Self {
        let count: usize = self.shape.iter().product();
        let strides = row_major(&self.shape);
        if self.shape.iter().zip(strides).zip(&self.strides).all(|((&n, full), &stride)| n <= 1 || stride == full) {
            prefer_large_pages(self.data, count * self.dtype.bytes());
        }
        self
    }

    /// The one element of a view without axes, as a row.
    ///
    /// # Panics
    /// On a wrong type or rank.
    pub fn row_of_one<T: Element>(self) -> &'a mut [T] {
        assert!(self.dtype == T::DTYPE && self.shape.is_empty(), "row_of_one(): wrong type or rank");
        // SAFETY: a view of rank 0 is one writable element, and this view was the only access to it.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), 1) }
    }

    /// The last axis cut into `parts` equal ones: [.., n] becomes [.., parts, n / parts].
    ///
    /// # Panics
    /// If `parts` does not divide it.
    #[must_use]
    pub fn split_last(mut self, parts: usize) -> Self {
        let last = self.shape.pop().unwrap_or(1);
        assert!(parts > 0 && last.is_multiple_of(parts), "split_last({parts}) of {last}");
        let stride = self.strides.pop().unwrap_or(1);
        self.shape.extend([parts, last / parts]);
        self.strides.extend([(last / parts) as isize * stride, stride]);
        self
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The rows (all axes but the last), to be handed out to tasks.
    ///
    /// # Panics
    /// On a wrong type or rank 0.
    pub fn rows<T: Element>(self) -> Rows<'a, T> {
        let width = self.shape.last().copied().unwrap_or(0);
        self.segments(width.max(1))
    }

    /// The rows cut into segments of `length` elements (the last one shorter): segment `s` of row `r` has number
    /// `r * segments_per_row + s`.
    ///
    /// # Panics
    /// On a wrong type, rank 0 or length 0.
    pub fn segments<T: Element>(self, length: usize) -> Rows<'a, T> {
        assert!(self.dtype == T::DTYPE && !self.shape.is_empty() && length > 0, "segments(): wrong type or rank");
        let lead = self.shape.len() - 1;
        let width = self.shape[lead];
        let per_row = width.div_ceil(length).max(1);
        let count = self.shape[..lead].iter().product::<usize>() * per_row;
        let claimed = (0..count).map(|_| AtomicBool::new(false)).collect();
        // Where all rows lie evenly spaced, a row is found without divisions.
        let mut even = Some(1);
        let mut inner: Option<(usize, isize)> = None;
        for (&extent, &stride) in self.shape[..lead].iter().zip(&self.strides).rev().filter(|(extent, _)| **extent != 1)
        {
            match inner {
                None => even = Some(stride),
                Some((within, apart)) if stride != within as isize * apart => even = None,
                Some(_) => {}
            }
            inner = Some((extent, stride));
        }
        Rows {
            even,
            data: self.data.cast(),
            shape: self.shape[..lead].to_vec(),
            strides: self.strides[..lead].to_vec(),
            width,
            length,
            per_row,
            claimed,
            marker: PhantomData,
        }
    }
}

/// Rows of an output, each of which can be taken once, from any thread.
#[derive(Debug)]
pub struct Rows<'a, T> {
    data: *mut T,
    shape: Vec<usize>,
    strides: Vec<isize>,
    width: usize,
    length: usize,
    per_row: usize,
    /// Distance between rows, where it is one.
    even: Option<isize>,
    claimed: Vec<AtomicBool>,
    marker: PhantomData<&'a mut T>,
}

// SAFETY: `take` gives each row to one caller only, so no two threads hold the same memory.
unsafe impl<T: Send> Sync for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Rows<'_, T> {}

impl<'a, T: Element> Rows<'a, T> {
    /// Number of rows (or segments).
    pub fn len(&self) -> usize {
        self.claimed.len()
    }

    /// Elements in a segment (the last one of a row may have fewer).
    pub fn segment(&self) -> usize {
        self.length
    }

    /// Segments in a row.
    pub fn per_row(&self) -> usize {
        self.per_row
    }

    /// True if there is no row.
    pub fn is_empty(&self) -> bool {
        self.claimed.is_empty()
    }

    /// Elements in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row (or segment) `index`, row-major over the leading axes.
    ///
    /// # Panics
    /// If the row is outside or was taken before: that would be a bug in a schedule, not bad input.
    pub fn take(&self, index: usize) -> &'a mut [T] {
        assert!(!self.claimed[index].swap(true, Ordering::Relaxed), "output row {index} taken twice");
        let (row, start) = match self.per_row {
            1 => (index, 0),
            count => (index / count, index % count * self.length),
        };
        let mut offset = start as isize;
        if let Some(stride) = self.even {
            offset += row as isize * stride;
        } else {
            let mut rest = row;
            for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
                offset += (rest % extent) as isize * stride;
                rest /= extent;
            }
        }
        // SAFETY: the row lies inside the view, rows do not overlap, and the flag above makes this the only
        // reference to it that will ever be handed out.
        unsafe { std::slice::from_raw_parts_mut(self.data.offset(offset), self.length.min(self.width - start)) }
    }
}

/// Asks the system for large pages under memory that is about to be written for the first time: a fault for every
/// 4 KiB costs a tenth of an expert layer's backward pass. A hint about memory that its owner may well have touched
/// already; contents stay as they are.
#[cfg(target_os = "linux")]
fn prefer_large_pages(data: *mut u8, bytes: usize) {
    const LARGE: usize = 2 << 20;
    const MADV_HUGEPAGE: i32 = 14;
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    let first = (data as usize).next_multiple_of(LARGE);
    let end = (data as usize).saturating_add(bytes) / LARGE * LARGE;
    if end > first + LARGE {
        // SAFETY: whole pages inside memory that the caller may write; the advice changes no contents. It may be
        // refused (an old kernel, a setting): then pages stay small.
        unsafe { madvise(first as *mut std::ffi::c_void, end - first, MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_large_pages(_: *mut u8, _: usize) {}

/// A vector of `len` copies of `value`, on large pages where the system has them.
pub fn large<T: Copy>(value: T, len: usize) -> Vec<T> {
    let mut elements: Vec<T> = Vec::with_capacity(len);
    prefer_large_pages(elements.as_mut_ptr().cast::<u8>(), len * size_of::<T>());
    elements.resize(len, value);
    elements
}

fn row_major(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1isize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
    }
    strides
}

fn check_alignment(data: *const u8, dtype: Dtype, shape: &[usize]) -> Result<()> {
    if shape.contains(&0) || (data as usize).is_multiple_of(dtype.bytes()) {
        return Ok(());
    }
    Err(Error::value(
        "array",
        format!("memory aligned to {} bytes for {dtype}", dtype.bytes()),
        format!("address {data:p}"),
    )
    .hint("pass a copy (numpy: x.copy(), torch: x.clone())"))
}

fn check_bounds(len: usize, offset: usize, shape: &[usize], strides: &[isize]) -> Result<()> {
    assert_eq!(shape.len(), strides.len());
    if shape.contains(&0) {
        return Ok(());
    }
    let (mut low, mut high) = (offset as i128, offset as i128);
    for (&extent, &stride) in shape.iter().zip(strides) {
        let reach = (extent as i128 - 1) * stride as i128;
        if reach < 0 { low += reach } else { high += reach }
    }
    if low < 0 || high >= len as i128 {
        return Err(Error::shape("view", format!("extents and strides {strides:?} inside {len} elements"), shape));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_reads_and_parts() {
        let data: Vec<f32> = (0..24).map(|x| x as f32).collect();
        let a = Array::from_slice_strided(&data, 23, &[2, 3], &[-12, -4]).unwrap();
        let m = a.matrix::<f32>(&[]);
        assert_eq!((m.at(0, 0), m.at(1, 2)), (23.0, 3.0));
        assert!(m.row(0).is_none());
        let p = m.part(1..2, 1..3).transposed();
        assert_eq!((p.rows(), p.cols(), p.at(1, 0)), (2, 1, 3.0));
        let broadcast = Array::from_slice_strided(&data, 5, &[4, 1], &[0, 0]).unwrap();
        assert_eq!(broadcast.matrix::<f32>(&[]).at(3, 0), 5.0);
    }

    #[test]
    fn writable_rows_may_lie_apart_but_not_overlap() {
        let mut data = [0f32; 14];
        assert!(ArrayMut::from_slice_strided(&mut data, &[2, 2, 3], &[8, 2, 1]).is_err());
        assert!(ArrayMut::from_slice_strided(&mut data, &[2, 2, 3], &[5, 3, 1]).is_err());
        assert!(ArrayMut::from_slice_strided(&mut data, &[2, 2, 4], &[8, 4, 1]).is_err());
        let rows = ArrayMut::from_slice_strided(&mut data, &[2, 2, 3], &[8, 3, 1]).unwrap().segments::<f32>(2);
        rows.take(2 * 3 + 1)[0] = 5.0; // row (1, 1), second segment
        assert_eq!(data[8 + 3 + 2], 5.0);
        let wide = ArrayMut::from_slice(&mut data, &[2, 6]).unwrap().split_last(3);
        assert_eq!(wide.shape(), [2, 3, 2]);
        let m = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let picked = Matrix::new(&m, 3, 2, 2).pick(2, 0);
        assert_eq!((picked.at(0, 0), picked.at(1, 1)), (5.0, 2.0));
    }

    #[test]
    fn views_that_leave_their_memory_are_refused() {
        let data = [0f32; 10];
        assert!(Array::from_slice_strided(&data, 0, &[3, 4], &[4, 1]).is_err());
        assert!(Array::from_slice_strided(&data, 0, &[2], &[-1]).is_err());
        assert!(Array::from_slice_strided(&data, 99, &[0, 4], &[4, 1]).is_ok());
    }

    #[test]
    #[should_panic(expected = "taken twice")]
    fn a_row_is_handed_out_once() {
        let mut data = [0f32; 6];
        let rows = ArrayMut::from_slice(&mut data, &[3, 2]).unwrap().rows::<f32>();
        rows.take(1)[0] = 1.0;
        rows.take(1);
    }
}
