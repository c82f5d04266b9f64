//! Outputs that left ±q/2: what a decryption gives is off by `±q`, and the row's sums by `±q` times a row of `R`.

use super::{COLUMNS, WINDOW};

/// What a row's sums tell of wraps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Found {
    /// One output is too large by `sign·q`.
    Single {
        /// Which.
        output: usize,
        /// 1 or −1.
        sign: f64,
    },
    /// Multiples of q, but not those of one output.
    Several,
    /// No multiples of q.
    Nothing,
}

/// Looks for what makes a row's sums `off`: each of them near a multiple of `modulus`, as far as noise of `variances`
/// allows, and the multiples those of exactly one output. Sixteen numbers of up to 8 name one output of many: two share
/// all of theirs, up to the sign, with a probability of 2^-63.
pub(super) fn look_for_wrap(
    off: &[f64; COLUMNS],
    variances: &[f64; COLUMNS],
    modulus: f64,
    columns: &[[i8; COLUMNS]],
) -> Found {
    let multiples = off.map(|off| (off / modulus).round());
    let near = |c: usize| (off[c] - multiples[c] * modulus).powi(2) <= WINDOW * WINDOW * variances[c];
    if !(0..COLUMNS).all(near) {
        return Found::Nothing;
    }
    let has = |row: &[i8; COLUMNS], sign: f64| row.iter().zip(&multiples).all(|(&r, &m)| sign * f64::from(r) == m);
    let candidates = [1.0, -1.0].into_iter().flat_map(|sign| {
        columns.iter().enumerate().filter(move |(_, row)| has(row, sign)).map(move |(output, _)| (output, sign))
    });
    let mut found = candidates.take(2);
    match (found.next(), found.next()) {
        (Some((output, sign)), None) => Found::Single { output, sign },
        _ => Found::Several,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const Q: f64 = 16_777_216.0;

    fn columns() -> Vec<[i8; COLUMNS]> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        (0..50).map(|_| std::array::from_fn(|_| rng.random_range(1..=8) * [1, -1][rng.random_range(0..2)])).collect()
    }

    fn sums(columns: &[[i8; COLUMNS]], wraps: &[(usize, f64)], noise: f64) -> [f64; COLUMNS] {
        std::array::from_fn(|c| {
            let noise = if c % 2 == 0 { noise } else { -noise };
            wraps.iter().map(|&(j, sign)| sign * Q * f64::from(columns[j][c])).sum::<f64>() + noise
        })
    }

    #[test]
    fn one_wrap_is_named_and_more_are_noticed() {
        let columns = columns();
        let look =
            |wraps: &[(usize, f64)], noise| look_for_wrap(&sums(&columns, wraps, noise), &[1e10; COLUMNS], Q, &columns);
        for sign in [1.0, -1.0] {
            assert_eq!(look(&[(31, sign)], 5e5), Found::Single { output: 31, sign });
        }
        assert_eq!(look(&[(3, 1.0), (17, -1.0)], 5e5), Found::Several);
        assert_eq!(look(&[(3, 0.5)], 0.0), Found::Nothing);
        assert_eq!(look(&[(3, 1.0)], 2e6), Found::Nothing);
        assert_eq!(look_for_wrap(&[f64::NAN; COLUMNS], &[1.0; COLUMNS], Q, &columns), Found::Nothing);
    }
}
