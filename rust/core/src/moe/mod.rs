//! The moe room.
