//! Honest products pass, forged ones do not, and wraps are told from both.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::he::reference::{reference_answer, reference_masks, reference_product};
use crate::he::{
    Decrypted, MaskDomain, MaskProduct, MaskProductBuilder, MaskSeed, ParameterSet, Plaintext, Planes, Precision,
    ProductTile, encrypt,
};
use crate::ids::{Group, LinearId};
use crate::quant::{Int8Matrix, LinearMeta, ProductCodec, Step, serve};

/// One served matrix in one direction, and all that an owner has of it.
struct Bench {
    matrix: Int8Matrix,
    codec: ProductCodec,
    precision: Precision,
    direction: Direction,
    seed: MaskSeed,
    checks: Checks,
    masks: Arc<MaskProduct>,
}

impl Bench {
    fn new(shape: LinearShape, direction: Direction, precision: Precision, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let weights = (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (matrix, meta): (Int8Matrix, LinearMeta) = serve(weights, shape).unwrap();
        let codec = ProductCodec::new(&meta, direction, precision).unwrap();
        let seed = MaskSeed::from_bytes([seed as u8; 32]);
        let [forward, backward] = Checks::draw(&matrix.values, shape).unwrap();
        let checks = if direction == Direction::Forward { forward } else { backward };
        let mut bench = Self { matrix, codec, precision, direction, seed, checks, masks: Arc::new(empty(precision)) };
        let masks = bench.verified_masks(|_| {}).unwrap();
        bench.masks = Arc::new(masks);
        bench
    }

    fn domain(&self) -> MaskDomain {
        let product = LinearId { layer: 1, group: Group::Down }.along(self.direction);
        MaskDomain { set: self.precision.set, product }
    }

    /// The mask product after `forge` had it.
    fn verified_masks(&self, forge: impl FnOnce(&mut Planes)) -> Result<MaskProduct, ForgedMasks> {
        let all = Precision { mask_limbs: self.precision.set.limbs() as u8, ..self.precision };
        let Int8Matrix { shape, ref values } = self.matrix;
        let mut tile = reference_masks(all, &self.seed, &self.domain(), values, shape);
        forge(&mut tile.rows);
        let mut builder = MaskProductBuilder::new(all, tile.rows.columns()).unwrap();
        builder.tile(&tile).unwrap();
        self.checks.masks.verify(builder.finish().unwrap(), &self.seed, &self.domain(), self.precision.mask_limbs)
    }

    /// What some rows are decrypted to, after `forge` had the answer, and what it has to agree with.
    fn product(&self, rows: &[f32], step: Step, forge: impl FnOnce(&mut Planes)) -> (Decrypted<Vec<f32>>, Expected) {
        let (inner, outer) = self.matrix.shape.along(self.direction);
        let tokens = rows.len() / inner;
        let (prepared, expected) = self.codec.prepare_expecting(rows, tokens, &self.checks.sketch, step).unwrap();
        let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
        let precision = self.codec.precision(step);
        let (body, ticket) = encrypt(&self.seed, &self.domain(), precision, plaintext).unwrap();
        let Int8Matrix { shape, ref values } = self.matrix;
        let mut tile = reference_answer(precision, self.direction, &body, values, shape);
        forge(&mut tile.rows);
        let out = vec![0.0; tokens * outer];
        let mut decryption = ticket.open(Arc::clone(&self.masks), precision, out).unwrap();
        decryption.tile(tile).unwrap();
        (decryption.finish().unwrap(), expected)
    }

    fn verify(&self, rows: &[f32], step: Step, forge: impl FnOnce(&mut Planes)) -> Result<Checked<Vec<f32>>, Refuted> {
        let (decrypted, expected) = self.product(rows, step, forge);
        self.checks.sketch.verify(decrypted, &expected, |_, _| ())
    }
}

fn empty(precision: Precision) -> MaskProduct {
    MaskProductBuilder::new(precision, 0).unwrap().finish().unwrap().accept(precision.mask_limbs)
}

/// Rows that look like rotated ones.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (0..12).map(|_| rng.random_range(-0.5_f32..0.5)).sum()).collect()
}

const SHAPE: LinearShape = LinearShape { d_in: 96, d_out: 160 };

/// Every set in whole bytes, and with as few bits as it may have.
fn precisions() -> impl Iterator<Item = Precision> {
    let rounded = [
        Precision { set: ParameterSet::P24, body_bits: 24, mask_limbs: 2, output_bits: 16 },
        Precision { set: ParameterSet::P24, body_bits: 22, mask_limbs: 2, output_bits: 10 },
        Precision { set: ParameterSet::P24, body_bits: 20, mask_limbs: 2, output_bits: 12 },
        Precision { set: ParameterSet::P32, body_bits: 32, mask_limbs: 4, output_bits: 24 },
    ];
    ParameterSet::ALL.map(Precision::standard).into_iter().chain(rounded)
}

#[test]
fn honest_products_pass_and_their_noise_is_as_predicted() {
    for precision in precisions() {
        for direction in Direction::BOTH {
            let bench = Bench::new(SHAPE, direction, precision, 1);
            let (inner, outer) = SHAPE.along(direction);
            let tokens = 200;
            let mut rows = gaussian(tokens * inner, 2);
            rows[..inner].fill(0.0);
            rows[inner..2 * inner].iter_mut().for_each(|x| *x *= 1e-20);
            for step in [Step::Provable, Step::Sketched] {
                let (decrypted, expected) = bench.product(&rows, step, |_| {});
                let verified = bench.checks.sketch.verify(decrypted, &expected, |_, _| ()).unwrap();
                assert_eq!((verified.again(), verified.corrected()), (&[][..], 0), "{precision} {direction:?}");
                let values = verified.complete().unwrap().into_values();
                assert!(values.len() == tokens * outer && values[..outer].iter().all(|&value| value == 0.0));
            }
        }
    }
}

/// The mean square of the honest noise over its prediction is what the limit of a call's energy stands on.
#[test]
fn the_energy_of_honest_noise_is_one() {
    let bench = Bench::new(SHAPE, Direction::Forward, Precision::standard(ParameterSet::P24), 3);
    let rows = gaussian(1000 * SHAPE.d_in, 4);
    for step in [Step::Provable, Step::Sketched] {
        let (decrypted, expected) = bench.product(&rows, step, |_| {});
        let energy = bench.checks.sketch.energy(decrypted, &expected);
        assert!((0.85..1.15).contains(&energy), "{step:?}: {energy}");
    }
}

#[test]
fn the_sketched_step_is_finer_and_what_comes_out_is_nearer() {
    // The worst case is the further from the usual, the more features are summed over.
    let shape = LinearShape { d_in: 1024, d_out: 64 };
    let bench = Bench::new(shape, Direction::Forward, Precision::standard(ParameterSet::P24), 5);
    let (inner, outer) = shape.along(Direction::Forward);
    let tokens = 24;
    let rows = gaussian(tokens * inner, 6);
    let [provable, sketched] = [Step::Provable, Step::Sketched].map(|step| {
        let (prepared, _) = bench.codec.prepare_expecting(&rows, tokens, &bench.checks.sketch, step).unwrap();
        let values = bench.verify(&rows, step, |_| {}).unwrap().complete().unwrap().into_values();
        let weight = |i: usize, j: usize| f64::from(bench.matrix.values[i * outer + j]);
        let mut missed = 0.0;
        for (row, values) in prepared.rows.chunks(inner).zip(values.chunks(outer)) {
            for (j, &value) in values.iter().enumerate() {
                let exact: f64 = row.iter().enumerate().map(|(i, &x)| f64::from(x) * weight(i, j)).sum();
                missed += (f64::from(value) - exact).powi(2);
            }
        }
        (prepared.steps.iter().sum::<f64>(), missed.sqrt())
    });
    assert!(sketched.0 > 2.0 * provable.0, "steps {sketched:?} and {provable:?}");
    assert!(sketched.1 < provable.1 / 1.5, "errors {sketched:?} and {provable:?}");
}

/// Adds `value·2^dropped` to an entry of the answer.
fn add(planes: &mut Planes, row: usize, column: usize, value: i64) {
    let sum = planes.value(row, column).wrapping_add(value as u64);
    planes.set_value(row, column, sum);
}

#[test]
fn forged_bodies_are_refused() {
    for precision in precisions() {
        for direction in Direction::BOTH {
            let bench = Bench::new(SHAPE, direction, precision, 7);
            let (inner, outer) = SHAPE.along(direction);
            let rows = gaussian(70 * inner, 8);
            let half = |planes: &Planes| 1_i64 << (planes.bits() - 1);
            let mut random = ChaCha8Rng::seed_from_u64(9);
            let mut noise = |planes: &mut Planes| {
                let half = half(planes);
                for (row, column) in (0..70).flat_map(|row| (0..outer).map(move |column| (row, column))) {
                    add(planes, row, column, random.random_range(-half / 8..half / 8));
                }
            };
            type Forge<'a> = &'a mut dyn FnMut(&mut Planes);
            let forgeries: [(&str, Forge<'_>); 6] = [
                ("one entry", &mut |planes| add(planes, 3, 5, half(planes) / 2)),
                ("q/2 in a pair", &mut |planes| {
                    let half = half(planes);
                    add(planes, 11, 0, half);
                    add(planes, 11, outer - 1, half);
                }),
                ("q/2 in one", &mut |planes| add(planes, 69, 17, half(planes))),
                ("a column of zeros", &mut |planes| (0..70).for_each(|row| planes.set_value(row, 9, 0))),
                ("rows swapped", &mut |planes| {
                    for column in 0..outer {
                        let (a, b) = (planes.value(20, column), planes.value(21, column));
                        planes.set_value(20, column, b);
                        planes.set_value(21, column, a);
                    }
                }),
                ("noise", &mut noise),
            ];
            for (name, forge) in forgeries {
                for step in [Step::Provable, Step::Sketched] {
                    let refused = bench.verify(&rows, step, &mut *forge);
                    assert!(refused.is_err(), "{name}, {precision} {direction:?} {step:?} passed");
                }
            }
        }
    }
}

/// Noise that no single row betrays is betrayed by all of them together.
#[test]
fn a_call_that_is_a_little_too_noisy_is_refused() {
    let precision = Precision::exact(ParameterSet::P24);
    let bench = Bench::new(SHAPE, Direction::Forward, precision, 10);
    let rows = gaussian(1024 * SHAPE.d_in, 11);
    let norm = (bench.matrix.values.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / SHAPE.d_out as f64).sqrt();
    let honest = crate::he::noise::product_variance(precision, norm * norm).sqrt();
    let forged = |factor: f64| {
        let mut random = ChaCha8Rng::seed_from_u64(12);
        bench.verify(&rows, Step::Provable, |planes| {
            for (row, column) in (0..1024).flat_map(|row| (0..SHAPE.d_out).map(move |column| (row, column))) {
                let unit: f64 = (0..12).map(|_| random.random_range(-0.5..0.5)).sum();
                add(planes, row, column, (unit * factor * honest).round() as i64);
            }
        })
    };
    assert!(forged(0.0).is_ok());
    assert!(matches!(forged(1.5), Err(Refuted::Energy { .. })));
}

#[test]
fn single_wraps_are_corrected_and_rows_with_several_asked_for_anew() {
    let precision = Precision::standard(ParameterSet::P24);
    let bench = Bench::new(SHAPE, Direction::Forward, precision, 13);
    let (inner, outer) = SHAPE.along(Direction::Forward);
    let tokens = 24;
    let rows = gaussian(tokens * inner, 14);
    let (mut prepared, expected) =
        bench.codec.prepare_expecting(&rows, tokens, &bench.checks.sketch, Step::Sketched).unwrap();
    let exact: Vec<f64> = prepared
        .rows
        .chunks(inner)
        .flat_map(|row| {
            let weight = |i: usize, j: usize| f64::from(bench.matrix.values[i * outer + j]);
            (0..outer).map(move |j| row.iter().enumerate().map(|(i, &x)| f64::from(x) * weight(i, j)).sum::<f64>())
        })
        .collect();
    // Steps at which the largest output of row 3 wraps, and the largest two of row 5.
    let sorted = |row: usize| {
        let mut outputs: Vec<f64> = exact[row * outer..][..outer].iter().map(|y| y.abs()).collect();
        outputs.sort_by(f64::total_cmp);
        outputs
    };
    let half = f64::from(1 << 23);
    let (one, two) = (sorted(3), sorted(5));
    prepared.steps[3] = half / (one[outer - 1] * one[outer - 2]).sqrt();
    prepared.steps[5] = half / (two[outer - 2] * two[outer - 3]).sqrt();
    let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
    let (body, ticket) = encrypt(&bench.seed, &bench.domain(), precision, plaintext).unwrap();
    let tile = reference_answer(precision, Direction::Forward, &body, &bench.matrix.values, SHAPE);
    let mut decryption = ticket.open(Arc::clone(&bench.masks), precision, vec![0.0; tokens * outer]).unwrap();
    decryption.tile(tile).unwrap();
    let seen = Mutex::new(Vec::new());
    let decode = |row: usize, _: &mut [f32]| seen.lock().unwrap().push(row);
    let verified = bench.checks.sketch.verify(decryption.finish().unwrap(), &expected, decode).unwrap();
    assert_eq!((verified.again(), verified.corrected()), (&[5][..], 1));
    let mut seen = seen.into_inner().unwrap();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..tokens), "each row is decoded once");
    assert!(bench.verify(&rows, Step::Sketched, |_| {}).unwrap().complete().is_ok(), "nothing is missing otherwise");
    let verified = verified.complete().unwrap_err();
    let values = verified.values().to_vec();
    assert!(values[5 * outer..][..outer].iter().all(|&value| value == 0.0), "nothing of it is handed out");
    for row in (0..tokens).filter(|&row| row != 5) {
        let scale = exact[row * outer..][..outer].iter().fold(0.0_f64, |top, y| top.max(y.abs()));
        for (value, exact) in values[row * outer..][..outer].iter().zip(&exact[row * outer..]) {
            assert!((f64::from(*value) - exact).abs() < 0.05 * scale, "row {row}: {value} for {exact}");
        }
    }
    let missing = bench.verify(&rows[5 * inner..6 * inner], Step::Provable, |_| {}).unwrap().complete().unwrap();
    let filled = verified.fill(missing).into_values();
    assert_ne!(filled[5 * outer..6 * outer], values[5 * outer..6 * outer]);
    assert_eq!((&filled[..5 * outer], &filled[6 * outer..]), (&values[..5 * outer], &values[6 * outer..]));
}

/// Rows that are alike all look smaller than they are where `R` is unlucky: they wrap many at a time, and nobody is blamed.
#[test]
fn rows_that_wrap_are_asked_for_anew_however_many_they_are() {
    let precision = Precision::standard(ParameterSet::P24);
    let bench = Bench::new(SHAPE, Direction::Forward, precision, 17);
    let (inner, outer) = SHAPE.along(Direction::Forward);
    let tokens = 80;
    let rows = gaussian(tokens * inner, 18);
    let (mut prepared, expected) =
        bench.codec.prepare_expecting(&rows, tokens, &bench.checks.sketch, Step::Sketched).unwrap();
    // At sixteen times the step q/2 is at 0.6 of a row's root mean square.
    prepared.steps[3..].iter_mut().for_each(|step| *step *= 16.0);
    let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
    let (body, ticket) = encrypt(&bench.seed, &bench.domain(), precision, plaintext).unwrap();
    let tile = reference_answer(precision, Direction::Forward, &body, &bench.matrix.values, SHAPE);
    let mut decryption = ticket.open(Arc::clone(&bench.masks), precision, vec![0.0; tokens * outer]).unwrap();
    decryption.tile(tile).unwrap();
    let verified = bench.checks.sketch.verify(decryption.finish().unwrap(), &expected, |_, _| ()).unwrap();
    assert!(verified.again().iter().copied().eq(3..tokens), "{:?}", verified.again());
    let missing = bench.verify(&rows[3 * inner..], Step::Provable, |_| {}).unwrap().complete().unwrap();
    let values = verified.complete().unwrap_err().fill(missing).into_values();
    assert!(values.chunks_exact(outer).all(|row| row.iter().any(|&value| value != 0.0)));
}

/// What the module's argument says of errors of a size and any shape: the largest probability that `Σ δ_j·R_j` falls into a
/// window of `18σ_c`, computed exactly for `δ` in some proportions and `‖δ‖₂ = 12σ_c`.
#[test]
fn an_error_of_twelve_deviations_passes_hardly_whatever_its_shape() {
    let proportions: Vec<Vec<usize>> = (1..40)
        .map(|count| vec![1; count])
        .chain((2..20).map(|largest| vec![largest, 1]))
        .chain((2..12).map(|largest| [vec![largest], vec![1; 30]].concat()))
        .chain([vec![1, 2, 3], vec![2, 2, 1], vec![3, 2, 2, 1], vec![1, 2, 4, 8, 16], vec![5, 4, 3, 2, 1, 1, 1]])
        .collect();
    for proportions in proportions {
        // Probabilities of the sums, shifted so that the least is at 0.
        let mut sums = vec![1.0];
        for &share in &proportions {
            let mut next = vec![0.0; sums.len() + 16 * share];
            for (at, probability) in sums.iter().enumerate() {
                for entry in (0..=16).filter(|&entry| entry != 8) {
                    next[at + entry * share] += probability / 16.0;
                }
            }
            sums = next;
        }
        let norm = proportions.iter().map(|&share| (share * share) as f64).sum::<f64>().sqrt();
        let window = (2.0 * WINDOW * norm / 12.0).floor() as usize + 1;
        let passes = sums.windows(window.min(sums.len())).map(|sums| sums.iter().sum()).fold(0.0_f64, f64::max);
        let bits = -(COLUMNS as f64) * passes.log2();
        assert!(bits >= 40.0, "{proportions:?}: 2^-{bits:.1}");
    }
}

#[test]
fn forged_masks_are_refused_whatever_is_wrong_with_them() {
    for precision in precisions() {
        for direction in Direction::BOTH {
            let bench = Bench::new(SHAPE, direction, precision, 15);
            let (_, outer) = SHAPE.along(direction);
            let limbs = precision.set.limbs();
            let half = 1_i64 << (8 * limbs - 1);
            let mut other = bench.matrix.values.clone();
            other[77] ^= 1;
            let of_others = reference_product(
                &crate::he::mask::expand_planes(&bench.seed, &bench.domain(), 0..SHAPE.along(direction).0),
                &other,
                SHAPE,
                direction,
            );
            type Forge<'a> = &'a dyn Fn(&mut Planes);
            let forgeries: [(&str, Forge<'_>); 5] = [
                ("one unit", &|planes| add(planes, 100, 5, 1)),
                ("q/2", &|planes| add(planes, 200, 0, half)),
                ("q/2 in a pair", &|planes| {
                    add(planes, 7, 0, half);
                    add(planes, 7, outer - 1, half);
                }),
                ("two columns swapped", &|planes| {
                    for row in 0..planes.rows() {
                        let (a, b) = (planes.value(row, 2), planes.value(row, 3));
                        planes.set_value(row, 2, b);
                        planes.set_value(row, 3, a);
                    }
                }),
                ("another weight", &|planes| planes.clone_from(&of_others)),
            ];
            for (name, forge) in forgeries {
                assert!(bench.verified_masks(forge).is_err(), "{name}, {precision} {direction:?}");
            }
            let kept = bench.verified_masks(|_| {}).unwrap();
            let rounded = reference_masks(precision, &bench.seed, &bench.domain(), &bench.matrix.values, SHAPE);
            let mut builder = MaskProductBuilder::new(precision, outer).unwrap();
            builder.tile(&ProductTile { first_column: 0, rows: rounded.rows }).unwrap();
            assert!(kept.bytes() == builder.finish().unwrap().unchecked().bytes(), "rounded as a worker rounds");
        }
    }
}

#[test]
fn the_sketch_is_the_product_of_the_matrix_and_columns_are_uniform() {
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let shape = LinearShape { d_in: 300, d_out: 517 };
    let values: Vec<i8> = (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-127..=127)).collect();
    let [forward, backward] = Checks::draw(&values, shape).unwrap();
    let mut counts = [0_usize; 17];
    for (checks, direction) in [(&forward, Direction::Forward), (&backward, Direction::Backward)] {
        let (inner, outer) = shape.along(direction);
        assert_eq!((checks.sketch.inner(), checks.sketch.outer()), (inner, outer));
        // A unit row picks a row of V, which has to agree with that row of the matrix times R.
        let mut rows = vec![0.0; 2 * inner];
        (rows[0], rows[2 * inner - 1]) = (1.0, 1.0);
        let mut expected = [[0.0; COLUMNS]; 2];
        checks.sketch.expect(&rows, &mut expected);
        for (i, expected) in [0, inner - 1].into_iter().zip(expected) {
            let weight = |j: usize| match direction {
                Direction::Forward => values[i * shape.d_out + j],
                Direction::Backward => values[j * shape.d_out + i],
            };
            for (c, &found) in expected.iter().enumerate() {
                let exact: i64 = (0..outer).map(|j| i64::from(weight(j)) * i64::from(checks.sketch.entry(j, c))).sum();
                assert_eq!(found, exact as f64);
            }
        }
        let entries = (0..outer).flat_map(|j| (0..COLUMNS).map(move |c| (j, c)));
        entries.for_each(|(j, c)| counts[(checks.sketch.entry(j, c) + 8) as usize] += 1);
    }
    let mean = (817 * COLUMNS) as f64 / 16.0;
    for (at, &count) in counts.iter().enumerate() {
        let fair = if at == 8 { 0.0 } else { mean };
        assert!((count as f64 - fair).abs() <= 6.0 * fair.sqrt(), "{count} entries of {}", at as i32 - 8);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_shape_passes_honestly_and_any_large_error_is_refused(
        d_in in 1_usize..70,
        d_out in 1_usize..70,
        tokens in 1_usize..40,
        backward: bool,
        seed in 0_u64..1000,
        (row, column) in (0_usize..40, 0_usize..70),
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        let shape = LinearShape { d_in, d_out };
        let bench = Bench::new(shape, direction, Precision::standard(ParameterSet::P24), seed);
        let (inner, outer) = shape.along(direction);
        let rows = gaussian(tokens * inner, seed + 1);
        let honest = bench.verify(&rows, Step::Provable, |_| {});
        prop_assert!(honest.is_ok());
        let (row, column) = (row % tokens, column % outer);
        let refused = bench.verify(&rows, Step::Provable, |planes| add(planes, row, column, 1 << 14));
        prop_assert!(refused.is_err());
    }
}
