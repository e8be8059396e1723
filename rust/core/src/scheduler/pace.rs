//! The speed that rounds have: what a second is worth, whatever the estimates of its parts say.

/// How fast it goes: tokens and seconds of verifications of as many rows and of the waits before them, fading.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    rows: usize,
    tokens: f64,
    seconds: f64,
    seen: u32,
    /// Before the verification that is out.
    pub waited: f64,
}

impl Pace {
    /// Verifications before there is an answer, and after which one weighs 1/e.
    const ENOUGH: u32 = 16;
    const MEMORY: f64 = 64.0;

    /// A verification of so many rows is over.
    pub fn observe(&mut self, rows: usize, tokens: u32, seconds: f64) {
        if rows != self.rows {
            *self = Self { rows, waited: self.waited, ..Self::default() };
        }
        let keep = (-1.0 / Self::MEMORY).exp();
        self.tokens = self.tokens * keep + f64::from(tokens);
        self.seconds = self.seconds * keep + self.waited + seconds;
        self.seen = self.seen.saturating_add(1);
    }

    /// Tokens per second of so many rows, once enough were seen.
    pub fn of(&self, rows: usize) -> Option<f64> {
        (rows == self.rows && self.seen >= Self::ENOUGH && self.seconds > 0.0).then(|| self.tokens / self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_is_of_as_many_rows_and_counts_waits() {
        let mut pace = Pace::default();
        for _ in 0..Pace::ENOUGH - 1 {
            pace.waited = 0.5;
            pace.observe(2, 8, 1.5);
        }
        assert_eq!(pace.of(2), None);
        pace.observe(2, 8, 1.5);
        assert!((pace.of(2).unwrap() - 4.0).abs() < 1e-12 && pace.of(1).is_none());
        pace.observe(1, 3, 1.0);
        assert_eq!((pace.of(2), pace.of(1)), (None, None));
    }
}
