//! Tests of the scheme as a whole.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod errors;
mod noise;
mod pads;
mod round_trip;
mod shared;
mod tfhe_glwe;

use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::ids::{Direction, Group, LinearId, LinearShape};

fn domain(set: ParameterSet, direction: Direction) -> MaskDomain {
    MaskDomain { set, product: LinearId { layer: 3, group: Group::Down }.along(direction) }
}

pub(crate) fn random_weights(rng: &mut ChaCha8Rng, shape: LinearShape) -> Vec<i8> {
    (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-127..=127)).collect()
}

fn weight(weights: &[i8], shape: LinearShape, direction: Direction, i: usize, j: usize) -> f64 {
    f64::from(match direction {
        Direction::Forward => weights[i * shape.d_out + j],
        Direction::Backward => weights[j * shape.d_out + i],
    })
}

/// Squared norm of each column of the matrix as multiplied.
pub(crate) fn column_norms_squared(weights: &[i8], shape: LinearShape, direction: Direction) -> Vec<f64> {
    let (inner, outer) = shape.along(direction);
    (0..outer).map(|j| (0..inner).map(|i| weight(weights, shape, direction, i, j).powi(2)).sum()).collect()
}

/// `rows · W` in f64.
pub(crate) fn exact_product(rows: &[f32], weights: &[i8], shape: LinearShape, direction: Direction) -> Vec<f64> {
    let (inner, outer) = shape.along(direction);
    rows.chunks_exact(inner)
        .flat_map(|row| {
            (0..outer).map(move |j| {
                row.iter().enumerate().map(|(i, &x)| f64::from(x) * weight(weights, shape, direction, i, j)).sum()
            })
        })
        .collect()
}

/// The step that leads to outputs up to a share `room` of `q/2`, the rest being for the noise; zero for a zero row.
fn steps(set: ParameterSet, rows: &[f32], inner: usize, norms_squared: &[f64], room: f64) -> Vec<f64> {
    let largest = norms_squared.iter().fold(1.0f64, |a, &b| a.max(b)).sqrt();
    rows.chunks_exact(inner)
        .map(|row| {
            let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let room = f64::from(set.modulus_bits() - 1).exp2() * room;
            if norm == 0.0 { 0.0 } else { room / (norm * largest) }
        })
        .collect()
}

/// The reference's mask product, taken in one tile.
fn mask_product(
    precision: Precision,
    seed: &MaskSeed,
    domain: &MaskDomain,
    weights: &[i8],
    shape: LinearShape,
) -> Arc<MaskProduct> {
    let mut builder = MaskProductBuilder::new(precision, shape.along(domain.product.direction).1).unwrap();
    builder.tile(&reference::reference_masks(precision, seed, domain, weights, shape)).unwrap();
    Arc::new(builder.finish().unwrap().unchecked())
}

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}
