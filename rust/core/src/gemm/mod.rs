//! The gemm room.
