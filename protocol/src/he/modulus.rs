//! Output modulus switching: the worker keeps the most significant bytes of each value, rounded to nearest.

use super::{Planes, Precision};

/// `⌊(value + 2^(d-1)) / 2^d⌋ mod 2^(8·output_limbs)` for a value mod q, `d` the dropped bits; the value itself for
/// `d = 0`.
pub const fn switch_value(value: u64, precision: Precision) -> u64 {
    let dropped = precision.dropped_bits();
    let half = if dropped == 0 { 0 } else { 1 << (dropped - 1) };
    let kept = 8 * precision.output_limbs as u32;
    ((value + half) >> dropped) & ((1 << kept) - 1)
}

/// Switches every value of `planes`, `set.limbs()` limbs, to `output_limbs` limbs.
///
/// Panics if the planes do not have the limbs of the set.
pub fn switch_planes(planes: &Planes, precision: Precision) -> Planes {
    assert!(precision.is_valid() && planes.limbs() == precision.set.limbs());
    let mut switched = Planes::zeros(usize::from(precision.output_limbs), planes.rows(), planes.columns());
    for row in 0..planes.rows() {
        for column in 0..planes.columns() {
            switched.set_value(row, column, switch_value(planes.value(row, column), precision));
        }
    }
    switched
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::he::ParameterSet;

    proptest! {
        #[test]
        fn a_switched_value_is_the_nearest(value: u64) {
            for set in ParameterSet::ALL {
                for output_limbs in 1..=set.limbs() as u8 {
                    let precision = Precision { set, output_limbs };
                    let (q, d) = (1i128 << set.modulus_bits(), precision.dropped_bits());
                    let value = i128::from(value) % q;
                    let back = i128::from(switch_value(value as u64, precision)) << d;
                    // Distance on the circle of circumference q.
                    let distance = (back - value).rem_euclid(q).min((value - back).rem_euclid(q));
                    prop_assert!(2 * distance <= 1 << d);
                    prop_assert!(d > 0 || distance == 0);
                }
            }
        }
    }
}
