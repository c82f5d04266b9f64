#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rand::{Rng, SeedableRng};

use super::*;
use crate::he::ParameterSet;
use crate::ids::LinearShape;
use crate::quant::{Int8Matrix, serve};

const SHAPE: LinearShape = LinearShape { d_in: 96, d_out: 40 };
const FINE: Precision = Precision::exact(ParameterSet::P48);

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// `rows·W`, or `rows·Wᵀ` backward, in f64.
fn plain(rows: &[f32], weights: &[f32], shape: LinearShape, direction: Direction) -> Vec<f64> {
    let (inner, outer) = shape.along(direction);
    let weight = |i: usize, o: usize| match direction {
        Direction::Forward => weights[i * shape.d_out + o],
        Direction::Backward => weights[o * shape.d_out + i],
    };
    let dot = |row: &[f32], o: usize| (0..inner).map(|i| f64::from(row[i]) * f64::from(weight(i, o))).sum();
    rows.chunks(inner).flat_map(|row| (0..outer).map(move |o| dot(row, o))).collect()
}

/// Encodes, multiplies by the int8 matrix in exact integers without any encryption, and divides by κ.
fn noiseless(prepared: &Prepared, matrix: &Int8Matrix, direction: Direction) -> Vec<f32> {
    let (inner, outer) = matrix.shape.along(direction);
    let weight = |i: usize, o: usize| match direction {
        Direction::Forward => matrix.values[i * matrix.shape.d_out + o],
        Direction::Backward => matrix.values[o * matrix.shape.d_out + i],
    };
    let mut out = Vec::new();
    for (row, &step) in prepared.rows.chunks(inner).zip(prepared.steps.iter()) {
        for o in 0..outer {
            let message = |i: usize| (f64::from(row[i]) * step).round() as i128;
            let sum: i128 = (0..inner).map(|i| message(i) * i128::from(weight(i, o))).sum();
            out.push(if step == 0.0 { 1.0 } else { (sum as f64 / step) as f32 });
        }
    }
    out
}

fn through(rows: &[f32], weights: &[f32], shape: LinearShape, direction: Direction) -> Vec<f32> {
    let (matrix, meta) = serve(weights.to_vec(), shape).unwrap();
    let codec = ProductCodec::new(&meta, direction, FINE).unwrap();
    let prepared = codec.prepare(rows, rows.len() / shape.along(direction).0).unwrap();
    let mut out = noiseless(&prepared, &matrix, direction);
    codec.finish(&mut out, &prepared.scales).unwrap();
    out
}

/// Relative error of `found`, row norm by row norm, at its worst.
fn worst_row_error(found: &[f32], expected: &[f64], width: usize) -> f64 {
    let error = |(found, expected): (&[f32], &[f64])| {
        let power: f64 = expected.iter().map(|e| e * e).sum();
        (found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum::<f64>() / power).sqrt()
    };
    found.chunks(width).zip(expected.chunks(width)).map(error).fold(0.0, f64::max)
}

#[test]
fn both_directions_give_the_product_up_to_int8_weights() {
    for direction in [Direction::Forward, Direction::Backward] {
        let (inner, outer) = SHAPE.along(direction);
        let (rows, weights) = (random(17 * inner, 1), random(SHAPE.d_in * SHAPE.d_out, 2));
        let out = through(&rows, &weights, SHAPE, direction);
        let error = worst_row_error(&out, &plain(&rows, &weights, SHAPE, direction), outer);
        assert!(error < 0.015, "{direction:?}: {error}");
    }
}

#[test]
fn weights_that_int8_represents_lose_nothing() {
    // Without mixing (odd dimensions) and with integers up to 127 in each column, int8 is exact, and so is the way.
    let shape = LinearShape { d_in: 33, d_out: 15 };
    let scales = random(15, 4);
    let mut weights: Vec<f32> = random(33 * 15, 5).iter().map(|w| (w * 127.0).round()).collect();
    weights[..15].fill(127.0);
    weights.iter_mut().enumerate().for_each(|(i, w)| *w *= 0.1 + scales[i % 15].abs());
    for direction in [Direction::Forward, Direction::Backward] {
        let (inner, outer) = shape.along(direction);
        let rows = random(9 * inner, 6);
        let out = through(&rows, &weights, shape, direction);
        let error = worst_row_error(&out, &plain(&rows, &weights, shape, direction), outer);
        assert!(error < 1e-6, "{direction:?}: {error}");
    }
}

#[test]
fn outlier_features_cost_nothing() {
    let (mut rows, weights) = (random(8 * 96, 1), random(96 * 40, 2));
    rows.iter_mut().skip(11).step_by(96).for_each(|x| *x = 300.0);
    let out = through(&rows, &weights, SHAPE, Direction::Forward);
    let error = worst_row_error(&out, &plain(&rows, &weights, SHAPE, Direction::Forward), 40);
    assert!(error < 0.015, "{error}");
}

#[test]
fn zero_rows_come_back_as_exact_zeros() {
    for direction in [Direction::Forward, Direction::Backward] {
        let (inner, outer) = SHAPE.along(direction);
        let (_, meta) = serve(random(96 * 40, 2), SHAPE).unwrap();
        let codec = ProductCodec::new(&meta, direction, FINE).unwrap();
        let mut rows = random(3 * inner, 1);
        rows[inner..2 * inner].fill(-0.0);
        let prepared = codec.prepare(&rows, 3).unwrap();
        assert!(prepared.rows[inner..2 * inner].iter().all(|v| *v == 0.0));
        assert!(prepared.steps[0] > 0.0 && prepared.steps[1] == 0.0 && prepared.steps[2] > 0.0);
        // Whatever was decrypted for such a row, even NaN, is replaced.
        let mut out = vec![f32::NAN; 3 * outer];
        codec.finish(&mut out, &prepared.scales).unwrap();
        assert!(out[outer..2 * outer].iter().all(|v| v.to_bits() == 0));
        assert!(out[..outer].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn bad_rows_and_metadata_are_named() {
    let (_, meta) = serve(random(96 * 40, 2), SHAPE).unwrap();
    let codec = ProductCodec::new(&meta, Direction::Forward, FINE).unwrap();
    for value in [f32::NAN, f32::INFINITY] {
        let mut rows = random(5 * 96, 1);
        rows[3 * 96 + 70] = value;
        let error = codec.prepare(&rows, 5).err();
        assert!(matches!(error, Some(QuantError::NotFiniteRow { row: 3, feature: 70, .. })), "{value}: {error:?}");
    }
    assert!(matches!(codec.prepare(&[1.0; 97], 1), Err(QuantError::Length { found: 97, expected: 96, .. })));
    assert!(matches!(codec.prepare(&[1.0; 96], usize::MAX), Err(QuantError::Length { .. })));
    let scales = codec.prepare(&[1.0; 96], 1).unwrap().scales;
    assert!(matches!(codec.finish(&mut [0.0; 41], &scales), Err(QuantError::Length { found: 41, expected: 40, .. })));

    let broken = |change: fn(&mut LinearMeta)| {
        let mut meta = meta.clone();
        change(&mut meta);
        ProductCodec::new(&meta, Direction::Forward, FINE).map(|_| ()).unwrap_err()
    };
    assert!(matches!(broken(|meta| meta.scales.truncate(3)), QuantError::Length { .. }));
    assert!(matches!(broken(|meta| meta.scales[3] = f32::NAN), QuantError::Metadata(_)));
    assert!(matches!(broken(|meta| meta.scales[3] = -1.0), QuantError::Metadata(_)));
    assert!(matches!(broken(|meta| meta.max_column_norm = f64::INFINITY), QuantError::Metadata(_)));
    assert!(matches!(broken(|meta| meta.shape.d_in = 0), QuantError::Metadata(_)));
}

#[test]
fn exponents_are_exact() {
    for v in [1.0, 1.5, 2.0, 0.75, f32::MAX, f32::MIN_POSITIVE, 1e-45, 3e-39] {
        let scaled = f64::from(v) * power_of_two(-exponent(v));
        assert!((1.0..2.0).contains(&scaled), "{v}");
    }
    assert_eq!(exponent(0.0), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Rows anywhere in the range of f32, denormals included, are as accurate as any others, as long as the
    /// exact result is in that range.
    #[test]
    fn magnitude_does_not_matter(
        row_exponent in -140_i32..126,
        weight_exponent in -80_i32..100,
        seed: u64,
        backward: bool,
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        let (inner, outer) = SHAPE.along(direction);
        let scaled = |values: Vec<f32>, exponent: i32| -> Vec<f32> {
            let factor = f64::from(exponent).exp2();
            values.iter().map(|v| (f64::from(*v) * factor) as f32).collect()
        };
        let rows = scaled(random(2 * inner, seed), row_exponent);
        let weights = scaled(random(96 * 40, !seed), weight_exponent);
        let expected = plain(&rows, &weights, SHAPE, direction);
        let out = through(&rows, &weights, SHAPE, direction);
        prop_assert!(out.iter().all(|v| !v.is_nan()));
        let top = expected.iter().fold(0.0_f64, |top, v| top.max(v.abs()));
        if (1e-35..1e38).contains(&top) {
            prop_assert!(worst_row_error(&out, &expected, outer) < 0.02);
        }
    }
}
