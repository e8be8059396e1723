//! The programs of a problem (score_mod, mask_mod) bound to its arrays, and a worker that evaluates them for a thread.

use super::problem::Problem;
use super::tile::Tile;
use crate::dtype::Real;
use crate::error::Result;
use std::marker::PhantomData;
use std::ops::Range;

/// Bound programs.
pub struct Mods<'p, 'a, T> {
    marker: PhantomData<(&'p T, &'a T)>,
}

impl<'p, 'a, T: Real> Mods<'p, 'a, T> {
    pub fn bind(_problem: &'p Problem<'a>, _gradient: bool) -> Result<Self> {
        Ok(Self { marker: PhantomData })
    }
    pub fn has_score(&self) -> bool {
        false
    }
    pub fn has_mask(&self) -> bool {
        false
    }
    pub fn worker(&self) -> Worker<T> {
        Worker { marker: PhantomData }
    }
    pub fn check(&self) -> Result<()> {
        Ok(())
    }
}

pub struct Worker<T> {
    marker: PhantomData<T>,
}

impl<T: Real> Worker<T> {
    pub fn tile(&mut self, _tile: &Tile) {}
    pub fn score(&mut self, _keys: Range<usize>, _block: &mut [T], _width: usize) {}
    pub fn mask(&mut self, _keys: Range<usize>, _block: &mut [T], _width: usize, _blank: T) {}
    pub fn score_rows(&mut self, _tile: &Tile, _keys: Range<usize>, _block: &mut [T], _width: usize) {}
    pub fn mask_rows(&mut self, _tile: &Tile, _keys: Range<usize>, _block: &mut [T], _width: usize, _blank: T) {}
    pub fn gradient(&mut self, _keys: Range<usize>, _scores: &[T], _slopes: &mut [T], _width: usize) {}
}
