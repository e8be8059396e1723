//! The pure-Rust core of tilewise: no Python, no framework, no I/O.
//!
//! Floor (everything leans on it): [`error`], [`dtype`], [`view`], [`threads`], [`rng`],
//! [`scratch`], `exponential` (e^x with the same bits everywhere), [`arch`]. Beside it: [`source`], the device
//! sources as text.
//!
//! Rooms, each one concept under the name it has on every floor:
//! * [`expr`]: programs that modify attention: check, simplify, differentiate, interpret by tiles, bound a block;
//! * [`gemm`]: blocking and packing around the matrix micro-kernels;
//! * [`attention`]: attention by tiles, forward and back, and decode by key chunks;
//! * [`moe`]: routers, `Routing`, and the expert layer;
//! * [`scheduler`]: who runs when: state machines without I/O; confidence of reasoning traces;
//! * [`speculation`]: exact verification of drafted tokens.
//!
//! `unsafe` lives in `arch` and `view` alone.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod arch;
pub mod dtype;
pub mod error;
mod exponential;
pub mod rng;
pub mod scratch;
pub mod source;
pub mod threads;
#[allow(unsafe_code)]
pub mod view;

pub mod attention;
pub mod expr;
pub mod gemm;
pub mod moe;
pub mod scheduler;
pub mod speculation;
