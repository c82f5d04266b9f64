#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// `Q` written out from its definition: entry `(i, j)` is `σ_i · (−1)^popcount(i & j)/√b` inside a block.
fn dense(dimension: usize) -> Vec<Vec<f64>> {
    let rotation = Rotation::for_dimension(dimension);
    let block = rotation.block();
    (0..dimension)
        .map(|i| {
            (0..dimension)
                .map(|j| match i / block == j / block {
                    true => {
                        let parity = ((i % block) & (j % block)).count_ones() % 2;
                        let sign = f64::from(rotation.factors[i].signum()) * if parity == 1 { -1.0 } else { 1.0 };
                        sign / (block as f64).sqrt()
                    }
                    false => 0.0,
                })
                .collect()
        })
        .collect()
}

fn row_of(dimension: usize, seed: u64) -> Vec<f32> {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..dimension).map(|_| rng.random_range(-1.0..1.0)).collect()
}

#[test]
fn blocks_are_the_largest_powers_of_two() {
    for (dimension, block) in [(1, 1), (3, 1), (6, 2), (576, 64), (1536, 512), (2048, 2048), (8192, 8192)] {
        assert_eq!(Rotation::for_dimension(dimension).block(), block);
    }
}

#[test]
fn signs_are_fixed_for_ever() {
    // First 16 signs of two dimensions, from an independent ChaCha20 (RFC 8439) implementation.
    let signs = |dimension| -> String {
        let rotation = Rotation::for_dimension(dimension);
        rotation.factors[..16].iter().map(|f| if *f < 0.0 { '-' } else { '+' }).collect()
    };
    assert_eq!(signs(576), "++++-+++---+--+-");
    assert_eq!(signs(2048), "---++-+-+--+++-+");
}

#[test]
fn fast_transforms_are_the_dense_matrix() {
    for dimension in [1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 64, 96, 128] {
        let q = dense(dimension);
        let rotation = Rotation::for_dimension(dimension);
        let x = row_of(dimension, 1);
        let (mut forward, mut back) = (x.clone(), x.clone());
        rotation.apply(&mut forward);
        rotation.apply_transpose(&mut back);
        for j in 0..dimension {
            let expected: f64 = (0..dimension).map(|i| f64::from(x[i]) * q[i][j]).sum();
            assert!((f64::from(forward[j]) - expected).abs() < 1e-5, "x·Q, dimension {dimension}, feature {j}");
            let expected: f64 = (0..dimension).map(|i| f64::from(x[i]) * q[j][i]).sum();
            assert!((f64::from(back[j]) - expected).abs() < 1e-5, "x·Qᵀ, dimension {dimension}, feature {j}");
        }
    }
}

#[test]
fn dense_matrix_is_orthogonal() {
    for dimension in [1, 3, 12, 64] {
        let q = dense(dimension);
        for a in 0..dimension {
            for b in 0..dimension {
                let dot: f64 = (0..dimension).map(|j| q[a][j] * q[b][j]).sum();
                assert!((dot - f64::from(u8::from(a == b))).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn columns_and_rows_agree() {
    // Wide enough that the parallel branch of the column transform is taken for the larger one.
    for (dimension, width) in [(1, 5), (12, 7), (64, 33), (96, 1), (512, 300)] {
        let rotation = Rotation::for_dimension(dimension);
        let matrix = row_of(dimension * width, 2);
        let mut columns = matrix.clone();
        rotation.apply_to_columns(&mut columns, width);
        for j in (0..width).step_by(width.div_ceil(9)) {
            let mut column: Vec<f32> = (0..dimension).map(|i| matrix[i * width + j]).collect();
            rotation.apply(&mut column);
            for i in 0..dimension {
                assert!((column[i] - columns[i * width + j]).abs() < 1e-5, "{dimension} × {width} at ({i}, {j})");
            }
        }
    }
}

#[test]
fn one_outlier_is_spread_over_its_block() {
    let mut row = vec![0.0_f32; 576];
    row[100] = 80.0;
    Rotation::for_dimension(576).apply(&mut row);
    assert!(row[64..128].iter().all(|value| (value.abs() - 10.0).abs() < 1e-6));
    assert!(row[..64].iter().chain(&row[128..]).all(|&value| value == 0.0));
}

#[test]
fn cache_returns_the_same_rotation() {
    assert!(Arc::ptr_eq(&Rotation::cached(96), &Rotation::cached(96)));
    assert_eq!(*Rotation::cached(96), Rotation::for_dimension(96));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn round_trip_keeps_rows_and_norms(dimension in 1_usize..400, tokens in 1_usize..4, seed: u64) {
        let rotation = Rotation::for_dimension(dimension);
        let rows = row_of(dimension * tokens, seed);
        let mut turned = rows.clone();
        rotation.apply(&mut turned);
        let norm = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        for (a, b) in rows.chunks(dimension).zip(turned.chunks(dimension)) {
            prop_assert!((norm(a) - norm(b)).abs() <= 1e-5 * norm(a));
        }
        rotation.apply_transpose(&mut turned);
        for (a, b) in rows.iter().zip(&turned) {
            prop_assert!((a - b).abs() < 1e-5);
        }
    }
}
