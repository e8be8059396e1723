//! Contents by handle: each is given back exactly once, whatever arrives twice or late.

use crate::speculation::cache::Outcome;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use super::event::Handle;

/// Handles are plain numbers: one multiplication spreads them.
#[derive(Debug, Default, Clone, Copy)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let wide = u128::from(self.0 ^ value) * 0x9E37_79B9_7F4A_7C15;
        self.0 = (wide >> 64) as u64 ^ wide as u64;
    }
}

type Build = BuildHasherDefault<Spread>;

/// What an arriving handle is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Never seen: it is kept now.
    New,
    /// The same content for the same outcome, longer than before.
    Grown,
    /// A second copy of a message, or a handle that names two contents: not ours to keep or to free.
    Known,
}

/// Handles that are kept, and those that were given back lately.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    live: HashMap<Handle, (Outcome, u32), Build>,
    freed: HashSet<Handle, Build>,
    order: VecDeque<Handle>,
    trash: Vec<Handle>,
}

/// So many freed handles are remembered, to know second copies by.
const REMEMBERED: usize = 1 << 16;

impl Ledger {
    /// Takes a handle that arrived for `outcome` with `length` tokens.
    pub fn adopt(&mut self, handle: Handle, outcome: Outcome, length: u32) -> Arrival {
        if self.freed.contains(&handle) {
            return Arrival::Known;
        }
        match self.live.get_mut(&handle) {
            // The same content grew in place.
            Some((known, grown)) if *known == outcome && *grown < length => {
                *grown = length;
                Arrival::Grown
            }
            Some(_) => Arrival::Known,
            None => {
                self.live.insert(handle, (outcome, length));
                Arrival::New
            }
        }
    }

    /// Gives a kept handle back; returns its length. Unknown ones are left alone.
    pub fn free(&mut self, handle: Handle) -> u32 {
        let Some((_, length)) = self.live.remove(&handle) else { return 0 };
        self.trash.push(handle);
        if self.freed.insert(handle) {
            self.order.push_back(handle);
        }
        if self.order.len() > REMEMBERED
            && let Some(old) = self.order.pop_front()
        {
            self.freed.remove(&old);
        }
        length
    }

    /// Handles given back since the last call.
    pub fn take_trash(&mut self) -> Vec<Handle> {
        std::mem::take(&mut self.trash)
    }

    /// Number of kept handles.
    pub fn held(&self) -> usize {
        self.live.len()
    }
}
