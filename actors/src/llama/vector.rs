//! Loops over rows of numbers, written so that the compiler vectorises them.
//!
//! The head alone takes one exponential for each token and vocabulary entry (50 million in a step of four
//! sequences of SmolLM2), where the C library's scalar function would cost more than the products beside it.

const LANES: usize = 8;

/// `eˣ` with a relative error below 3e-7; below `e⁻⁸⁷` it stays at that, and above `e⁸⁸` at that.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer that then sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the reduced argument keeps its low bits.
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    // Taylor's coefficients, bent a little to share the error out over |r| ≤ ln(2)/2 (Cephes).
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// Replaces a row by the exponentials of its distances to its maximum; returns the maximum and their sum.
pub(crate) fn exp_row(row: &mut [f32]) -> (f32, f32) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let max = lanes.iter().copied().fold(rest, f32::max);
    let mut sums = [0.0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for x in chunks.into_remainder() {
        *x = exp(*x - max);
        sum += *x;
    }
    (max, sum)
}

/// `Σ aᵢ·bᵢ`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate_over_its_range() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert!(exp(-1e30) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(1e30).is_finite());
    }

    #[test]
    fn a_row_of_any_length_sums_as_in_double_precision() {
        for length in [1, 7, 8, 9, 100, 1003] {
            let row: Vec<f32> = (0..length).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 30.0).collect();
            let exact_max = row.iter().copied().fold(f32::MIN, f32::max);
            let exact: f64 = row.iter().map(|&x| f64::from(x - exact_max).exp()).sum();
            let mut replaced = row.clone();
            let (max, sum) = exp_row(&mut replaced);
            assert_eq!(max, exact_max);
            assert!((f64::from(sum) / exact - 1.0).abs() < 1e-5);
            assert!((replaced[length / 2] - (row[length / 2] - max).exp()).abs() < 1e-6);
        }
    }
}
