//! `decrypt(product(encrypt(x))) = x·W` within the predicted error.

use proptest::prelude::*;
use rand::Rng;

use super::*;
use crate::he::noise::product_variance;
use crate::he::reference::{reference_answer, reference_masks, reference_product};

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
    // Some precisions leave no room for a message beside their own noise.
    let widest = norms.iter().fold(0.0f64, |a, &b| a.max(b));
    let noise = 8.0 * product_variance(precision, widest).sqrt();
    let room = 1.0 - noise / f64::from(precision.set.modulus_bits() - 1).exp2();
    if room < 0.1 {
        return;
    }
    let steps = steps(precision.set, &rows, inner, &norms, room * 0.99);
    let mask_seed = MaskSeed::generate(&mut rng);
    let plaintext = Plaintext { rows: &rows, tokens, features: inner, steps: &steps };
    let (body, ticket) = encrypt(&mask_seed, &domain, precision, plaintext).unwrap();
    assert_eq!((body.bits(), body.rows(), body.columns()), (precision.body_bits.into(), tokens, inner));

    let pieces = |tile: &ProductTile| -> Vec<ProductTile> {
        (0..outer).step_by(width).rev().map(|first| cut(tile, first, width.min(outer - first))).collect()
    };
    let mut masks = MaskProductBuilder::new(precision, outer).unwrap();
    for tile in pieces(&reference_masks(precision, &mask_seed, &domain, &weights, shape)) {
        masks.tile(&tile).unwrap();
    }
    let masks = Arc::new(masks.finish().unwrap().unchecked());
    let mut decryption = ticket.open(masks, precision, vec![f32::NAN; tokens * outer]).unwrap();
    for tile in pieces(&reference_answer(precision, direction, &body, &weights, shape)) {
        decryption.tile(tile).unwrap();
    }
    let out = decryption.finish().unwrap().unchecked();

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
pub(super) fn cut(answer: &ProductTile, first: usize, width: usize) -> ProductTile {
    let planes = &answer.rows;
    let mut part = Planes::zeros_of_bits(planes.bits(), planes.rows(), width);
    for row in 0..planes.rows() {
        for column in 0..width {
            part.set_value(row, column, planes.value(row, first + column));
        }
    }
    ProductTile { first_column: first, rows: part }
}

/// As few bits as are planned, both kinds of packed planes among them.
fn packed(set: ParameterSet) -> Precision {
    let exact = Precision::exact(set);
    Precision { body_bits: exact.body_bits - 2, output_bits: exact.output_bits - 14, ..exact }
}

#[test]
fn every_set_and_every_kind_of_block() {
    for set in ParameterSet::ALL {
        let size = set.polynomial_size();
        let shape = LinearShape { d_in: 37, d_out: 21 };
        for tokens in [1, 5, size - 1, size, size + 1, 2 * size + 7] {
            for precision in [Precision::standard(set), packed(set)] {
                check(precision, Direction::Forward, shape, tokens, 8, tokens as u64);
            }
        }
    }
}

#[test]
fn every_precision_both_ways() {
    let [p24, p32, p48] = ParameterSet::ALL.map(Precision::all);
    // They are many; steps that share no divisor with the numbers of bits reach all of each.
    for precision in p24.chain(p32.step_by(5)).chain(p48.step_by(67)) {
        check(precision, Direction::Backward, LinearShape { d_in: 40, d_out: 70 }, 6, 33, 1);
        check(precision, Direction::Forward, LinearShape { d_in: 70, d_out: 40 }, 6, 64, 2);
    }
}

#[test]
fn one_mask_product_serves_many_calls() {
    let precision = Precision::standard(ParameterSet::P32);
    let shape = LinearShape { d_in: 30, d_out: 20 };
    let mut rng = rng(4);
    let (weights, seed) = (random_weights(&mut rng, shape), MaskSeed::generate(&mut rng));
    let domain = domain(precision.set, Direction::Forward);
    let norms = column_norms_squared(&weights, shape, Direction::Forward);
    let masks = mask_product(precision, &seed, &domain, &weights, shape);
    assert_eq!((masks.outer(), masks.precision(), masks.bytes().len()), (20, precision, 20 * 1280 * 3));
    for tokens in [1, 300, 7] {
        let rows: Vec<f32> = (0..tokens * shape.d_in).map(|_| rng.random_range(-3.0..3.0)).collect();
        let steps = steps(precision.set, &rows, shape.d_in, &norms, 0.9);
        let plaintext = Plaintext { rows: &rows, tokens, features: shape.d_in, steps: &steps };
        let (body, ticket) = encrypt(&seed, &domain, precision, plaintext).unwrap();
        let answer = reference_answer(precision, Direction::Forward, &body, &weights, shape);
        let mut decryption = ticket.open(Arc::clone(&masks), precision, vec![0.0; tokens * shape.d_out]).unwrap();
        decryption.tile(answer).unwrap();
        let out = decryption.finish().unwrap().unchecked();
        for (i, (&value, exact)) in
            out.iter().zip(exact_product(&rows, &weights, shape, Direction::Forward)).enumerate()
        {
            let (token, column) = (i / shape.d_out, i % shape.d_out);
            let tolerance = 8.0 * product_variance(precision, norms[column]).sqrt() / steps[token];
            assert!((f64::from(value) - exact).abs() < tolerance + exact.abs() * 1e-6);
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
        for precision in [Precision::standard(set), packed(set)] {
            check(precision, direction, LinearShape { d_in, d_out }, tokens, width, seed);
        }
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
    let precision = Precision::standard(ParameterSet::P24);
    let first = encrypt(&seed, &domain, precision, plaintext).unwrap().0;
    let second = encrypt(&seed, &domain, precision, plaintext).unwrap().0;
    let same = (0..32).filter(|i| first.value(i / 4, i % 4) == second.value(i / 4, i % 4)).count();
    assert!(same < 4);
}
