//! What a worker computes, in the plainest words: the definition that every kernel is tested against.

use rayon::prelude::*;

use super::mask::{MaskDomain, MaskSeed, expand_planes};
use super::modulus::switch_planes;
use super::{Planes, Precision, ProductTile};
use crate::ids::{Direction, LinearShape};

/// `operand · W mod 2^(8·limbs)`, or `operand · Wᵀ` for [`Direction::Backward`].
///
/// `operand` is `rows × inner` values of whole bytes, `weights` is `d_in × d_out` row-major whatever the direction; the result is
/// `rows × outer` of as many bytes. Panics if the dimensions disagree.
pub fn reference_product(operand: &Planes, weights: &[i8], shape: LinearShape, direction: Direction) -> Planes {
    let (inner, outer) = shape.along(direction);
    assert_eq!(operand.columns(), inner, "columns of the operand");
    assert!(operand.is_whole(), "values of whole bytes");
    assert_eq!(weights.len(), shape.d_in * shape.d_out, "weights");
    let rows: Vec<Vec<u64>> = (0..operand.rows())
        .into_par_iter()
        .map(|row| {
            let mut sums = vec![0u64; outer];
            for i in 0..inner {
                let value = operand.value(row, i);
                for (j, sum) in sums.iter_mut().enumerate() {
                    let weight = match direction {
                        Direction::Forward => weights[i * shape.d_out + j],
                        Direction::Backward => weights[j * shape.d_out + i],
                    };
                    *sum = sum.wrapping_add(value.wrapping_mul(i64::from(weight) as u64));
                }
            }
            sums
        })
        .collect();
    let mut product = Planes::zeros(operand.limbs(), operand.rows(), outer);
    for (row, sums) in rows.iter().enumerate() {
        for (column, &sum) in sums.iter().enumerate() {
            product.set_value(row, column, sum);
        }
    }
    product
}

/// A worker's mask product as one tile: the mask is expanded, multiplied and switched.
///
/// Panics if the dimensions disagree.
pub fn reference_masks(
    precision: Precision,
    seed: &MaskSeed,
    domain: &MaskDomain,
    weights: &[i8],
    shape: LinearShape,
) -> ProductTile {
    let (inner, _) = shape.along(domain.product.direction);
    let product = reference_product(&expand_planes(seed, domain, 0..inner), weights, shape, domain.product.direction);
    ProductTile { first_column: 0, rows: switch_planes(&product, 8 * u32::from(precision.mask_limbs)) }
}

/// A worker's body product as one tile: the body is brought to whole bytes, multiplied and switched.
///
/// Panics if the dimensions disagree.
pub fn reference_answer(
    precision: Precision,
    direction: Direction,
    body: &Planes,
    weights: &[i8],
    shape: LinearShape,
) -> ProductTile {
    let product = reference_product(&body.spread(), weights, shape, direction);
    ProductTile { first_column: 0, rows: switch_planes(&product, precision.output_bits.into()) }
}
