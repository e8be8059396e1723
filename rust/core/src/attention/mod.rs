//! The attention room.
