#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::he::ParameterSet;

/// All of the smallest set, and some of the others, which have many.
fn precisions() -> impl Iterator<Item = Precision> {
    let [p24, p32, p48] = ParameterSet::ALL.map(Precision::all);
    p24.chain(p32.step_by(11)).chain(p48.step_by(37))
}

/// The largest magnitude that an output can take: the exact product of the message, every error as bad as it can
/// be, in integers and doubled so that halves are exact. Rounding to a multiple of `2^d` errs by `2^(d−1)`.
fn doubled_worst_output(message: &[i64], weights: &[i8], precision: Precision) -> i128 {
    let product: i128 = message.iter().zip(weights).map(|(&m, &w)| i128::from(m) * i128::from(w)).sum();
    let weight_sum: i128 = weights.iter().map(|&w| i128::from(w).abs()).sum();
    let missing = |bits: u8| precision.set.modulus_bits() - u32::from(bits);
    let doubled = |dropped: u32| if dropped == 0 { 0 } else { 1_i128 << dropped };
    let fresh = 2 * i128::from(precision.set.error_eta()) + doubled(missing(precision.body_bits));
    let output = match precision.output_bits < precision.body_bits {
        true => doubled(missing(precision.output_bits)),
        false => 0,
    };
    let mask = doubled(missing(8 * precision.mask_limbs));
    2 * product.abs() + fresh * weight_sum + output + mask * precision.set.mask_rows() as i128
}

fn encode(x: &[f32], step: f64) -> Vec<i64> {
    x.iter().map(|&x| (f64::from(x) * step).round() as i64).collect()
}

fn norm(column: &[i8]) -> f64 {
    column.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt()
}

/// int8 columns that try to make an output of `x` large: in its direction, its signs, and its largest feature alone.
fn adversarial_columns(x: &[f32]) -> [Vec<i8>; 3] {
    let top = x.iter().fold(0.0_f64, |top, v| top.max(f64::from(v.abs()))).max(f64::MIN_POSITIVE);
    let aligned = x.iter().map(|&v| (127.0 * (f64::from(v) / top)).round() as i8).collect();
    let signs = x.iter().map(|&v| if v < 0.0 { -127 } else { 127 }).collect();
    let single = x.iter().map(|&v| if f64::from(v.abs()) == top { 127 } else { 0 }).collect();
    [aligned, signs, single]
}

/// Any finite f32: denormals, powers far apart, the largest ones, zeros.
fn extreme() -> impl Strategy<Value = f32> {
    prop_oneof![
        any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |v| v.is_finite()),
        prop_oneof![Just(0.0), Just(f32::MAX), Just(f32::MIN), Just(1e-45_f32), Just(-f32::MIN_POSITIVE)],
        -1.0_f32..1.0,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_input_wraps(
        x in prop_oneof![prop::collection::vec(extreme(), 1..200), prop::collection::vec(-3.0_f32..3.0, 1..600)],
        random in prop::collection::vec(any::<i8>(), 600),
    ) {
        let [aligned, signs, single] = adversarial_columns(&x);
        let random = random[..x.len()].iter().map(|w| w.saturating_add(i8::from(*w == i8::MIN))).collect();
        let columns = [aligned, signs, single, random];
        let max_norm = columns.iter().map(|column| norm(column)).fold(0.0, f64::max);
        for precision in precisions() {
            let Ok(steps) = encoding_steps(&x, 1, max_norm, precision) else {
                prop_assert!(message_room(precision, x.len(), max_norm) <= 0.0);
                continue;
            };
            let message = encode(&x, steps[0]);
            let q = 1_i128 << precision.set.modulus_bits();
            for m in &message {
                prop_assert!(2 * i128::from(m.abs()) < q, "{precision}: message {m}");
            }
            for column in &columns {
                let worst = doubled_worst_output(&message, column, precision);
                prop_assert!(worst < q, "{precision}: twice the worst output is {worst}, q {q}");
            }
        }
    }
}

#[test]
fn steps_are_the_finest() {
    // A row in the direction of the heaviest column comes within one per cent of the room that there is: a step that
    // is one per cent finer would be past the bound.
    let x: Vec<f32> = (0..512).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
    let [aligned, ..] = adversarial_columns(&x);
    for precision in [ParameterSet::P24, ParameterSet::P32, ParameterSet::P48].map(Precision::standard) {
        let steps = encoding_steps(&x, 1, norm(&aligned), precision).unwrap();
        let message = encode(&x, steps[0]);
        let product: i128 = message.iter().zip(&aligned).map(|(&m, &w)| i128::from(m) * i128::from(w)).sum();
        let room = message_room(precision, x.len(), norm(&aligned));
        assert!(product as f64 > 0.99 * room, "{precision}: {product} of {room}");
    }
}

#[test]
fn zero_rows_have_step_zero_and_others_do_not_notice() {
    let rows = [0.0, 0.0, 1.0, -2.0, -0.0, 0.0, 1e-45, 0.0];
    let steps = encoding_steps(&rows, 4, 127.0, Precision::standard(ParameterSet::P24)).unwrap();
    assert_eq!((steps[0], steps[2]), (0.0, 0.0));
    assert!(steps[1] > 0.0 && steps[3] > 1e40 && steps[3].is_finite());
}

#[test]
fn a_matrix_of_zeros_bounds_the_message_itself() {
    for precision in precisions().filter(|&p| message_room(p, 3, 0.0) > 0.0) {
        let steps = encoding_steps(&[3.0, 0.0, -4.0], 1, 0.0, precision).unwrap();
        let message = encode(&[3.0, 0.0, -4.0], steps[0]);
        assert!(message.iter().all(|m| 2 * i128::from(m.abs()) < 1 << precision.set.modulus_bits()));
    }
}

#[test]
fn what_cannot_be_encoded_is_named() {
    let standard = Precision::standard(ParameterSet::P32);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let rows = [1.0, 2.0, 3.0, value, 4.0, 5.0];
        match encoding_steps(&rows, 3, 127.0, standard) {
            Err(QuantError::NotFiniteRow { row: 1, feature: 1, .. }) => {}
            other => panic!("{value}: {other:?}"),
        }
    }
    assert!(matches!(encoding_steps(&[1.0; 5], 2, 127.0, standard), Err(QuantError::Length { .. })));
    assert!(matches!(encoding_steps(&[], 1, 127.0, standard), Err(QuantError::Length { .. })));
    assert!(matches!(encoding_steps(&[1.0], 0, 127.0, standard), Err(QuantError::Length { .. })));
    assert!(matches!(encoding_steps(&[1.0], 1, f64::NAN, standard), Err(QuantError::Metadata(_))));
    // One byte of 2^24 leaves nothing of a value: its switching noise is as large as the modulus.
    let coarse = Precision { mask_limbs: 1, ..Precision::standard(ParameterSet::P24) };
    assert_eq!(encoding_steps(&[1.0], 1, 127.0, coarse), Err(QuantError::NoRoom { precision: coarse, inner: 1 }));
    let missing = Precision { output_bits: 0, ..Precision::standard(ParameterSet::P24) };
    assert_eq!(encoding_steps(&[1.0], 1, 127.0, missing), Err(QuantError::NoRoom { precision: missing, inner: 1 }));
}
