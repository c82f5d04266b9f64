//! Both schemes through their common interface.

#![allow(clippy::unwrap_used)]

use rand::Rng as _;

use super::*;
use crate::he::tests::{column_norms_squared, exact_product, random_weights, rng};
use crate::he::{ParameterSet, Precision};
use crate::ids::{Direction, LinearShape};

/// Runs a product and returns its worst error in units of `‖x_t‖·‖w_j‖`.
fn worst_relative_error(scheme: &impl Scheme, weights: &[i8], shape: LinearShape, tokens: usize) -> f64 {
    let mut rng = rng(11);
    let rows: Vec<f32> = (0..tokens * shape.d_in).map(|_| rng.random_range(-2.0..2.0)).collect();
    let (request, ticket) = scheme.encrypt(&rows, tokens).unwrap();
    let answer = scheme.multiply(&request);
    assert!(
        scheme.request_bytes(&request) > tokens * shape.d_in && scheme.answer_bytes(&answer) > tokens * shape.d_out
    );
    let out = scheme.decrypt(ticket, &answer).unwrap();
    assert_eq!(out.len(), tokens * shape.d_out);
    let exact = exact_product(&rows, weights, shape, Direction::Forward);
    let norms = column_norms_squared(weights, shape, Direction::Forward);
    let norm = |token: usize| rows[token * shape.d_in..][..shape.d_in].iter().map(|x| x * x).sum::<f32>().sqrt();
    out.iter()
        .zip(&exact)
        .enumerate()
        .map(|(i, (&value, exact))| {
            (f64::from(value) - exact).abs() / (norms[i % shape.d_out].sqrt() * f64::from(norm(i / shape.d_out)))
        })
        .fold(0.0, f64::max)
}

#[test]
fn column_packing_beside_the_paper() {
    let shape = LinearShape { d_in: 2100, d_out: 8 };
    let weights = random_weights(&mut rng(10), shape);
    for (set, bound) in [(ParameterSet::P24, 0.01), (ParameterSet::P32, 2e-3), (ParameterSet::P48, 1e-5)] {
        let ours = with_reference_product(Precision::standard(set), weights.clone(), shape).unwrap();
        let error = worst_relative_error(&ours, &weights, shape, 3);
        println!("{}: {error:.2e}", ours.name());
        assert!(error < bound, "{}: {error}", ours.name());
    }
    // Seven bits a value: a step of max|x|/63 and its rounding of at most 1/2 leave an error of about
    // 2/63/√12 / (2/√3) = 0.8 % of ‖x‖ along a random direction, and the largest of 16 is within 5 σ.
    let paper = PaperScheme::new(&weights, shape);
    let error = worst_relative_error(&paper, &weights, shape, 2);
    println!("{}: {error:.2e}", paper.name());
    assert!(error < 5.0 * 0.008 / (shape.d_in as f64).sqrt() + 1e-3, "{error}");
    assert!(paper.encrypt(&[1.0; 7], 1).is_err());
}
