//! `decrypt(product(encrypt(x))) = x·W` within the predicted error.

use proptest::prelude::*;
use rand::Rng;

use super::*;
use crate::he::noise::product_variance;
use crate::he::reference::{reference_answer, reference_product};

/// Encrypts, multiplies, switches, cuts into tiles of `width` columns, decrypts in reverse order, and compares.
fn check(precision: Precision, direction: Direction, shape: LinearShape, tokens: usize, width: usize, seed: u64) {
    let mut rng = rng(seed);
    let (inner, outer) = shape.along(direction);
    let domain = domain(precision.set, direction);
    let weights = random_weights(&mut rng, shape);
    let mut rows: Vec<f32> = (0..tokens * inner).map(|_| rng.random_range(-3.0..3.0)).collect();
    // A row of zeros, and one of another order of magnitude.
    rows[..inner].fill(0.0);
    if tokens > 1 {
        rows[inner..2 * inner].iter_mut().for_each(|x| *x *= 1e-6);
    }
    let norms = column_norms_squared(&weights, shape, direction);
    let steps = steps(precision.set, &rows, inner, &norms);
    let mask_seed = MaskSeed::generate(&mut rng);
    let plaintext = Plaintext { rows: &rows, tokens, features: inner, steps: &steps };
    let (body, ticket) = encrypt(&mask_seed, &domain, plaintext).unwrap();
    assert_eq!((body.limbs(), body.rows(), body.columns()), (precision.set.limbs(), tokens, inner));

    let answer = reference_answer(precision, &mask_seed, &domain, &body, &weights, shape);
    let mut decryption = ticket.open(precision, outer).unwrap();
    let mut out = vec![f32::NAN; tokens * outer];
    for first in (0..outer).step_by(width).rev() {
        decryption.tile(&cut(&answer, first, width.min(outer - first)), &mut out).unwrap();
    }
    decryption.finish().unwrap();

    let expected = exact_product(&rows, &weights, shape, direction);
    for (index, (&value, &expected)) in out.iter().zip(&expected).enumerate() {
        let (token, column) = (index / outer, index % outer);
        if steps[token] == 0.0 {
            assert!(value == 0.0, "a zero row gives zeros");
            continue;
        }
        // 8 σ for the noise, and f32's rounding of the result.
        let tolerance = 8.0 * product_variance(precision, norms[column]).sqrt() / steps[token] + expected.abs() * 1e-6;
        assert!((f64::from(value) - expected).abs() < tolerance, "{precision} ({token}, {column}): {value} {expected}");
    }
}

/// Columns `first..first + width` of a whole answer.
fn cut(answer: &ProductTile, first: usize, width: usize) -> ProductTile {
    let [mask, body] = [&answer.mask, &answer.body].map(|planes| {
        let mut part = Planes::zeros(planes.limbs(), planes.rows(), width);
        for row in 0..planes.rows() {
            for column in 0..width {
                part.set_value(row, column, planes.value(row, first + column));
            }
        }
        part
    });
    ProductTile { first_column: first, mask, body }
}

#[test]
fn every_set_and_every_kind_of_block() {
    for set in ParameterSet::ALL {
        let size = set.polynomial_size();
        let shape = LinearShape { d_in: 37, d_out: 21 };
        for tokens in [1, 5, size - 1, size, size + 1, 2 * size + 7] {
            check(Precision::standard(set), Direction::Forward, shape, tokens, 8, tokens as u64);
        }
    }
}

#[test]
fn every_number_of_output_limbs_both_ways() {
    for set in ParameterSet::ALL {
        for output_limbs in 1..=set.limbs() as u8 {
            let precision = Precision { set, output_limbs };
            check(precision, Direction::Backward, LinearShape { d_in: 40, d_out: 70 }, 6, 33, 1);
            check(precision, Direction::Forward, LinearShape { d_in: 70, d_out: 40 }, 6, 64, 2);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_shape(
        set in prop::sample::select(ParameterSet::ALL.to_vec()),
        d_in in 1usize..80,
        d_out in 1usize..80,
        tokens in 1usize..300,
        width in 1usize..80,
        backward: bool,
        seed: u64,
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        check(Precision::standard(set), direction, LinearShape { d_in, d_out }, tokens, width, seed);
    }
}

#[test]
fn the_reference_product_is_the_product_of_integers() {
    let shape = LinearShape { d_in: 3, d_out: 2 };
    let weights = [1, -2, 3, 4, -5, 6];
    let mut operand = Planes::zeros(3, 1, 3);
    for (column, value) in [10, (1 << 24) - 1, 7].into_iter().enumerate() {
        operand.set_value(0, column, value);
    }
    let product = reference_product(&operand, &weights, shape, Direction::Forward);
    let modulus = 1 << 24;
    assert_eq!(product.value(0, 0), (10i64 - 3 - 35).rem_euclid(modulus) as u64);
    assert_eq!(product.value(0, 1), (-20i64 - 4 + 42).rem_euclid(modulus) as u64);

    let mut operand = Planes::zeros(3, 1, 2);
    operand.set_value(0, 0, 100);
    operand.set_value(0, 1, 1);
    let product = reference_product(&operand, &weights, shape, Direction::Backward);
    let expected = [98, 304, (1 << 24) - 494];
    assert_eq!([0, 1, 2].map(|column| product.value(0, column)), expected);
}

#[test]
fn two_encryptions_of_the_same_rows_differ() {
    let domain = domain(ParameterSet::P24, Direction::Forward);
    let (rows, steps) = (vec![0.0; 8 * 4], vec![1.0; 8]);
    let seed = MaskSeed::from_bytes([9; 32]);
    let plaintext = Plaintext { rows: &rows, tokens: 8, features: 4, steps: &steps };
    let first = encrypt(&seed, &domain, plaintext).unwrap().0;
    let second = encrypt(&seed, &domain, plaintext).unwrap().0;
    let same = (0..32).filter(|i| first.value(i / 4, i % 4) == second.value(i / 4, i % 4)).count();
    assert!(same < 4);
}
