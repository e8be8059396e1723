//! The speculation room.
