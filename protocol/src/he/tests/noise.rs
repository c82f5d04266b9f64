//! Empirical variances against the predictions that the planner relies on.

use super::*;
use crate::he::noise::{encoding_variance, fresh_variance, multiplied_variance, switching_variance};
use crate::he::reference::{reference_answer, reference_product};

/// `b − <a, s>` as a signed number mod `2^bits`, by the definition and in 64-bit words: nothing of the transform.
fn phases(mask: &Planes, body: &Planes, set: ParameterSet, secrets: &[Vec<i8>]) -> Vec<f64> {
    let (n, bits) = (set.polynomial_size(), 8 * body.limbs() as u32);
    let mut phases = Vec::new();
    for token in 0..body.rows() {
        let secret = &secrets[token / n];
        let at = token % n;
        for column in 0..body.columns() {
            let mut phase = body.value(token, column);
            for (row, _) in secret.iter().enumerate() {
                // Coefficient `at` of a·s takes s_(at − t), negated where the exponent wraps.
                let (component, t) = (row / n, row % n);
                let s = i64::from(secret[component * n + (at + n - t) % n]);
                let s = if t > at { -s } else { s };
                phase = phase.wrapping_sub(mask.value(row, column).wrapping_mul(s as u64));
            }
            phases.push((((phase << (64 - bits)) as i64) >> (64 - bits)) as f64);
        }
    }
    phases
}

fn mean_and_variance(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (mean, values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64)
}

/// Asserts a variance within 6 σ of its estimator (that of a Gaussian: √(2/count)) and a mean within 6 σ.
fn assert_noise(what: &str, noise: &[f64], predicted: f64, correlated: f64) {
    let (mean, variance) = mean_and_variance(noise);
    let count = noise.len() as f64 / correlated;
    println!("{what}: variance {variance:.4e}, predicted {predicted:.4e}, mean {mean:.3e}");
    assert!((variance / predicted - 1.0).abs() < 6.0 * (2.0 / count).sqrt(), "{what}: {variance} for {predicted}");
    assert!(mean.abs() < 6.0 * (predicted / count).sqrt() + 0.5, "{what}: mean {mean}");
}

#[test]
fn variances_are_as_predicted() {
    for set in ParameterSet::ALL {
        let (tokens, shape) = (48, LinearShape { d_in: 64, d_out: 96 });
        let precision = Precision::standard(set);
        let mut rng = rng(set as u64);
        let domain = domain(set, Direction::Forward);
        let seed = MaskSeed::generate(&mut rng);
        // Integers, encrypted with step 1, so that nothing is rounded and the exact product is known.
        let rows: Vec<f32> = (0..tokens * shape.d_in).map(|_| f32::from(rng.random_range(-9i8..=9))).collect();
        let steps = vec![1.0; tokens];
        let plaintext = Plaintext { rows: &rows, tokens, features: shape.d_in, steps: &steps };
        let (body, ticket) = encrypt(&seed, &domain, plaintext).unwrap();
        let secrets = [ticket.secret(0)];
        let mask = mask::expand_planes(&seed, &domain, 0..shape.d_in);

        let fresh: Vec<f64> = phases(&mask, &body, set, &secrets)
            .iter()
            .zip(&rows)
            .map(|(phase, &message)| phase - f64::from(message))
            .collect();
        assert_noise(&format!("{set} fresh"), &fresh, fresh_variance(set), 1.0);

        let weights = random_weights(&mut rng, shape);
        let norms = column_norms_squared(&weights, shape, Direction::Forward);
        let exact = exact_product(&rows, &weights, shape, Direction::Forward);
        let product = |operand| reference_product(operand, &weights, shape, Direction::Forward);
        // Each column scaled to unit variance, since each has its own norm.
        let multiplied: Vec<f64> = phases(&product(&mask), &product(&body), set, &secrets)
            .iter()
            .zip(&exact)
            .enumerate()
            .map(|(i, (phase, exact))| (phase - exact) / multiplied_variance(set, norms[i % shape.d_out]).sqrt())
            .collect();
        // The 96 products of a row share 64 errors: 64 independent values at most.
        assert_noise(&format!("{set} multiplied"), &multiplied, 1.0, 96.0 / 64.0 * 1.5);

        let answer = reference_answer(precision, &seed, &domain, &body, &weights, shape);
        let unit = f64::from(precision.dropped_bits()).exp2();
        let switched: Vec<f64> = phases(&answer.mask, &answer.body, set, &secrets)
            .iter()
            .zip(&exact)
            .enumerate()
            .map(|(i, (phase, exact))| {
                let predicted = multiplied_variance(set, norms[i % shape.d_out]) + switching_variance(precision);
                (phase * unit - exact) / predicted.sqrt()
            })
            .collect();
        // Rows of one column share the rounding of the mask, through different coefficients of one secret.
        assert_noise(&format!("{set} switched"), &switched, 1.0, 4.0);
    }
}

#[test]
fn rounding_of_the_encoding_is_as_predicted() {
    let (set, tokens, features, step) = (ParameterSet::P24, 200, 256, 317.3);
    let mut rng = rng(5);
    let domain = domain(set, Direction::Forward);
    let seed = MaskSeed::generate(&mut rng);
    let rows: Vec<f32> = (0..tokens * features).map(|_| rng.random_range(-1e3..1e3)).collect();
    let steps = vec![step; tokens];
    let plaintext = Plaintext { rows: &rows, tokens, features, steps: &steps };
    let (body, ticket) = encrypt(&seed, &domain, plaintext).unwrap();
    let mask = mask::expand_planes(&seed, &domain, 0..features);
    let noise: Vec<f64> = phases(&mask, &body, set, &[ticket.secret(0)])
        .iter()
        .zip(&rows)
        .map(|(phase, &x)| phase - f64::from(x) * step)
        .collect();
    assert_noise("encoded", &noise, fresh_variance(set) + encoding_variance(1.0), 1.0);
}
