//! Honest and forged products, many of each.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use actors::matmul::{CpuDevice, Device as _, HeldMatrix, best_kernel};
use protocol::he::{MaskProduct, Planes, ProductTile, noise};
use protocol::model::Model;
use protocol::quant::Step;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::products::{Product, SEED};
use crate::record::Rows;

/// Rows of a product.
const TOKENS: usize = 8;

/// A product that asked for rows, and what is needed to ask again.
struct Asked<'a> {
    product: Product,
    masks: Arc<MaskProduct>,
    rows: &'a [f32],
}

impl Asked<'_> {
    /// Eight rows from somewhere among those recorded.
    fn some_rows(&self, rng: &mut ChaCha8Rng) -> &[f32] {
        let (inner, _) = self.product.dimensions();
        let first = rng.random_range(0..=self.rows.len() / inner - TOKENS);
        &self.rows[first * inner..][..TOKENS * inner]
    }
}

/// Products of every `nth` matrix.
fn asked<'a>(model: &Model, rows: &'a Rows, nth: usize) -> anyhow::Result<Vec<Asked<'a>>> {
    let mut all = Vec::new();
    for linear in model.config().linears().step_by(nth) {
        for product in Product::of(model, linear)? {
            if let Some((rows, _)) = rows.get(&product.id) {
                all.push(Asked { masks: product.verified_masks()?, product, rows });
            }
        }
    }
    Ok(all)
}

pub(crate) fn honest(model: &Arc<Model>, rows: &Rows, count: usize) -> anyhow::Result<()> {
    let asked = asked(model, rows, 1)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut refused, mut corrected, mut again, began) = (0, 0, 0, Instant::now());
    for (number, asked) in asked.iter().cycle().take(count).enumerate() {
        let Asked { product, masks, .. } = asked;
        // Each matrix both ways, alternating the steps from one round to the next.
        let step = if number / 240 % 2 == 0 { Step::Sketched } else { Step::Provable };
        let sent = product.send(asked.some_rows(&mut rng), step)?;
        let answer = product.answer(&product.held, &sent)?;
        let decrypted = product.decrypt(sent.ticket, masks, &answer)?;
        match product.checks.sketch.verify(decrypted, &sent.expected, |_, _| ()) {
            Ok(verified) => {
                corrected += verified.corrected();
                again += verified.again().len();
            }
            Err(error) => {
                refused += 1;
                println!("{}: {error}", product.id);
            }
        }
        if (number + 1).is_multiple_of(5000) {
            println!("  {} products, {refused} refused, {:.0} s", number + 1, began.elapsed().as_secs_f64());
        }
    }
    println!("{count} honest products of {TOKENS} rows: {refused} refused");
    println!("{corrected} rows corrected, {again} rows to be asked for anew, of {}", count * TOKENS);
    Ok(())
}

/// What came of the forgeries of one kind.
#[derive(Default)]
struct Outcome {
    tried: usize,
    refused: usize,
    /// Accepted, and only in rows of zeros, of which nothing is used.
    unused: usize,
    /// Forged rows of those that were accepted, over their honest noise and over their norm, at most.
    noise: f64,
    norm: f64,
}

/// What a worker that lies has to lie with.
struct Liar<'a> {
    answer: &'a mut ProductTile,
    /// Another answer to other rows of the same matrix.
    earlier: &'a ProductTile,
    /// Answers of workers with other weights.
    altered: &'a ProductTile,
    slightly: &'a ProductTile,
    /// Standard deviation of the noise of an output, in units of the answer.
    honest: f64,
}

const KINDS: [&str; 14] = [
    "other weights (1 % off)",
    "one weight altered",
    "answer to another call",
    "rows swapped",
    "columns swapped",
    "one entry, anything",
    "one entry, +q/2",
    "two entries, ±q/2",
    "two entries, ±q/4",
    "a column of zeros",
    "lower half cut off",
    "noise, 1 × honest",
    "noise, 4 × honest",
    "noise, 16 × honest",
];

fn add(planes: &mut Planes, row: usize, column: usize, value: i64) {
    let sum = planes.value(row, column).wrapping_add(value as u64);
    planes.set_value(row, column, sum);
}

impl Liar<'_> {
    fn lie(&mut self, kind: usize, rng: &mut ChaCha8Rng) {
        let planes = &mut self.answer.rows;
        let (rows, outer) = (planes.rows(), planes.columns());
        let half = 1_i64 << (planes.bits() - 1);
        let (row, column) = (rng.random_range(0..rows), rng.random_range(0..outer));
        let other = (column + rng.random_range(1..outer)) % outer;
        match kind {
            0 => planes.clone_from(&self.altered.rows),
            1 => planes.clone_from(&self.slightly.rows),
            2 => planes.clone_from(&self.earlier.rows),
            3 => (0..outer).for_each(|column| swap(planes, (0, column), (1, column))),
            4 => (0..rows).for_each(|row| swap(planes, (row, column), (row, other))),
            5 => {
                let value = rng.random_range(-half..half);
                planes.set_value(row, column, value as u64 & (2 * half as u64 - 1));
            }
            6 => add(planes, row, column, half),
            7 => {
                add(planes, row, column, half);
                add(planes, row, other, -half);
            }
            8 => {
                add(planes, row, column, half / 2);
                add(planes, row, other, -half / 2);
            }
            9 => (0..rows).for_each(|row| planes.set_value(row, column, 0)),
            10 => {
                let kept = u64::MAX << (planes.bits() / 2);
                for (row, column) in (0..rows).flat_map(|row| (0..outer).map(move |column| (row, column))) {
                    planes.set_value(row, column, planes.value(row, column) & kept);
                }
            }
            _ => {
                let factor = [1.0, 4.0, 16.0][kind - 11] * self.honest;
                for (row, column) in (0..rows).flat_map(|row| (0..outer).map(move |column| (row, column))) {
                    let unit: f64 = (0..12).map(|_| rng.random_range(-0.5..0.5)).sum();
                    add(planes, row, column, (factor * unit).round() as i64);
                }
            }
        }
    }
}

fn swap(planes: &mut Planes, a: (usize, usize), b: (usize, usize)) {
    let (of_a, of_b) = (planes.value(a.0, a.1), planes.value(b.0, b.1));
    planes.set_value(a.0, a.1, of_b);
    planes.set_value(b.0, b.1, of_a);
}

pub(crate) fn forged(model: &Arc<Model>, rows: &Rows, count: usize) -> anyhow::Result<()> {
    let asked = asked(model, rows, 7)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let altered: Vec<_> = asked.iter().map(|asked| altered(&asked.product, 100, &mut rng)).collect::<Result<_, _>>()?;
    let slightly: Vec<_> =
        asked.iter().map(|asked| altered_once(&asked.product, &mut rng)).collect::<Result<_, _>>()?;
    let mut outcomes: BTreeMap<usize, Outcome> = BTreeMap::new();
    for number in 0..count {
        let (kind, at) = (number % KINDS.len(), number / KINDS.len() % asked.len());
        let Asked { product, masks, .. } = &asked[at];
        let step = if rng.random() { Step::Sketched } else { Step::Provable };
        let before = product.send(asked[at].some_rows(&mut rng), step)?;
        let earlier = product.answer(&product.held, &before)?;
        let sent = product.send(asked[at].some_rows(&mut rng), step)?;
        let mut answer = product.answer(&product.held, &sent)?;
        let honest_answer = answer.clone();
        let norm = product.meta.rms_column_norm;
        let unit = f64::from(sent.precision.output_dropped_bits()).exp2();
        let honest = noise::product_variance(sent.precision, norm * norm).sqrt() / unit;
        let mut liar = Liar {
            answer: &mut answer,
            earlier: &earlier,
            altered: &product.answer(&altered[at], &sent)?,
            slightly: &product.answer(&slightly[at], &sent)?,
            honest,
        };
        liar.lie(kind, &mut rng);
        let differs = answer != honest_answer;
        let decrypted = product.decrypt(sent.ticket, masks, &answer)?;
        let outcome = outcomes.entry(kind).or_default();
        if !differs {
            continue;
        }
        outcome.tried += 1;
        match product.checks.sketch.verify(decrypted, &sent.expected, |_, _| ()) {
            Err(_) => outcome.refused += 1,
            Ok(verified) => {
                let again = verified.again().to_vec();
                let (noise, norm) =
                    effect(&answer, &honest_answer, verified.values(), &again, &sent.steps, honest, unit);
                outcome.unused += usize::from(noise == 0.0);
                (outcome.noise, outcome.norm) = (outcome.noise.max(noise), outcome.norm.max(norm));
            }
        }
    }
    println!("{:26} {:>7} {:>8} {:>7} {:>9}", "bodies", "forged", "refused", "unused", "accepted");
    println!("(unused: in rows of zeros, whose answers are not used; what was accepted did to a row, at most)");
    for (kind, Outcome { tried, refused, unused, noise, norm }) in outcomes {
        let passed = tried - refused - unused;
        let effect = format!("{noise:6.2} × its honest noise, {:.3} % of its norm", 100.0 * norm);
        let effect = if passed == 0 { String::new() } else { effect };
        println!("{:26} {tried:>7} {refused:>8} {unused:>7} {passed:>9}   {effect}", KINDS[kind]);
    }
    forged_masks(&asked, count / 10, &mut rng)
}

/// The largest error of a row that an accepted forgery made: over the norm of its honest noise, and over its own norm.
fn effect(
    forged: &ProductTile,
    honest: &ProductTile,
    values: &[f32],
    again: &[usize],
    steps: &[f64],
    deviation: f64,
    unit: f64,
) -> (f64, f64) {
    let outer = honest.rows.columns();
    let modulus = 1_i64 << honest.rows.bits();
    let mut largest = (0.0_f64, 0.0_f64);
    for row in (0..honest.rows.rows()).filter(|row| !again.contains(row) && steps[*row] > 0.0) {
        let difference = |column| {
            let off = forged.rows.value(row, column) as i64 - honest.rows.value(row, column) as i64;
            let off = off.rem_euclid(modulus);
            (if off >= modulus / 2 { off - modulus } else { off }) as f64
        };
        let error = (0..outer).map(|column| difference(column).powi(2)).sum::<f64>().sqrt();
        let norm = values[row * outer..][..outer].iter().map(|&y| f64::from(y).powi(2)).sum::<f64>().sqrt();
        largest.0 = largest.0.max(error / (deviation * (outer as f64).sqrt()));
        largest.1 = largest.1.max(error * unit / steps[row] / norm);
    }
    largest
}

fn forged_masks(asked: &[Asked<'_>], count: usize, rng: &mut ChaCha8Rng) -> anyhow::Result<()> {
    const KINDS: [&str; 5] = ["one entry by 1", "one entry by q/2", "two entries by q/2", "another seed", "one weight"];
    let mut refused = [0; KINDS.len()];
    let slightly: Vec<_> = asked.iter().map(|asked| altered_once(&asked.product, rng)).collect::<Result<_, _>>()?;
    for number in 0..count {
        let (kind, at) = (number % KINDS.len(), number / KINDS.len() % asked.len());
        let product = &asked[at].product;
        let half = 1_i64 << (product.precision.set.modulus_bits() - 1);
        let seed = if kind == 3 { protocol::he::MaskSeed::from_bytes([1; 32]) } else { SEED };
        let masks = if kind == 4 {
            product.masks_of(&slightly[at], |_| {})?
        } else {
            product.masks(|tile| {
                let (row, column) = (rng.random_range(0..tile.rows.rows()), rng.random_range(0..tile.rows.columns()));
                let other = (column + 1) % tile.rows.columns();
                match kind {
                    0 => add(&mut tile.rows, row, column, 1),
                    1 => add(&mut tile.rows, row, column, half),
                    2 => [column, other].into_iter().for_each(|column| add(&mut tile.rows, row, column, half)),
                    _ => {}
                }
            })?
        };
        let verified = product.checks.masks.verify(masks, &seed, &product.domain(), product.precision.mask_limbs);
        refused[kind] += usize::from(verified.is_err());
    }
    println!("{:26} {:>7} {:>8}", "masks", "forged", "refused");
    for (kind, refused) in refused.into_iter().enumerate() {
        println!("{:26} {:>7} {refused:>8}", KINDS[kind], (count + KINDS.len() - 1 - kind) / KINDS.len());
    }
    Ok(())
}

/// A worker whose weights are off by one in `one_in` on average, and by as much as they are large.
fn altered(product: &Product, one_in: u32, rng: &mut ChaCha8Rng) -> anyhow::Result<Arc<dyn HeldMatrix>> {
    let mut values = product.matrix.values.clone();
    for value in &mut values {
        if rng.random_range(0..one_in) == 0 {
            *value = value.wrapping_add(rng.random_range(1..=20));
        }
    }
    Ok(CpuDevice::new(best_kernel()).hold(product.matrix.shape, &values)?)
}

/// One with a single weight altered.
fn altered_once(product: &Product, rng: &mut ChaCha8Rng) -> anyhow::Result<Arc<dyn HeldMatrix>> {
    let mut values = product.matrix.values.clone();
    let at = rng.random_range(0..values.len());
    values[at] = values[at].wrapping_add(127);
    Ok(CpuDevice::new(best_kernel()).hold(product.matrix.shape, &values)?)
}
