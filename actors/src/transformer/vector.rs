//! Loops over rows of numbers, written so that the compiler vectorises them, and compiled twice: for every
//! processor, and for those with AVX2, which is looked for when they are called.
//!
//! The head alone takes one exponential for each token and vocabulary entry (50 million in a step of four
//! sequences of SmolLM2), where the C library's scalar function would cost more than the products beside it.
//! Products and sums are never fused, so that every processor computes the same numbers.

/// Sums that run side by side: enough to hide an addition's latency.
const LANES: usize = 32;

/// Defines functions whose bodies are compiled for AVX2 too, where the processor has it.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$meta])*
        $vis fn $name($($argument: $kind),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $kind),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($argument: $kind),*) $(-> $result)? {
                    body($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the only thing that the function asks for is AVX2, which this processor has. Without
                    // it the process would end by an illegal instruction.
                    return unsafe { wide($($argument),*) };
                }
            }
            body($($argument),*)
        }
    )*};
}
pub(crate) use vectorised;

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

/// `Σ aᵢ·bᵢ` by as many sums side by side as `W`, which is a power of two, added up by halves. The order of the sums depends on
/// the length alone.
#[inline(always)]
fn halved_dot<const W: usize>(a: &[f32], b: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; W];
    let (chunks, rest) = a.as_chunks::<W>();
    for (number, chunk) in chunks.iter().enumerate() {
        for (i, (lane, a)) in lanes.iter_mut().zip(chunk).enumerate() {
            *lane += a * b(number * W + i);
        }
    }
    let behind = a.len() - rest.len();
    let mut sum: f32 = rest.iter().enumerate().map(|(i, a)| a * b(behind + i)).sum();
    let mut width = W;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    sum += lanes[0];
    sum
}

/// The hyperbolic tangent with a relative error below 5e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    // Near zero the quotient would lose its digits.
    let square = x * x;
    let mut series = 0.021_869_488;
    for c in [-0.053_968_254, 0.133_333_33, -0.333_333_33, 1.0] {
        series = series * square + c;
    }
    let quotient = 1.0 - 2.0 / (exp(2.0 * size) + 1.0);
    if size < 0.3 { x * series } else { quotient.copysign(x) }
}

vectorised! {
    /// Replaces every value by one that approaches a bound: `cap · tanh(x / cap)`.
    pub(crate) fn soft_cap(row: &mut [f32], cap: f32) {
        let inverse = cap.recip();
        row.iter_mut().for_each(|x| *x = cap * tanh(*x * inverse));
    }

    /// The slopes of [`soft_cap`] at values that it gave.
    pub(crate) fn soft_cap_slopes(capped: &[f32], cap: f32, slopes: &mut [f32]) {
        let inverse = cap.recip();
        for (slope, x) in slopes.iter_mut().zip(capped) {
            let t = x * inverse;
            *slope = 1.0 - t * t;
        }
    }

    /// `to ∘= by`.
    pub(crate) fn multiply_by(to: &mut [f32], by: &[f32]) {
        to.iter_mut().zip(by).for_each(|(to, by)| *to *= by);
    }

    /// The largest value of a row; `-∞` of an empty one.
    pub(crate) fn maximum(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = if x > *lane { x } else { *lane };
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Replaces every value by `eˣ⁻ˢʰⁱᶠᵗ`; returns their sum.
    pub(crate) fn exp_row(row: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = row.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *x = exp(*x - shift);
                *lane += *x;
            }
        }
        let mut sum: f32 = lanes.iter().sum();
        for x in rest {
            *x = exp(*x - shift);
            sum += *x;
        }
        sum
    }

    /// `Σ aᵢ·bᵢ`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
    }

    /// Products of a row with some rows that begin `stride` apart: `outᵢ = scale · Σ aⱼ·rowsᵢⱼ`.
    pub(crate) fn dots(a: &[f32], rows: &[f32], stride: usize, scale: f32, out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(rows.chunks(stride)) {
            let row = &row[..a.len()];
            *out = scale * halved_dot::<16>(a, |i| row[i]);
        }
    }

    /// The same with rows of bf16, one after the other.
    pub(crate) fn dots_bf16(a: &[f32], rows: &[u16], out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(a.len())) {
            *out = halved_dot::<32>(a, |i| f32::from_bits(u32::from(row[i]) << 16));
        }
    }

    /// The same with rows of f32, one after the other.
    pub(crate) fn dots_f32(a: &[f32], rows: &[f32], out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(a.len())) {
            *out = halved_dot::<32>(a, |i| row[i]);
        }
    }

    /// `to += Σ factorᵢ · rowsᵢ` of rows that begin `stride` apart.
    pub(crate) fn add_rows(to: &mut [f32], factors: &[f32], rows: &[f32], stride: usize) {
        let width = to.len();
        let (fours, rest) = factors.as_chunks::<4>();
        let row = |number: usize| &rows[number * stride..][..width];
        for (four, &[a, b, c, d]) in fours.iter().enumerate() {
            let (first, second, third, fourth) = (row(4 * four), row(4 * four + 1), row(4 * four + 2), row(4 * four + 3));
            for (i, to) in to.iter_mut().enumerate() {
                *to = *to + a * first[i] + b * second[i] + c * third[i] + d * fourth[i];
            }
        }
        for (factor, number) in rest.iter().zip(4 * fours.len()..) {
            to.iter_mut().zip(row(number)).for_each(|(to, from)| *to += factor * from);
        }
    }

    /// `Σ aᵢ·bᵢ·cᵢ`.
    pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let (c_chunks, c_rest) = c.as_chunks::<LANES>();
        for ((a, b), c) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
            for (((lane, a), b), c) in lanes.iter_mut().zip(a).zip(b).zip(c) {
                *lane += a * b * c;
            }
        }
        let rest: f32 = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a * b * c).sum();
        lanes.iter().sum::<f32>() + rest
    }

    /// `to += from`.
    pub(crate) fn add(to: &mut [f32], from: &[f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    }

    /// `to += factor · from`.
    pub(crate) fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
    }

    /// `to = a ∘ b`.
    pub(crate) fn multiply_into(to: &mut [f32], a: &[f32], b: &[f32]) {
        to.iter_mut().zip(a).zip(b).for_each(|((to, a), b)| *to = a * b);
    }

    /// `to += a ∘ b`.
    pub(crate) fn add_product(to: &mut [f32], a: &[f32], b: &[f32]) {
        to.iter_mut().zip(a).zip(b).for_each(|((to, a), b)| *to += a * b);
    }

    /// Multiplies every value.
    pub(crate) fn scale(row: &mut [f32], factor: f32) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
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
    fn the_hyperbolic_tangent_is_accurate_and_its_cap_has_its_slope() {
        for i in -90_000..90_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - exact).abs() <= 5e-7 * exact.abs(), "{x}: {} for {exact}", tanh(x));
        }
        assert_eq!((tanh(1e30), tanh(-1e30)), (1.0, -1.0));
        let row: Vec<f32> = (-50..50).map(|i| i as f32 * 0.3).collect();
        let (mut capped, mut slopes) = (row.clone(), vec![0.0; row.len()]);
        soft_cap(&mut capped, 5.0);
        soft_cap_slopes(&capped, 5.0, &mut slopes);
        for ((x, capped), slope) in row.iter().map(|&x| f64::from(x) / 5.0).zip(capped).zip(slopes) {
            assert!((f64::from(capped) - 5.0 * x.tanh()).abs() < 1e-5);
            assert!((f64::from(slope) - (1.0 - x.tanh().powi(2))).abs() < 1e-5);
        }
    }

    #[test]
    fn rows_of_any_length_sum_as_in_double_precision() {
        for length in [1, 7, 8, 9, 31, 32, 100, 1003] {
            let row: Vec<f32> = (0..length).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 30.0).collect();
            let exact_max = row.iter().copied().fold(f32::MIN, f32::max);
            let exact: f64 = row.iter().map(|&x| f64::from(x - exact_max).exp()).sum();
            let mut replaced = row.clone();
            assert_eq!(maximum(&row), exact_max);
            let sum = exp_row(&mut replaced, exact_max);
            assert!((f64::from(sum) / exact - 1.0).abs() < 1e-5);
            assert!((replaced[length / 2] - (row[length / 2] - exact_max).exp()).abs() < 1e-6);

            let other: Vec<f32> = (0..length).map(|i| ((i * 31 % 101) as f32 - 50.0) / 30.0).collect();
            let exact: Vec<f64> = row.iter().zip(&other).map(|(a, b)| f64::from(*a) * f64::from(*b)).collect();
            let size: f64 = exact.iter().map(|x| x.abs()).sum::<f64>() + 1e-9;
            assert!((f64::from(dot(&row, &other)) - exact.iter().sum::<f64>()).abs() < 1e-5 * size);
            let mut found = [0.0; 1];
            dots(&row, &other, length, 2.0, &mut found);
            assert!((f64::from(found[0]) - 2.0 * exact.iter().sum::<f64>()).abs() < 2e-5 * size);
            dots_f32(&row, &other, &mut found);
            assert!((f64::from(found[0]) - exact.iter().sum::<f64>()).abs() < 1e-5 * size);
            let halves: Vec<u16> = other.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            dots_bf16(&row, &halves, &mut found);
            let cut = |x: &f32| f64::from(f32::from_bits(x.to_bits() >> 16 << 16));
            let exact_of_cut: f64 = row.iter().zip(&other).map(|(a, b)| f64::from(*a) * cut(b)).sum();
            assert!((f64::from(found[0]) - exact_of_cut).abs() < 1e-5 * size);
            let cubed: f64 = exact.iter().zip(&other).map(|(x, b)| x * f64::from(*b)).sum();
            assert!((f64::from(dot3(&row, &other, &other)) - cubed).abs() < 2e-5 * size);
        }
        assert_eq!(maximum(&[]), f32::NEG_INFINITY);
    }

    #[test]
    fn elementwise_loops_follow_their_definitions() {
        for length in [0, 1, 5, 33] {
            let a: Vec<f32> = (0..length).map(|i| i as f32 - 3.0).collect();
            let b: Vec<f32> = (0..length).map(|i| 0.5 * i as f32 + 1.0).collect();
            let check = |found: &[f32], expected: &dyn Fn(f32, f32) -> f32| {
                assert!(found.iter().zip(a.iter().zip(&b)).all(|(x, (a, b))| *x == expected(*a, *b)), "{found:?}");
            };
            let on = |work: &dyn Fn(&mut [f32])| {
                let mut copy = a.clone();
                work(&mut copy);
                copy
            };
            check(&on(&|x| add(x, &b)), &|a, b| a + b);
            check(&on(&|x| add_scaled(x, 2.0, &b)), &|a, b| a + 2.0 * b);
            check(&on(&|x| multiply_into(x, &b, &b)), &|_, b| b * b);
            check(&on(&|x| add_product(x, &b, &b)), &|a, b| a + b * b);
            let rows = [&b[..], &[7.0; 3]].concat().repeat(6);
            let factors = [2.0, -1.0, 0.5, 1.0, 3.0, -0.25];
            let added = |a: f32, b: f32| factors.iter().fold(a, |sum, factor| sum + factor * b);
            check(&on(&|x| add_rows(x, &factors, &rows, length + 3)), &added);
            check(&on(&|x| multiply_by(x, &b)), &|a, b| a * b);
            check(&on(&|x| scale(x, 3.0)), &|a, _| a * 3.0);
        }
    }
}
