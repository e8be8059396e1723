//! Philox4x32-10: a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011). A draw is a pure function of (seed, counter), so any thread, process or device that knows what
//! a number is *for* gets the same number. The counter names the use: request, position, purpose.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32 over one counter block.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let wide0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let wide1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(wide1 >> 32) as u32 ^ c[1] ^ k[0], wide1 as u32, (wide0 >> 32) as u32 ^ c[3] ^ k[1], wide0 as u32];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// What a random number is drawn for. Numbers of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The draft model draws a token.
    Draft = 0,
    /// The coin that accepts or rejects a drafted token.
    Accept = 1,
    /// A token of the residual law, after a rejection.
    Residual = 2,
    /// A token of the target's law: plain sampling, and the bonus token of a fully accepted chain.
    Target = 3,
    /// Anything a test or a user-level feature draws.
    Other = 4,
    /// Whether token rounding gives an expert the upper multiple of the tile (request: the expert, position: the step).
    Round = 5,
    /// Whether an attention weight is dropped (request: sequence and head; then query and key).
    Drop = 6,
    /// The clocks of coupled sampling (the block is the key of another generator, which counts tokens).
    Race = 9,
    /// A scheduler tries something that it does not know well enough.
    Schedule = 7,
}

/// A uniform number in [0, 1) with 53 random bits.
///
/// `request` names the stream (a sequence of a batch), `position` the token position in it.
pub fn uniform(seed: u64, request: u32, position: u64, purpose: Purpose) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, request, purpose as u32];
    let [a, b, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(a) << 21) ^ (u64::from(b) >> 11);
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn random123_known_answers() {
        let cases: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, answer) in cases {
            assert_eq!(philox4x32(counter, key), answer);
        }
    }

    #[test]
    fn uniform_is_in_range_and_names_its_use() {
        let mut sum = 0.0;
        for position in 0..10_000 {
            let u = uniform(7, 3, position, Purpose::Accept);
            assert!((0.0..1.0).contains(&u));
            sum += u;
        }
        assert!((sum / 10_000.0 - 0.5).abs() < 0.01);
        assert_ne!(uniform(7, 3, 0, Purpose::Accept), uniform(7, 3, 0, Purpose::Draft));
        assert_ne!(uniform(7, 3, 0, Purpose::Accept), uniform(7, 4, 0, Purpose::Accept));
        assert_ne!(uniform(7, 3, 0, Purpose::Accept), uniform(8, 3, 0, Purpose::Accept));
    }
}
