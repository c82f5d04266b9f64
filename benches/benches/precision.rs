//! How exact one encrypted product is: `cargo bench -p benches --bench precision`.
//!
//! For inner dimensions of 64 to 28,672 and Gaussian rows and weights it takes a product the whole way (rotate,
//! encode, encrypt, the reference worker's product and modulus switching, decrypt, un-rotate) at the provable and at the
//! sketched step, and prints, as a Markdown table, its relative error against the product in f64, beside what the planner predicts, what plain 8-bit
//! activations and weights do to the same product, and what the planner would choose. It is the scheme that is measured, so
//! nothing is verified.
#![allow(clippy::disallowed_methods)]

use std::f64::consts::TAU;
use std::sync::Arc;

use anyhow::{Context, Result};
use protocol::he::reference::{reference_answer, reference_masks};
use protocol::he::{MaskDomain, MaskProductBuilder, MaskSeed, ParameterSet, Plaintext, Precision, encrypt};
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use protocol::quant::{
    Int8Matrix, LinearMeta, PrecisionTarget, ProductCodec, Step, plain_w8a8_error, plan, predicted_relative_error,
    serve,
};
use protocol::sketch::{Checks, Sketch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Inner dimensions.
const DIMENSIONS: [usize; 6] = [64, 576, 2048, 8192, 16_384, 28_672];
/// Output columns: a product of more takes longer and says no more.
const OUTPUTS: usize = 128;
/// Rows of the product.
const TOKENS: usize = 16;
const WAY: Direction = Direction::Forward;

fn main() -> Result<()> {
    println!(
        "| d_in | set/body:output bits | bytes of masks | step | measured | predicted | plain W8A8 measured | predicted | planned |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for d_in in DIMENSIONS {
        let shape = LinearShape { d_in, d_out: OUTPUTS };
        let (rows, weights) = (gaussian(TOKENS * d_in, 1), gaussian(d_in * OUTPUTS, 2));
        let exact = product(&rows, &weights, d_in);
        let plain = relative_error(&plain_int8(&rows, &weights, d_in), &exact);
        let (matrix, meta) = serve(weights, shape)?;
        let [checks, _] = Checks::draw(&matrix.values, shape)?;
        let plain_predicted = plain_w8a8_error(&meta, WAY);
        // What is planned for a layer that gives as many features as it takes, and for a gradient of as many.
        let square = LinearMeta { shape: LinearShape { d_in, d_out: d_in }, scales: vec![1.0; d_in], ..meta.clone() };
        let target = PrecisionTarget::default();
        let chosen = plan(&square, WAY, &target);
        let gradient = LinearMeta { rms_row_norm: meta.rms_column_norm, max_row_norm: meta.max_column_norm, ..square };
        let coarser = plan(&gradient, Direction::Backward, &target);

        let p24 = Precision { mask_limbs: 2, ..Precision::standard(ParameterSet::P24) };
        let mut precisions = vec![chosen, coarser, p24];
        precisions.extend([ParameterSet::P32, ParameterSet::P48].map(Precision::standard));
        precisions.dedup();
        for (precision, step) in precisions.into_iter().flat_map(|p| [(p, Step::Provable), (p, Step::Sketched)]) {
            let out = encrypted(&rows, (&matrix, &meta, &checks.sketch), precision, step);
            let out = out.with_context(|| format!("{precision} at {d_in}"))?;
            let out: Vec<f64> = out.into_iter().map(f64::from).collect();
            let [measured, predicted, plain, plain_predicted] = [
                relative_error(&out, &exact),
                predicted_relative_error(precision, &meta, WAY, step),
                plain,
                plain_predicted,
            ]
            .map(|error| format!("{:.2} %", 100.0 * error));
            let planned = match precision {
                _ if precision == chosen && precision == coarser => "both ways",
                _ if precision == chosen => "forward",
                _ if precision == coarser => "backward",
                _ => "",
            };
            let (shown, masks) = (step.precision(precision), precision.mask_limbs);
            println!(
                "| {d_in} | {shown} | {masks} | {step:?} | {measured} | {predicted} | {plain} | {plain_predicted} | {planned} |"
            );
        }
    }
    Ok(())
}

/// Standard normal numbers, by Box and Muller.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut next = || {
        let (radius, angle): (f64, f64) = (rng.random(), rng.random_range(0.0..TAU));
        (-2.0 * (1.0 - radius).ln()).sqrt() * angle.cos()
    };
    (0..count).map(|_| next() as f32).collect()
}

/// `rows·weights`, `TOKENS × OUTPUTS`.
fn product(rows: &[f32], weights: &[f32], d_in: usize) -> Vec<f64> {
    let mut out = vec![0.0; TOKENS * OUTPUTS];
    for (row, out) in rows.chunks(d_in).zip(out.chunks_mut(OUTPUTS)) {
        for (&x, weights) in row.iter().zip(weights.chunks(OUTPUTS)) {
            out.iter_mut().zip(weights).for_each(|(out, &weight)| *out += f64::from(x) * f64::from(weight));
        }
    }
    out
}

/// The product of rows rounded to int8 per token by weights rounded to int8 per output channel, nothing rotated.
fn plain_int8(rows: &[f32], weights: &[f32], d_in: usize) -> Vec<f64> {
    let mut rows = rows.to_vec();
    rows.chunks_mut(d_in).for_each(|row| round_to_int8(row.iter_mut()));
    let mut weights = weights.to_vec();
    (0..OUTPUTS).for_each(|j| round_to_int8(weights.iter_mut().skip(j).step_by(OUTPUTS)));
    product(&rows, &weights, d_in)
}

fn round_to_int8<'a>(values: impl Iterator<Item = &'a mut f32>) {
    let values: Vec<&mut f32> = values.collect();
    let scale = values.iter().fold(0.0_f32, |top, value| top.max(value.abs())) / 127.0;
    values.into_iter().for_each(|value| *value = (*value / scale).round() * scale);
}

/// The product as owner and worker compute it.
fn encrypted(
    rows: &[f32],
    (matrix, meta, sketch): (&Int8Matrix, &LinearMeta, &Sketch),
    precision: Precision,
    step: Step,
) -> Result<Vec<f32>> {
    let features = matrix.shape.d_in;
    let codec = ProductCodec::new(meta, WAY, precision)?;
    let precision = codec.precision(step);
    let (prepared, _) = codec.prepare_expecting(rows, TOKENS, sketch, step)?;
    let linear = LinearId { layer: 0, group: Group::O };
    let (seed, domain) = (MaskSeed::from_bytes([3; 32]), MaskDomain { set: precision.set, product: linear.along(WAY) });
    let plaintext = Plaintext { rows: &prepared.rows, tokens: TOKENS, features, steps: &prepared.steps };
    let mut masks = MaskProductBuilder::new(precision, OUTPUTS)?;
    masks.tile(&reference_masks(precision, &seed, &domain, &matrix.values, matrix.shape))?;
    let (body, ticket) = encrypt(&seed, &domain, precision, plaintext)?;
    let tile = reference_answer(precision, WAY, &body, &matrix.values, matrix.shape);
    let masks = Arc::new(masks.finish()?.unchecked());
    let mut decryption = ticket.open(masks, precision, vec![0.0; TOKENS * OUTPUTS])?;
    decryption.tile(tile)?;
    let mut out = decryption.finish()?.unchecked();
    codec.finish(&mut out, &prepared.scales)?;
    Ok(out)
}

fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    let missed: f64 = found.iter().zip(expected).map(|(f, e)| (f - e).powi(2)).sum();
    (missed / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}
