//! Modulus switching: the most significant bits of each value, rounded to nearest. The owner does it to a body before it goes
//! up, the worker to both products before they come down.

use super::Planes;

/// `⌊(value + 2^(d-1)) / 2^d⌋ mod 2^to` for a value mod `2^from`, `d = from − to` the dropped bits; the value itself for
/// `from = to`. `1 ≤ to ≤ from ≤ 63`.
pub const fn switch_value(value: u64, from: u32, to: u32) -> u64 {
    let dropped = from - to;
    let half = (1 << dropped) >> 1;
    (value.wrapping_add(half) >> dropped) & ((1 << to) - 1)
}

/// Switches every value of `planes` to its `bits` most significant bits.
///
/// Panics unless the planes have as many.
pub fn switch_planes(planes: &Planes, bits: u32) -> Planes {
    assert!(Planes::has_width(bits) && bits <= planes.bits());
    let mut switched = Planes::zeros_of_bits(bits, planes.rows(), planes.columns());
    for row in 0..planes.rows() {
        for column in 0..planes.columns() {
            switched.set_value(row, column, switch_value(planes.value(row, column), planes.bits(), bits));
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
            for from in 1..=48 {
                for to in 1..=from {
                    let (q, d) = (1i128 << from, from - to);
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
