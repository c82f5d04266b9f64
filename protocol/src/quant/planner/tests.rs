#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::he::reference::{reference_answer, reference_masks};
use crate::he::{MaskDomain, MaskProductBuilder, MaskSeed, Plaintext, encrypt};
use crate::ids::{Group, LinearId, LinearShape};
use crate::quant::{Int8Matrix, ProductCodec, serve};
use crate::sketch::{Checks, Sketch};

const BOTH: [Direction; 2] = [Direction::Forward, Direction::Backward];

/// Standard normal numbers, by Box and Muller.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut pair = || {
        let (radius, angle): (f64, f64) = (rng.random(), rng.random_range(0.0..std::f64::consts::TAU));
        (-2.0 * (1.0 - radius).ln()).sqrt() * angle.cos()
    };
    (0..count).map(|_| pair() as f32).collect()
}

/// `rows·W`, or `rows·Wᵀ` backward.
fn product(rows: &[f32], weights: &[f32], shape: LinearShape, direction: Direction) -> Vec<f64> {
    let (inner, outer) = shape.along(direction);
    let mut out = vec![0.0; rows.len() / inner * outer];
    for (row, out) in rows.chunks(inner).zip(out.chunks_mut(outer)) {
        for (i, weights) in weights.chunks(shape.d_out).enumerate() {
            for (j, weight) in weights.iter().enumerate() {
                let (from, to) = if direction == Direction::Forward { (i, j) } else { (j, i) };
                out[to] += f64::from(row[from]) * f64::from(*weight);
            }
        }
    }
    out
}

fn relative_error(found: impl IntoIterator<Item = f64>, expected: &[f64]) -> f64 {
    let missed: f64 = found.into_iter().zip(expected).map(|(f, e)| (f - e).powi(2)).sum();
    (missed / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

/// A product as owner and worker compute it.
fn encrypted(
    rows: &[f32],
    (matrix, meta, sketch): (&Int8Matrix, &LinearMeta, &Sketch),
    way: Direction,
    precision: Precision,
    step: Step,
) -> Vec<f32> {
    let (inner, outer) = matrix.shape.along(way);
    let tokens = rows.len() / inner;
    let codec = ProductCodec::new(meta, way, precision).unwrap();
    let precision = codec.precision(step);
    let (prepared, _) = codec.prepare_expecting(rows, tokens, sketch, step).unwrap();
    let linear = LinearId { layer: 0, group: Group::O };
    let (seed, domain) = (MaskSeed::from_bytes([7; 32]), MaskDomain { set: precision.set, product: linear.along(way) });
    let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
    let mut masks = MaskProductBuilder::new(precision, outer).unwrap();
    masks.tile(&reference_masks(precision, &seed, &domain, &matrix.values, matrix.shape)).unwrap();
    let (body, ticket) = encrypt(&seed, &domain, precision, plaintext).unwrap();
    let tile = reference_answer(precision, way, &body, &matrix.values, matrix.shape);
    let masks = Arc::new(masks.finish().unwrap().unchecked());
    let mut decryption = ticket.open(masks, precision, vec![0.0; tokens * outer]).unwrap();
    decryption.tile(tile).unwrap();
    let mut out = decryption.finish().unwrap().unchecked();
    codec.finish(&mut out, &prepared.scales).unwrap();
    out
}

/// Rounds each of `vectors` (`width` values) to int8, symmetric.
fn fake_quantised(values: &[f32], width: usize) -> Vec<f32> {
    let quantise = |row: &[f32]| {
        let scale = row.iter().fold(0.0_f32, |top, v| top.max(v.abs())) / 127.0;
        row.iter().map(|v| (v / scale).round() * scale).collect::<Vec<_>>()
    };
    values.chunks(width).flat_map(quantise).collect()
}

#[test]
fn encrypted_products_err_as_predicted() {
    // The matrix is small so that the test is quick; predictions must hold for any.
    let shape = LinearShape { d_in: 576, d_out: 96 };
    let weights = gaussian(shape.d_in * shape.d_out, 1);
    let (matrix, meta) = serve(weights.clone(), shape).unwrap();
    let exact_weights = matrix.values.chunks(shape.d_out).flat_map(|row| row.iter().zip(&meta.scales));
    let exact_weights: Vec<f32> = exact_weights.map(|(&v, &s)| f32::from(v) * s).collect();
    let bits = |set, body_bits, mask_limbs, output_bits| Precision { set, body_bits, mask_limbs, output_bits };
    let precisions = [
        bits(ParameterSet::P24, 24, 2, 16),
        bits(ParameterSet::P24, 22, 2, 10),
        bits(ParameterSet::P24, 20, 2, 12),
        bits(ParameterSet::P24, 20, 3, 10),
        bits(ParameterSet::P24, 24, 3, 24),
        bits(ParameterSet::P32, 24, 3, 16),
        bits(ParameterSet::P32, 32, 2, 24),
        bits(ParameterSet::P48, 32, 3, 24),
    ];
    let checks = Checks::draw(&matrix.values, shape).unwrap();
    for (direction, checks) in BOTH.into_iter().zip(checks) {
        let (inner, outer) = shape.along(direction);
        let rows = gaussian(48 * inner, 2);
        let expected = product(&rows, &weights, shape, direction);
        for (precision, step) in precisions.into_iter().flat_map(|p| [(p, Step::Provable), (p, Step::Sketched)]) {
            let out = encrypted(&rows, (&matrix, &meta, &checks.sketch), direction, precision, step);
            let measured = relative_error(out.iter().map(|&v| f64::from(v)), &expected);
            let predicted = predicted_relative_error(precision, &meta, direction, step);
            assert!(
                (measured / predicted - 1.0).abs() < 0.1,
                "{precision} {direction:?} {step:?}: {measured} for {predicted}"
            );

            // The same without the weights' error: the int8 matrix as it is, in its rotated coordinates.
            let mut rotated = rows.clone();
            crate::quant::Rotation::for_dimension(inner).apply(&mut rotated);
            let mut expected: Vec<f32> =
                product(&rotated, &exact_weights, shape, direction).iter().map(|&v| v as f32).collect();
            crate::quant::Rotation::for_dimension(outer).apply_transpose(&mut expected);
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let measured = relative_error(out.iter().map(|&v| f64::from(v)), &expected);
            let predicted = ciphertext_error(precision, &meta, direction, step).hypot(1e-7);
            assert!(
                (measured / predicted - 1.0).abs() < 0.25,
                "{precision} {direction:?} {step:?}: {measured}, {predicted}"
            );
        }
    }
}

#[test]
fn plain_int8_errs_as_predicted() {
    for d_in in [64, 576, 2048] {
        let shape = LinearShape { d_in, d_out: 64 };
        let weights = gaussian(d_in * 64, 3);
        let (_, meta) = serve(weights.clone(), shape).unwrap();
        let by_output: Vec<f32> = (0..64).flat_map(|j| weights.iter().skip(j).step_by(64).copied()).collect();
        let by_output = fake_quantised(&by_output, d_in);
        let int8: Vec<f32> = (0..d_in).flat_map(|i| by_output.iter().skip(i).step_by(d_in).copied()).collect();
        let rows = gaussian(32 * d_in, 4);
        let out = product(&fake_quantised(&rows, d_in), &int8, shape, Direction::Forward);
        let measured = relative_error(out, &product(&rows, &weights, shape, Direction::Forward));
        let predicted = plain_w8a8_error(&meta, Direction::Forward);
        assert!((measured / predicted - 1.0).abs() < 0.1, "d_in {d_in}: {measured} for {predicted}");
    }
}

/// What [`serve`] finds for Gaussian weights, without the work.
fn gaussian_meta(d_in: usize, d_out: usize) -> LinearMeta {
    let top = expected_gaussian_maximum(d_in);
    let rms = |count: usize| 127.0 / top * (count as f64).sqrt();
    let max = |count: usize, of: usize| rms(count) * (1.0 + (2.0 * (of as f64).ln() / (2.0 * count as f64)).sqrt());
    LinearMeta {
        shape: LinearShape { d_in, d_out },
        scales: vec![0.01; d_out],
        max_column_norm: max(d_in, d_out),
        max_row_norm: max(d_out, d_in),
        rms_column_norm: rms(d_in),
        rms_row_norm: rms(d_out),
        weight_error: top / 127.0 / 12.0_f64.sqrt(),
    }
}

#[test]
fn plans_are_the_cheapest_within_the_target() {
    // Integer products in each call, the owner's work, bytes of the mask product, bits in each call.
    let dearness = |p: Precision, (inner, outer): (usize, usize)| {
        let bits = usize::from(p.body_bits) * inner + usize::from(p.output_bits) * outer;
        (p.body_bits.div_ceil(8), p.set.limbs(), p.mask_limbs, bits)
    };
    for (d_in, d_out) in [(64, 64), (576, 960), (576, 3072), (1536, 576), (2048, 8192), (8192, 2048), (28_672, 8192)] {
        let meta = gaussian_meta(d_in, d_out);
        for direction in BOTH {
            let target = PrecisionTarget::default();
            let chosen = plan(&meta, direction, &target);
            let along = meta.shape.along(direction);
            let coarser = if direction == Direction::Forward { 1.0 } else { target.backward };
            let limit = coarser * plain_w8a8_error(&meta, direction);
            assert!(chosen.is_valid() && predicted_relative_error(chosen, &meta, direction, Step::Sketched) <= limit);
            for other in ParameterSet::ALL.into_iter().flat_map(Precision::all) {
                if dearness(other, along) < dearness(chosen, along) {
                    assert!(
                        predicted_relative_error(other, &meta, direction, Step::Sketched) > limit,
                        "{other} under {chosen}"
                    );
                }
            }
        }
    }
}

#[test]
fn p24_serves_every_dimension() {
    for (d_in, d_out) in [(64, 64), (576, 960), (2048, 8192), (8192, 2048), (8192, 28_672), (28_672, 8192)] {
        for direction in BOTH {
            let chosen = plan(&gaussian_meta(d_in, d_out), direction, &PrecisionTarget::default());
            assert_eq!((chosen.set, chosen.mask_limbs), (ParameterSet::P24, 2), "{d_in} × {d_out}: {chosen}");
            assert!((18..=24).contains(&chosen.body_bits) && (8..=12).contains(&chosen.output_bits), "{chosen}");
        }
    }
}

#[test]
fn p24_serves_every_head() {
    let target = PrecisionTarget::default();
    for d_in in [576, 1024, 2048, 4096, 8192] {
        // Slices of a vocabulary; the last is what is left.
        for d_out in [512, 4096, 16_384] {
            let meta = gaussian_meta(d_in, d_out);
            for direction in BOTH {
                let chosen = plan_for(Group::Head, &meta, direction, &target);
                assert_eq!(chosen.set, ParameterSet::P24, "{d_in} × {d_out} {direction:?}: {chosen}");
            }
            let back = plan_for(Group::Head, &meta, Direction::Backward, &target);
            let error = predicted_relative_error(back, &meta, Direction::Backward, Step::Sketched);
            assert!(error <= plain_w8a8_error(&meta, Direction::Backward), "{d_in} × {d_out}: {error}");
        }
    }
}

/// What goes up and down for a token in a layer, both ways, in bytes.
#[test]
fn bits_are_saved_where_they_are_many() {
    let layer = |shapes: [(usize, usize); 4], target: PrecisionTarget| -> usize {
        let bits = |(group, (d_in, d_out)): (Group, (usize, usize)), direction| {
            let meta = gaussian_meta(d_in, d_out);
            let (inner, outer) = meta.shape.along(direction);
            let chosen = plan_for(group, &meta, direction, &target);
            usize::from(chosen.body_bits) * inner + usize::from(chosen.output_bits) * outer
        };
        let groups = [Group::Qkv, Group::O, Group::GateUp, Group::Down];
        groups.into_iter().zip(shapes).flat_map(|shape| BOTH.map(|direction| bits(shape, direction))).sum::<usize>() / 8
    };
    let (small, large) = (
        [(576, 960), (576, 576), (576, 3072), (1536, 576)],
        [(2048, 3072), (2048, 2048), (2048, 16_384), (8192, 2048)],
    );
    let even = PrecisionTarget { backward: 1.0, ..PrecisionTarget::default() };
    for (shapes, whole) in [(small, 42_240), (large, 209_920)] {
        let [planned, as_fine] = [PrecisionTarget::default(), even].map(|target| layer(shapes, target));
        assert!(planned < as_fine && 100 * planned < 78 * whole, "{planned}, {as_fine} of {whole}");
    }
}

#[test]
fn what_weighs_more_is_finer_in_the_set_of_the_rest() {
    let target = PrecisionTarget::default();
    for (d_in, d_out) in [(64, 96), (576, 960), (1536, 576), (2048, 3072), (8192, 2048), (14_336, 4096), (28_672, 8192)]
    {
        let meta = gaussian_meta(d_in, d_out);
        let of = |group, direction| plan_for(group, &meta, direction, &target);
        let error = |precision| predicted_relative_error(precision, &meta, Direction::Forward, Step::Sketched);
        let usual = of(Group::O, Direction::Forward);
        assert_eq!(usual, plan(&meta, Direction::Forward, &target));
        assert_eq!(of(Group::GateUp, Direction::Forward), usual);
        for group in [Group::Qkv, Group::Down] {
            let finer = of(group, Direction::Forward);
            assert_eq!(finer.set, usual.set, "{d_in} × {d_out}");
            assert!(error(finer) <= error(usual), "{d_in} × {d_out}: {finer} and {usual}");
            // The narrowest are fine enough, and the widest have the finest bits, as it is.
            assert!(finer != usual || !(576..=8192).contains(&d_in), "{d_in} × {d_out}: {finer}");
            assert_eq!(of(group, Direction::Backward), of(Group::O, Direction::Backward));
        }
        if d_in <= 2048 {
            let limit = FINER * plain_w8a8_error(&meta, Direction::Forward);
            assert!(error(of(Group::Down, Direction::Forward)) <= limit, "{d_in} × {d_out}");
        }
        assert!(error(of(Group::Head, Direction::Forward)) <= error(usual));
    }
}

#[test]
fn stricter_targets_need_larger_sets() {
    let chosen = |d_in, factor| {
        plan(&gaussian_meta(d_in, 1024), Direction::Forward, &PrecisionTarget { factor, ..PrecisionTarget::default() })
            .set
    };
    assert_eq!(chosen(8192, 1.0), ParameterSet::P24);
    assert_eq!(chosen(8192, 0.75), ParameterSet::P32);
}

#[test]
fn targets_are_obeyed() {
    let meta = gaussian_meta(2048, 2048);
    for set in ParameterSet::ALL {
        let chosen = plan(&meta, Direction::Forward, &PrecisionTarget { set: Some(set), ..PrecisionTarget::default() });
        assert!(
            chosen.set == set
                && predicted_relative_error(chosen, &meta, Direction::Forward, Step::Sketched).is_finite()
        );
    }
    let loose = PrecisionTarget { factor: 2.0, ..PrecisionTarget::default() };
    assert_eq!(plan(&meta, Direction::Forward, &loose).set, ParameterSet::P24);
    // Nothing is better than the int8 weights: the smallest error there is, at the least cost.
    for factor in [0.0, -1.0, f64::NAN] {
        let chosen = plan(&meta, Direction::Forward, &PrecisionTarget { factor, ..PrecisionTarget::default() });
        assert!(predicted_relative_error(chosen, &meta, Direction::Forward, Step::Sketched) < 1.05 * meta.weight_error);
        assert_eq!(chosen.set, ParameterSet::P32);
    }
}

#[test]
fn a_matrix_of_zeros_costs_nothing_to_predict() {
    let shape = LinearShape { d_in: 24, d_out: 8 };
    let (_, meta) = serve(vec![0.0; 192], shape).unwrap();
    for direction in BOTH {
        assert_eq!(
            predicted_relative_error(Precision::standard(ParameterSet::P24), &meta, direction, Step::Sketched),
            0.0
        );
        assert!(plan(&meta, direction, &PrecisionTarget::default()).is_valid());
    }
}

#[test]
fn noise_that_fills_the_modulus_is_infinite() {
    let meta = gaussian_meta(576, 576);
    let coarse = Precision { mask_limbs: 1, ..Precision::standard(ParameterSet::P24) };
    assert_eq!(predicted_relative_error(coarse, &meta, Direction::Forward, Step::Sketched), f64::INFINITY);
    assert!(ProductCodec::new(&meta, Direction::Forward, coarse).is_err());
}
