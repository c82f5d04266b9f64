#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rand::{Rng, SeedableRng};

use super::*;

fn random_weights(shape: LinearShape, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-0.05..0.05)).collect()
}

/// `Q_in·V·diag(scales)·Q_outᵀ`: what the served matrix stands for.
fn restored(matrix: &Int8Matrix, meta: &LinearMeta) -> Vec<f32> {
    let LinearShape { d_in, d_out } = matrix.shape;
    let scaled = matrix.values.chunks(d_out).flat_map(|row| row.iter().zip(&meta.scales));
    let mut values: Vec<f32> = scaled.map(|(&v, &s)| f32::from(v) * s).collect();
    Rotation::for_dimension(d_out).apply_transpose(&mut values);
    let rotation = Rotation::for_dimension(d_in);
    for j in 0..d_out {
        let mut column: Vec<f32> = (0..d_in).map(|i| values[i * d_out + j]).collect();
        rotation.apply_transpose(&mut column);
        (0..d_in).for_each(|i| values[i * d_out + j] = column[i]);
    }
    values
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let power: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    (a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>() / power).sqrt()
}

fn norm(values: impl Iterator<Item = i8>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn metadata_is_what_a_naive_computation_finds() {
    for (d_in, d_out) in [(1, 1), (5, 3), (64, 48), (96, 250), (300, 7), (768, 200)] {
        let shape = LinearShape { d_in, d_out };
        let weights = random_weights(shape, 3);
        let (matrix, meta) = serve(weights.clone(), shape).unwrap();
        let column = |j: usize| matrix.values.iter().skip(j).step_by(d_out).copied();
        let columns: Vec<f64> = (0..d_out).map(|j| norm(column(j))).collect();
        let rows: Vec<f64> = matrix.values.chunks(d_out).map(|row| norm(row.iter().copied())).collect();
        let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * b, "{d_in} × {d_out}: {a} against {b}");
        close(meta.max_column_norm, columns.iter().copied().fold(0.0, f64::max));
        close(meta.max_row_norm, rows.iter().copied().fold(0.0, f64::max));
        close(meta.rms_row_norm, (rows.iter().map(|n| n * n).sum::<f64>() / d_in as f64).sqrt());
        let scales: Vec<f64> = meta.scales.iter().map(|s| f64::from(*s).powi(2)).collect();
        let weighted: f64 = columns.iter().zip(&scales).map(|(n, s)| n * n * s).sum();
        close(meta.rms_column_norm, (weighted / scales.iter().sum::<f64>()).sqrt());

        for j in 0..d_out {
            assert_eq!(column(j).map(|v| v.unsigned_abs()).max(), Some(127), "column {j} uses its whole range");
        }
        let error = distance(&restored(&matrix, &meta), &weights);
        assert!((error - meta.weight_error).abs() < 1e-5, "measured {error}, stored {}", meta.weight_error);
        assert!(meta.weight_error < 0.012, "int8 weights are good to 1 %, not {}", meta.weight_error);
    }
}

#[test]
fn served_bytes_are_fixed_for_ever() {
    // Two machines must serve the same bytes: this product of all of them may change with QUANTISER_VERSION only.
    let shape = LinearShape { d_in: 192, d_out: 80 };
    let (matrix, _) = serve(random_weights(shape, 7), shape).unwrap();
    let digest = matrix.values.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &value| {
        (hash ^ u64::from(value as u8)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    assert_eq!((QUANTISER_VERSION, digest), (1, 850_764_847_707_686_152));
}

#[test]
fn columns_of_zeros_have_scale_zero() {
    // Odd dimensions are not mixed by the rotation, so that the column stays one of zeros.
    let shape = LinearShape { d_in: 5, d_out: 3 };
    let mut weights = random_weights(shape, 1);
    weights.iter_mut().skip(1).step_by(3).for_each(|w| *w = 0.0);
    let (matrix, meta) = serve(weights, shape).unwrap();
    assert_eq!(meta.scales[1], 0.0);
    assert!(matrix.values.iter().skip(1).step_by(3).all(|&v| v == 0));
    assert!(meta.scales[0] > 0.0 && meta.scales[2] > 0.0);

    let (matrix, meta) = serve(vec![0.0; 15], shape).unwrap();
    assert!(matrix.values.iter().all(|&v| v == 0));
    let norms = [meta.max_column_norm, meta.max_row_norm, meta.rms_column_norm, meta.rms_row_norm, meta.weight_error];
    assert_eq!(norms, [0.0; 5]);
}

#[test]
fn damaged_weights_are_named() {
    let shape = LinearShape { d_in: 700, d_out: 130 };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = random_weights(shape, 1);
        weights[650 * 130 + 4] = value;
        match serve(weights, shape) {
            Err(QuantError::NotFiniteWeight { input: 650, output: 4, .. }) => {}
            other => panic!("{value}: {other:?}"),
        }
    }
    let huge = serve(vec![f32::MAX; 700 * 130], shape);
    assert!(matches!(huge, Err(QuantError::WeightOverflow { .. })), "{huge:?}");
    let short = serve(vec![1.0; 12], shape);
    assert_eq!(short, Err(QuantError::Length { what: "the weight matrix", found: 12, expected: 91_000 }));
    assert!(serve(Vec::new(), LinearShape { d_in: 0, d_out: 4 }).is_err());
    assert!(serve(Vec::new(), LinearShape { d_in: usize::MAX, d_out: 4 }).is_err());
}

#[test]
fn metadata_survives_serde() {
    let shape = LinearShape { d_in: 24, d_out: 10 };
    let (_, meta) = serve(random_weights(shape, 1), shape).unwrap();
    let bytes = bincode::serde::encode_to_vec(&meta, bincode::config::standard()).unwrap();
    let (read, used) = bincode::serde::decode_from_slice(&bytes, bincode::config::standard()).unwrap();
    assert_eq!((meta, bytes.len()), (read, used));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn weights_of_any_magnitude_are_served(exponent in -140_i32..100, seed: u64) {
        let shape = LinearShape { d_in: 40, d_out: 12 };
        let scale = f64::from(exponent).exp2();
        let weights: Vec<f32> = random_weights(shape, seed).iter().map(|w| (f64::from(*w) * scale) as f32).collect();
        let (matrix, meta) = serve(weights.clone(), shape).unwrap();
        if meta.scales.iter().all(|s| *s > 0.0) {
            prop_assert!(distance(&restored(&matrix, &meta), &weights) < 0.02);
        } else {
            prop_assert!(exponent < -90);
        }
    }
}
