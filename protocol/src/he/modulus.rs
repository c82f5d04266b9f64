//! Modulus switching: the most significant bytes of each value, rounded to nearest. The owner does it to a body before
//! it goes up, the worker to both products before they come down.

use super::Planes;

/// `⌊(value + 2^(d-1)) / 2^d⌋ mod 2^(8·to)` for a value mod `2^(8·from)`, `d = 8·(from − to)` the dropped bits; the
/// value itself for `from = to`. Limbs: `1 ≤ to ≤ from ≤ 7`.
pub const fn switch_value(value: u64, from: usize, to: usize) -> u64 {
    let dropped = 8 * (from - to);
    let half = if dropped == 0 { 0 } else { 1 << (dropped - 1) };
    (value.wrapping_add(half) >> dropped) & ((1 << (8 * to)) - 1)
}

/// Switches every value of `planes` to its `limbs` most significant limbs.
///
/// Panics unless the planes have as many.
pub fn switch_planes(planes: &Planes, limbs: usize) -> Planes {
    assert!((1..=planes.limbs()).contains(&limbs));
    let mut switched = Planes::zeros(limbs, planes.rows(), planes.columns());
    for row in 0..planes.rows() {
        for column in 0..planes.columns() {
            switched.set_value(row, column, switch_value(planes.value(row, column), planes.limbs(), limbs));
        }
    }
    switched
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_switched_value_is_the_nearest(value: u64) {
            for from in 1..=6 {
                for to in 1..=from {
                    let (q, d) = (1i128 << (8 * from), 8 * (from - to));
                    let value = i128::from(value) % q;
                    let back = i128::from(switch_value(value as u64, from, to)) << d;
                    // Distance on the circle of circumference q.
                    let distance = (back - value).rem_euclid(q).min((value - back).rem_euclid(q));
                    prop_assert!(2 * distance <= 1 << d);
                    prop_assert!(d > 0 || distance == 0);
                }
            }
        }
    }
}
