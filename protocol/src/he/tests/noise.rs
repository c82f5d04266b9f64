//! Empirical variances against the predictions that the planner relies on.

use super::*;
use crate::he::noise::{
    body_variance, encoding_variance, fresh_variance, mask_variance, multiplied_variance, output_variance,
    product_variance,
};
use crate::he::reference::{reference_answer, reference_product};

/// `b − <a, s>` as a signed number mod `q`, by the definition, in 64-bit words whose top bits hold the values: nothing
/// of the transform.
fn phases(mask: &Planes, body: &Planes, set: ParameterSet, secrets: &[Vec<i8>]) -> Vec<f64> {
    let n = set.polynomial_size();
    let top = |planes: &Planes, row, column| planes.value(row, column) << (64 - planes.bits());
    let mut phases = Vec::new();
    for token in 0..body.rows() {
        let secret = &secrets[token / n];
        let at = token % n;
        for column in 0..body.columns() {
            let mut phase = top(body, token, column);
            for (row, _) in secret.iter().enumerate() {
                // Coefficient `at` of a·s takes s_(at − t), negated where the exponent wraps.
                let (component, t) = (row / n, row % n);
                let s = i64::from(secret[component * n + (at + n - t) % n]);
                let s = if t > at { -s } else { s };
                phase = phase.wrapping_sub(top(mask, row, column).wrapping_mul(s as u64));
            }
            phases.push(phase as i64 as f64 / f64::from(64 - set.modulus_bits()).exp2());
        }
    }
    phases
}

fn mean_and_variance(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (mean, values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64)
}

/// Asserts a variance within 6 σ of its estimator (that of a Gaussian: √(2/count)) and a mean within 6 σ.
pub(super) fn assert_noise(what: &str, noise: &[f64], predicted: f64, correlated: f64) {
    let (mean, variance) = mean_and_variance(noise);
    let count = noise.len() as f64 / correlated;
    println!("{what}: variance {variance:.4e}, predicted {predicted:.4e}, mean {mean:.3e}");
    assert!((variance / predicted - 1.0).abs() < 6.0 * (2.0 / count).sqrt(), "{what}: {variance} for {predicted}");
    assert!(mean.abs() < 6.0 * (predicted / count).sqrt() + 0.5, "{what}: mean {mean}");
}

/// Of each set: nothing rounded; only the body; only the output; only the mask product; whole bytes; and packed bits.
fn precisions(set: ParameterSet) -> [Precision; 7] {
    let exact = Precision::exact(set);
    let bits = exact.body_bits;
    [
        exact,
        Precision { body_bits: bits - 4, output_bits: bits - 4, ..exact },
        Precision { output_bits: bits - 8, ..exact },
        Precision { mask_limbs: exact.mask_limbs - 1, ..exact },
        Precision::standard(set),
        Precision { body_bits: bits - 2, output_bits: bits - 14, ..exact },
        Precision { body_bits: bits - 6, output_bits: bits - 12, ..exact },
    ]
}

#[test]
fn variances_are_as_predicted() {
    for set in ParameterSet::ALL {
        for precision in precisions(set) {
            check(precision);
        }
    }
}

fn check(precision: Precision) {
    let set = precision.set;
    let (tokens, shape) = (48, LinearShape { d_in: 64, d_out: 96 });
    let mut rng = rng(set as u64);
    let domain = domain(set, Direction::Forward);
    let seed = MaskSeed::generate(&mut rng);
    // Integers, encrypted with step 1, so that the encoding rounds nothing and the exact product is known.
    let rows: Vec<f32> = (0..tokens * shape.d_in).map(|_| f32::from(rng.random_range(-9i8..=9))).collect();
    let steps = vec![1.0; tokens];
    let plaintext = Plaintext { rows: &rows, tokens, features: shape.d_in, steps: &steps };
    let (body, ticket) = encrypt(&seed, &domain, precision, plaintext).unwrap();
    let secrets = [ticket.secret(0)];
    let mask = mask::expand_planes(&seed, &domain, 0..shape.d_in);

    let fresh: Vec<f64> = phases(&mask, &body, set, &secrets)
        .iter()
        .zip(&rows)
        .map(|(phase, &message)| phase - f64::from(message))
        .collect();
    let name = format!("{precision} ({} of masks)", precision.mask_limbs);
    assert_noise(&format!("{name} fresh"), &fresh, fresh_variance(set) + body_variance(precision), 1.0);

    let weights = random_weights(&mut rng, shape);
    let norms = column_norms_squared(&weights, shape, Direction::Forward);
    let exact = exact_product(&rows, &weights, shape, Direction::Forward);
    // Each column scaled to unit variance, since each has its own norm.
    let scaled = |found: &[f64], predicted: &dyn Fn(f64) -> f64| -> Vec<f64> {
        let scale = |i: usize| predicted(norms[i % shape.d_out]).sqrt();
        found.iter().zip(&exact).enumerate().map(|(i, (found, exact))| (found - exact) / scale(i)).collect()
    };
    let product = |operand: &Planes| reference_product(operand, &weights, shape, Direction::Forward);
    let multiplied = phases(&product(&mask), &product(&body.spread()), set, &secrets);
    let multiplied = scaled(&multiplied, &|norm| multiplied_variance(precision, norm));
    // The 96 products of a row share 64 errors: 64 independent values at most.
    assert_noise(&format!("{name} multiplied"), &multiplied, 1.0, 96.0 / 64.0 * 1.5);

    let answer = reference_answer(precision, Direction::Forward, &body, &weights, shape);
    let switched = phases(&product(&mask), &answer.rows, set, &secrets);
    let switched = scaled(&switched, &|norm| multiplied_variance(precision, norm) + output_variance(precision));
    assert_noise(&format!("{name} switched"), &switched, 1.0, 4.0);

    // The owner's own decryption, whose error has the rounding of the mask product too.
    let masks = mask_product(precision, &seed, &domain, &weights, shape);
    let mut decryption = ticket.open(masks, precision, vec![0.0; exact.len()]).unwrap();
    decryption.tile(answer).unwrap();
    let out: Vec<f64> = decryption.finish().unwrap().unchecked().into_iter().map(f64::from).collect();
    let decrypted = scaled(&out, &|norm| product_variance(precision, norm) - encoding_variance(norm));
    // Rows of one column share the rounding of the mask, through different coefficients of one secret.
    assert_noise(&format!("{name} decrypted"), &decrypted, 1.0, 4.0);
}

/// The rounding of the mask product alone: by the worker, and once more by the owner where that saves a transform.
#[test]
fn rounding_of_masks_is_as_predicted() {
    for set in ParameterSet::ALL {
        let (tokens, shape) = (48, LinearShape { d_in: 3, d_out: 160 });
        let mut rng = rng(9);
        let domain = domain(set, Direction::Forward);
        let seed = MaskSeed::generate(&mut rng);
        let weights = random_weights(&mut rng, shape);
        let rows = vec![0.0; tokens * shape.d_in];
        let plaintext = Plaintext { rows: &rows, tokens, features: shape.d_in, steps: &vec![1.0; tokens] };
        for mask_limbs in 2..set.limbs() as u8 {
            let decrypt = |precision: Precision, body: &Planes, ticket: Ticket| {
                let masks = mask_product(precision, &seed, &domain, &weights, shape);
                let answer = reference_answer(precision, Direction::Forward, body, &weights, shape);
                let mut decryption = ticket.open(masks, precision, vec![0.0; tokens * shape.d_out]).unwrap();
                decryption.tile(answer).unwrap();
                decryption.finish().unwrap().unchecked()
            };
            let rounded = Precision { mask_limbs, ..Precision::exact(set) };
            let (body, ticket) = encrypt(&seed, &domain, rounded, plaintext).unwrap();
            let exact = Ticket::new(
                Precision::exact(set),
                vec![secret::OneTimeSecret::of(set, &ticket.secret(0))],
                vec![1.0; tokens],
            );
            let exact = decrypt(Precision::exact(set), &body, exact);
            let rounded_out = decrypt(rounded, &body, ticket);
            let noise: Vec<f64> = rounded_out.iter().zip(&exact).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
            assert_noise(&format!("{set} masks of {mask_limbs}"), &noise, mask_variance(rounded), 3.0);
        }
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
    let (body, ticket) = encrypt(&seed, &domain, Precision::exact(set), plaintext).unwrap();
    let mask = mask::expand_planes(&seed, &domain, 0..features);
    let noise: Vec<f64> = phases(&mask, &body, set, &[ticket.secret(0)])
        .iter()
        .zip(&rows)
        .map(|(phase, &x)| phase - f64::from(x) * step)
        .collect();
    assert_noise("encoded", &noise, fresh_variance(set) + encoding_variance(1.0), 1.0);
}
