//! How long things take, learnt from events that carry times.
//!
//! ```text
//! target   T_v(n tokens, b rows) = t0 + t1 n + t2 b
//! draft    one chain of s tokens: c0 + c1 s
//! build    s drafted tokens of m branches: d0 (1 + s) + d1 s m     (the forward over the chain, "glue", costs a d0)
//! link     from command to answer, without the worker's own seconds
//! ```
//! The coefficients are least-squares fits whose memory fades, so that they follow a machine that gets busy. None is
//! negative. A build is no m chains: a step of many branches has work beside the model's that a step of one has not, so
//! the two are fitted apart, and until there was a build it is taken for a chain. Where the data say nothing about a
//! slope (all rounds were equally large) it is taken as zero.

/// A linear fit with fading memory: y is about the inner product of coefficients and x; x\[0\] is always used.
#[derive(Debug, Clone)]
pub struct Fit<const N: usize> {
    xx: [[f64; N]; N],
    xy: [f64; N],
    seen: u64,
    memory: f64,
    coefficients: [f64; N],
}

impl<const N: usize> Fit<N> {
    /// A fit whose observations lose 1/e of their weight after `memory` more.
    pub fn new(memory: f64) -> Self {
        Self { xx: [[0.0; N]; N], xy: [0.0; N], seen: 0, memory: (-1.0 / memory).exp(), coefficients: [0.0; N] }
    }

    /// Whether there is anything to predict from.
    pub fn is_known(&self) -> bool {
        self.seen > 0
    }

    /// How many observations there were.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The current coefficients.
    pub fn coefficients(&self) -> &[f64; N] {
        &self.coefficients
    }

    /// What is expected at x.
    pub fn at(&self, x: [f64; N]) -> f64 {
        self.coefficients.iter().zip(x).map(|(c, x)| c * x).sum()
    }

    /// Learns. A measurement far above what is expected (a pause of the machine) counts as four times that.
    pub fn observe(&mut self, x: [f64; N], y: f64) {
        let y = if self.seen >= 8 { y.min(4.0 * self.at(x).max(1e-9)) } else { y };
        for i in 0..N {
            for j in 0..N {
                self.xx[i][j] = self.xx[i][j] * self.memory + x[i] * x[j];
            }
            self.xy[i] = self.xy[i] * self.memory + x[i] * y;
        }
        self.seen += 1;
        self.solve();
    }

    /// Whether the data tell feature `i` from the first: how far it varies, relative to its size.
    pub fn varies(&self, i: usize) -> bool {
        let explained = self.xx[0][i] * self.xx[0][i] / self.xx[0][0].max(f64::MIN_POSITIVE);
        self.xx[i][i] - explained > 0.01 * self.xx[i][i]
    }

    /// Normal equations with a thousandth of ridge on all but the first, and negative coefficients left out one by one.
    fn solve(&mut self) {
        let mut used = [true; N];
        loop {
            let mut a = self.xx;
            let mut b = self.xy;
            for i in 0..N {
                if i > 0 {
                    a[i][i] *= 1.001;
                }
                if !used[i] {
                    for j in 0..N {
                        a[i][j] = 0.0;
                        a[j][i] = 0.0;
                    }
                    a[i][i] = 1.0;
                    b[i] = 0.0;
                }
            }
            let x = eliminate(a, b);
            let worst = (1..N).filter(|&i| used[i] && x[i] < 0.0).min_by(|&i, &j| x[i].total_cmp(&x[j]));
            match worst {
                Some(i) => used[i] = false,
                None if x[0] < 0.0 => used[0] = false, // steeper than proportional: the line goes through zero
                None => {
                    self.coefficients = x;
                    break;
                }
            }
        }
    }
}

/// Gaussian elimination with pivots on the diagonal; the matrix is positive semidefinite, a vanishing pivot gives 0.
fn eliminate<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N]) -> [f64; N] {
    let scale: [f64; N] = std::array::from_fn(|i| a[i][i].abs().max(f64::MIN_POSITIVE));
    for i in 0..N {
        if a[i][i] <= 1e-12 * scale[i] {
            for j in 0..N {
                a[i][j] = 0.0;
                a[j][i] = 0.0;
            }
            a[i][i] = 1.0;
            b[i] = 0.0;
        }
        for row in i + 1..N {
            let factor = a[row][i] / a[i][i];
            for column in i..N {
                a[row][column] -= factor * a[i][column];
            }
            b[row] -= factor * b[i];
        }
    }
    for i in (0..N).rev() {
        for j in i + 1..N {
            b[i] -= a[i][j] * b[j];
        }
        b[i] /= a[i][i];
    }
    b
}

/// A mean whose memory fades.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mean {
    value: f64,
    seen: u64,
}

impl Mean {
    /// Learns; the first observations count equally, later ones a sixteenth.
    pub fn observe(&mut self, value: f64) {
        self.seen += 1;
        self.value += (value - self.value) / (self.seen.min(16) as f64);
    }

    /// The mean, or `otherwise` before there is one.
    pub fn get(&self, otherwise: f64) -> f64 {
        if self.seen > 0 { self.value } else { otherwise }
    }

    /// How many observations there were.
    pub fn seen(&self) -> u64 {
        self.seen
    }
}

/// All that is known about times.
#[derive(Debug, Clone)]
pub struct Latency {
    /// Seconds of a verification by (1, tokens, rows).
    pub target: Fit<3>,
    /// Seconds of a worker's build by (1 + tokens a branch, tokens of all branches).
    pub builds: Fit<2>,
    /// Seconds of a worker's chain by (1, tokens).
    pub chains: Fit<2>,
    /// Seconds that a request and its answer take beside the work.
    pub link: Mean,
    /// How much longer a whole build takes, from its command to its end, than the worker's own model says: workers that
    /// build for several streams make each wait.
    pub stretch: Mean,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            target: Fit::new(64.0),
            builds: Fit::new(64.0),
            chains: Fit::new(64.0),
            link: Mean::default(),
            stretch: Mean::default(),
        }
    }
}

impl Latency {
    /// Whether verification and drafting were both measured.
    pub fn is_known(&self) -> bool {
        self.target.is_known() && self.drafts_known()
    }

    /// Whether drafting was measured, in one form at least.
    pub fn drafts_known(&self) -> bool {
        self.chains.is_known() || self.builds.is_known()
    }

    /// A worker's own seconds for `depth` tokens behind `branches` branches.
    pub fn own(&self, depth: f64, branches: f64) -> f64 {
        if self.builds.is_known() {
            self.builds.at([1.0 + depth, depth * branches])
        } else {
            self.chains.at([1.0, 1.0 + depth])
        }
    }

    /// Seconds to verify `tokens` tokens (chains and the token before each) of `rows` rows.
    pub fn verify(&self, tokens: f64, rows: f64) -> f64 {
        self.target.at([1.0, tokens, rows])
    }

    /// Seconds until a chain of `length` tokens, asked for now, is here.
    pub fn fallback(&self, length: f64) -> f64 {
        if length <= 0.0 {
            return 0.0;
        }
        let own = if self.chains.is_known() { self.chains.at([1.0, length]) } else { self.own(length, 1.0) };
        own + self.link.get(0.0)
    }

    /// Seconds from the command until `branches` branches are drafted `depth` tokens ahead.
    pub fn build(&self, depth: f64, branches: f64) -> f64 {
        self.own(depth, branches) * self.stretch.get(1.0).max(1.0) + self.link.get(0.0)
    }

    /// How many tokens ahead `branches` branches are drafted within `seconds`.
    pub fn depth_within(&self, seconds: f64, branches: f64) -> f64 {
        let first = self.build(0.0, branches);
        let step = self.build(1.0, branches) - first;
        if step > 0.0 { ((seconds - first) / step).max(0.0) } else { f64::INFINITY }
    }

    /// The most branches whose build of `depth` tokens fits into `seconds`; 0 if none does.
    pub fn branches_within(&self, seconds: f64, depth: f64, most: u32) -> u32 {
        if self.build(depth, f64::from(most)) <= seconds {
            return most;
        }
        let (mut fits, mut not) = (0, most); // bisection: the time grows with the branches
        while not - fits > 1 {
            let middle = fits + (not - fits) / 2;
            if self.build(depth, f64::from(middle)) <= seconds { fits = middle } else { not = middle }
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_and_followed() {
        let mut latency = Latency::default();
        for i in 0..600 {
            let (tokens, rows) = (f64::from(1 + i % 7), 1.0);
            let scale = if i < 200 { 1.0 } else { 3.0 };
            latency.target.observe([1.0, tokens, rows], scale * (0.01 + 0.002 * tokens));
            let (steps, branches) = (f64::from(1 + i % 5), f64::from(4 + i % 3));
            latency.builds.observe([1.0 + steps, steps * branches], 0.001 * (1.0 + steps) + 1e-4 * steps * branches);
        }
        // The jump by three lies six times the memory back.
        assert!((latency.verify(4.0, 1.0) / 0.054 - 1.0).abs() < 0.05, "{}", latency.verify(4.0, 1.0));
        assert!((latency.build(7.0, 24.0) / (0.008 + 1e-4 * 168.0) - 1.0).abs() < 0.03);
        let most = latency.branches_within(0.02, 7.0, 64);
        assert!(latency.build(7.0, f64::from(most)) <= 0.02 && latency.build(7.0, f64::from(most + 1)) > 0.02);
        assert_eq!(latency.branches_within(1e-4, 7.0, 64), 0);
    }

    #[test]
    fn equal_sizes_give_a_constant_and_no_slope_is_negative() {
        let mut fit = Fit::<3>::new(128.0);
        for _ in 0..50 {
            fit.observe([1.0, 8.0, 1.0], 0.02);
        }
        assert!((fit.at([1.0, 8.0, 1.0]) - 0.02).abs() < 1e-6 && !fit.varies(1));
        let mut falling = Fit::<2>::new(128.0);
        for i in 0..50 {
            falling.observe([1.0, f64::from(i)], 5.0 - 0.05 * f64::from(i));
        }
        assert_eq!(falling.coefficients()[1], 0.0);
        assert!(falling.coefficients()[0] > 0.0);
    }

    #[test]
    fn a_pause_of_the_machine_does_not_last() {
        let mut fit = Fit::<2>::new(128.0);
        for _ in 0..64 {
            fit.observe([1.0, 1.0], 0.01);
        }
        fit.observe([1.0, 1.0], 100.0);
        assert!(fit.at([1.0, 1.0]) < 0.011);
    }
}
