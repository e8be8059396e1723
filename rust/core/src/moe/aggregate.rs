//! The sum over a token's rows: the last stage of both directions.

use super::routing::{NONE, Routing};
use crate::arch::Kernel;
use crate::dtype::Real;
use crate::error::Result;
use crate::gemm::SERIAL_WORK;
use crate::gemm::arithmetic::Arithmetic;
use crate::threads;
use crate::view::ArrayMut;

/// `out[t] = sum over pairs p of t of scores[p] * rows[row of p]`, in pair order, rounded once; without scores a plain sum.
/// A pair without a row adds nothing, whatever its score.
pub(super) fn aggregate<S: Arithmetic>(
    routing: &Routing,
    tokens: usize,
    width: usize,
    rows: &[S::Acc],
    scores: Option<&[S::Acc]>,
    out: ArrayMut<'_>,
) -> Result<()> {
    const TOKENS: usize = 32;
    let out = out.rows::<S>();
    let table = S::Acc::table();
    threads::for_each(
        tokens.div_ceil(TOKENS),
        width.saturating_mul(routing.rows.len()) <= SERIAL_WORK,
        || vec![S::Acc::ZERO; width],
        |task, sum| {
            for token in task * TOKENS..tokens.min((task + 1) * TOKENS) {
                sum.fill(S::Acc::ZERO);
                for pair in routing.of_token(token) {
                    let row = routing.rows[pair];
                    if row != NONE {
                        let score = scores.map_or(S::Acc::ONE, |scores| scores[pair]);
                        table.add_scaled(sum, &rows[row * width..(row + 1) * width], score);
                    }
                }
                S::round(sum, out.take(token));
            }
        },
    )
}
