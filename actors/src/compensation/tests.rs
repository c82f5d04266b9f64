#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use protocol::buffer::Buffer;
use protocol::ids::{Direction, Group, LinearShape, ProductId};
use protocol::quant::{Rotation, serve};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng as _;

use super::calibrate::known_part;
use super::directions::first_directions;
use super::*;
use crate::backend::{BackendError, LinearBackend, PlainBackend, Product};
use crate::data::MicroBatch;
use crate::lora::{Draw, LoraAdapters, LoraConfig};
use crate::testing::{TinyModel, nudge};
use crate::transformer::Llama;

const RANK: usize = 6;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum()).collect()
}

fn naive(rows: &[f32], matrix: &[f32], inner: usize) -> Vec<f32> {
    let outer = matrix.len() / inner;
    let value = |row: &[f32], j: usize| {
        row.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(matrix[i * outer + j])).sum::<f64>() as f32
    };
    rows.chunks(inner).flat_map(|row| (0..outer).map(move |j| value(row, j))).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |a: f32| f64::from(a).powi(2);
    let (off, all) = a.iter().zip(b).fold((0.0, 0.0), |(off, all), (&a, &b)| (off + square(a - b), all + square(b)));
    (off / all).sqrt()
}

/// The matrix that a worker serves, rotated back.
fn rounded_weights(weights: &[f32], shape: LinearShape) -> Vec<f32> {
    let (matrix, meta) = serve(weights.to_vec(), shape).unwrap();
    let mut values: Vec<f32> = matrix.values.iter().map(|&value| value.into()).collect();
    for row in values.chunks_exact_mut(shape.d_out) {
        row.iter_mut().zip(&meta.scales).for_each(|(value, scale)| *value *= scale);
    }
    // Qᵢ·V·Qₒᵀ, by columns as the rows of the transpose.
    Rotation::cached(shape.d_out).apply_transpose(&mut values);
    let mut turned: Vec<f32> =
        (0..values.len()).map(|at| values[at % shape.d_in * shape.d_out + at / shape.d_in]).collect();
    Rotation::cached(shape.d_in).apply_transpose(&mut turned);
    (0..values.len()).map(|at| turned[at % shape.d_out * shape.d_in + at / shape.d_out]).collect()
}

#[test]
fn the_first_directions_are_those_with_most_of_the_rows() {
    let (features, spread) = (40, 5);
    let strong = naive(&random(90 * spread, 1), &random(spread * features, 2), spread);
    let weak = random(strong.len(), 3);
    let rows: Vec<f32> = strong.iter().zip(weak).map(|(strong, weak)| strong + 0.01 * weak).collect();
    let basis = first_directions(&rows, features, spread);
    for (at, row) in basis.chunks(features).enumerate() {
        for (other_at, other) in basis.chunks(features).enumerate() {
            let dot: f32 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            assert!((dot - f32::from(u8::from(at == other_at))).abs() < 1e-5, "{at} and {other_at}: {dot}");
        }
    }
    let transposed: Vec<f32> = (0..basis.len()).map(|at| basis[at % spread * features + at / spread]).collect();
    let within = naive(&naive(&rows, &transposed, features), &basis, spread);
    assert!(distance(&within, &rows) < 0.02, "{}", distance(&within, &rows));

    // Three rows fill three dimensions, and rows of zeros none.
    let few = first_directions(&rows[..3 * features], features, spread);
    assert!(few[3 * features..].iter().all(|&value| value == 0.0) && few[2 * features..3 * features] != [0.0; 40]);
    assert!(first_directions(&[0.0; 80], features, 2).iter().all(|&value| value == 0.0));
}

#[test]
fn rows_of_few_dimensions_have_the_product_of_the_weights_as_they_were() {
    let shape = LinearShape { d_in: 96, d_out: 160 };
    let weights = random(shape.d_in * shape.d_out, 4);
    let served = rounded_weights(&weights, shape);
    let tokens = 150;
    let rows = naive(&random(tokens * RANK, 5), &random(RANK * shape.d_in, 6), RANK);
    let part = known_part(&rows, &weights, shape, RANK).unwrap();
    let known = part.widened();
    let off = |rows: &[f32]| {
        let exact = naive(rows, &weights, shape.d_in);
        let (low, rest) = known.take(rows, tokens);
        let mut out = naive(&rest, &served, shape.d_in);
        known.give_back(&low, &mut out, tokens);
        (distance(&naive(rows, &served, shape.d_in), &exact), distance(&out, &exact), square(&rest) / square(rows))
    };
    // Directions are rounded to 0.4 %, and so much of the rows is left to be encrypted.
    let (before, after, left) = off(&rows);
    assert!(before > 3e-3 && after < before / 50.0 && left < 1e-4, "{before}, {after}, {left}");

    // Any other row loses what it has in these directions.
    let (before, after, left) = off(&random(tokens * shape.d_in, 7));
    let expected = 1.0 - RANK as f64 / shape.d_in as f64;
    assert!(after < before && (left / expected - 1.0).abs() < 0.02, "{before}, {after}, {left}");
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum()
}

/// A worker's products without encryption: those of the rounded matrices.
struct Rounded {
    model: Arc<Model>,
    exact: PlainBackend,
}

impl LinearBackend for Rounded {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        if product.direction == Direction::Backward {
            return self.exact.apply(product, rows, tokens);
        }
        let shape = self.model.config().shape(product.linear.group);
        let served = rounded_weights(&self.model.linear(product.linear).unwrap(), shape);
        Ok(Product::of_owner(naive(&rows, &served, shape.d_in).into()))
    }
}

fn rounded_backend(model: &Arc<Model>) -> Rounded {
    Rounded { model: Arc::clone(model), exact: PlainBackend::new(model).unwrap() }
}

#[test]
fn a_loss_comes_nearer_to_that_of_the_weights_as_they_were() {
    let tiny = TinyModel::new();
    let model = &tiny.model;
    let compensation = Arc::new(Compensation::of_model(model, 12, false, None, |_, _| true).unwrap());
    let vocabulary = model.config().vocabulary as u32;
    let off = |compensated: bool| {
        let backend: Arc<dyn LinearBackend> = match compensated {
            true => Arc::new(Compensated::new(Arc::new(rounded_backend(model)), Arc::clone(&compensation))),
            false => Arc::new(rounded_backend(model)),
        };
        let (llama, exact) = (Llama::new(Arc::clone(model), backend).unwrap(), tiny.llama());
        let squares = (0..40_u32).map(|seed| {
            let tokens: Vec<u32> = (0..16).map(|at| (at * 37 + seed * 101) % vocabulary).collect();
            let targets = tokens.iter().map(|token| (token * 7 + 3) % vocabulary).collect();
            let batch = MicroBatch::new([(&tokens[..], targets)], 0, 1);
            (llama.evaluate(&batch, None).unwrap() - exact.evaluate(&batch, None).unwrap()).powi(2)
        });
        (squares.sum::<f64>() / 40.0).sqrt()
    };
    let (without, with) = (off(false), off(true));
    assert!(with < 0.8 * without, "{with} with, {without} without");
}

#[test]
fn whatever_is_known_the_pass_is_the_same() {
    let tiny = TinyModel::new();
    let vocabulary = tiny.config().vocabulary as u32;
    let tokens: Vec<u32> = (0..90).map(|at| (at * 37 + 11) % vocabulary).collect();
    let targets = tokens.iter().map(|token| (token * 7 + 3) % vocabulary).collect();
    let batch = MicroBatch::new([(&tokens[..], targets)], 0, 1);
    let config = LoraConfig { rank: 2, dropout: 0.2, ..LoraConfig::default() };
    let adapters = LoraAdapters::new(tiny.config(), &config, 3).unwrap();
    adapters.parameters().iter().enumerate().for_each(|(at, var)| nudge(var, at as u64, 0.3));
    let outcome = |known: Option<(usize, bool)>| {
        let plain = Arc::new(PlainBackend::with_head(&tiny.model).unwrap());
        let backend: Arc<dyn LinearBackend> = match known {
            Some((rank, head)) => {
                let found = Compensation::of_model(&tiny.model, rank, head, None, |_, _| true).unwrap();
                let linears = calibrate::linears(tiny.config());
                let expected = linears.filter(|linear| head || linear.group != Group::Head).count();
                assert_eq!(found.parts.len(), expected);
                Arc::new(Compensated::new(plain, Arc::new(found)))
            }
            None => plain,
        };
        assert!(backend.serves_head() && !backend.asks_workers());
        let llama = Llama::new(Arc::clone(&tiny.model), backend).unwrap();
        let (loss, gradients) = llama.gradient(&batch, &adapters, Draw { seed: 1, step: 2, micro_batch: 3 }).unwrap();
        assert!((llama.evaluate(&batch, Some(&adapters)).unwrap() - loss).abs() < 0.2 * loss, "but for the dropout");
        (loss, gradients.concat())
    };
    let (loss, gradient) = outcome(None);
    for known in [(1, true), (5, true), (16, false)] {
        let (with, of_known) = outcome(Some(known));
        assert!((with - loss).abs() < 1e-5 * loss, "{known:?}: {with} for {loss}");
        assert!(distance(&of_known, &gradient) < 1e-4, "{known:?}: {}", distance(&of_known, &gradient));
    }
}

#[test]
fn what_was_found_once_is_kept_and_what_is_damaged_is_found_again() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("compensation");
    let computed = Arc::new(AtomicUsize::new(0));
    let found = |rank| {
        let computed = Arc::clone(&computed);
        let progress = move |_, _| {
            computed.fetch_add(1, Ordering::Relaxed);
            true
        };
        let found = Compensation::of_model(&tiny.model, rank, true, Some(&kept), progress).unwrap();
        assert!(found.parts.values().all(|part| part.rank() == rank));
        found
    };
    let steps = || computed.swap(0, Ordering::Relaxed);
    let first = found(4);
    assert_eq!(steps(), calibrate::linears(tiny.config()).count());
    let again = found(4);
    assert_eq!(steps(), 0, "it was read");
    assert_eq!(again.parts, first.parts);
    found(5);
    assert!(steps() > 0, "another rank is another file");

    let path = file::path(&kept, tiny.model.digest().unwrap(), 4);
    let whole = std::fs::read(&path).unwrap();
    let is_refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        file::read(&path, tiny.config(), 4).is_none()
    };
    assert!(!is_refused(&whole));
    for at in [0, 31, 32, 36, whole.len() / 2, whole.len() - 1] {
        let mut altered = whole.clone();
        altered[at] ^= 4;
        assert!(is_refused(&altered), "byte {at}");
    }
    assert!(is_refused(&[]) && is_refused(&whole[..whole.len() - 1]) && is_refused(&[&whole[..], b"x"].concat()));
    assert!(file::read(&path, tiny.config(), 3).is_none());
    assert_eq!(found(4).parts, first.parts, "whatever was there");
    assert!(steps() > 0);

    // Whoever waits may have gone: nothing is kept then.
    let stopped = Compensation::of_model(&tiny.model, 6, true, Some(&kept), |done, of| done < of / 2);
    assert!(stopped.is_err_and(|error| error.to_string().contains("stopped")));
    assert!(!file::path(&kept, tiny.model.digest().unwrap(), 6).exists());

    // Where nothing can be kept, it is found all the same.
    let nowhere = Path::new("/proc/nowhere");
    assert_eq!(Compensation::of_model(&tiny.model, 4, true, Some(nowhere), |_, _| true).unwrap().parts, first.parts);
}
