//! Rows encrypted with pads are ordinary rows, and a pad is of one use.

use super::*;
use crate::he::noise::{body_variance, fresh_variance, product_variance};
use crate::he::reference::reference_answer;

/// A product of `rows` rows with pads out of a block of `block`, cut into tiles of `width` columns, against the exact one.
fn check(precision: Precision, shape: LinearShape, (rows, block): (usize, usize), width: usize, seed: u64) {
    let mut rng = rng(seed);
    let domain = domain(precision.set, Direction::Forward);
    let (weights, mask_seed) = (random_weights(&mut rng, shape), MaskSeed::generate(&mut rng));
    let norms = column_norms_squared(&weights, shape, Direction::Forward);
    let widest = norms.iter().fold(0.0f64, |a, &b| a.max(b));
    let room =
        1.0 - 8.0 * product_variance(precision, widest).sqrt() / f64::from(precision.set.modulus_bits() - 1).exp2();
    if room < 0.1 {
        return;
    }
    let masks = mask_product(precision, &mask_seed, &domain, &weights, shape);
    let mut pads = PadRow::prepare(&mask_seed, &domain, &masks, shape.d_in, block).unwrap();
    assert!(pads.len() == block && pads[0].bytes() == PadRow::bytes_for(precision, shape.d_in, shape.d_out));
    // Of one block in two calls, its last rows first.
    for _ in 0..2 {
        let mut values: Vec<f32> = (0..rows * shape.d_in).map(|_| rng.random_range(-3.0..3.0)).collect();
        values[..shape.d_in].fill(0.0);
        let steps = steps(precision.set, &values, shape.d_in, &norms, room * 0.99);
        let plaintext = Plaintext { rows: &values, tokens: rows, features: shape.d_in, steps: &steps };
        let taken = pads.split_off(pads.len() - rows);
        let (body, ticket) = encrypt_with_pads(taken, &domain, precision, plaintext).unwrap();
        assert_eq!((body.bits(), body.rows(), body.columns()), (precision.body_bits.into(), rows, shape.d_in));
        assert_eq!((ticket.tokens(), ticket.precision()), (rows, precision));
        let answer = reference_answer(precision, Direction::Forward, &body, &weights, shape);
        let mut decryption = ticket.open(vec![f32::NAN; rows * shape.d_out]).unwrap();
        for first in (0..shape.d_out).step_by(width).rev() {
            decryption.tile(round_trip::cut(&answer, first, width.min(shape.d_out - first))).unwrap();
        }
        let out = decryption.finish().unwrap().unchecked();
        let expected = exact_product(&values, &weights, shape, Direction::Forward);
        for (index, (&value, &expected)) in out.iter().zip(&expected).enumerate() {
            let (token, column) = (index / shape.d_out, index % shape.d_out);
            if steps[token] == 0.0 {
                assert!(value == 0.0, "a zero row gives zeros");
                continue;
            }
            let tolerance =
                8.0 * product_variance(precision, norms[column]).sqrt() / steps[token] + expected.abs() * 1e-6;
            assert!((f64::from(value) - expected).abs() < tolerance, "{precision} ({token}, {column})");
        }
    }
}

#[test]
fn products_come_back_as_from_any_other_call() {
    for set in ParameterSet::ALL {
        let exact = Precision::exact(set);
        let packed = Precision { body_bits: exact.body_bits - 2, output_bits: exact.output_bits - 8, ..exact };
        let short = Precision { mask_limbs: exact.mask_limbs - 1, ..Precision::standard(set) };
        for precision in [Precision::standard(set), exact, packed, short] {
            check(precision, LinearShape { d_in: 70, d_out: 150 }, (3, 6), 64, 1);
            check(precision, LinearShape { d_in: 1, d_out: 1 }, (1, 17), 1, 2);
            check(precision, LinearShape { d_in: 200, d_out: 33 }, (16, 40), 32, 3);
        }
    }
}

/// With the identity for a matrix, `D` is `<a, s>`: what `P` has more are the errors, and what a body has more of a message of zeros are these and
/// its rounding, distributed as [`noise`](super::noise) finds those of other calls.
#[test]
fn errors_are_fresh_and_of_the_distribution_of_any_other_call() {
    for set in ParameterSet::ALL {
        let (rows, width) = (40, 120);
        let exact = Precision::exact(set);
        let shape = LinearShape { d_in: width, d_out: width };
        let weights: Vec<i8> = (0..width * width).map(|at| i8::from(at / width == at % width)).collect();
        let (domain, seed) = (domain(set, Direction::Forward), MaskSeed::from_bytes([4; 32]));
        let masks = mask_product(exact, &seed, &domain, &weights, shape);
        let pads = PadRow::prepare(&seed, &domain, &masks, width, rows).unwrap();
        let bits = set.modulus_bits();
        let less = |a: u64, b: u64| ((a.wrapping_sub(b) << (64 - bits)) as i64 as f64) / f64::from(64 - bits).exp2();
        let values: Vec<_> = pads.iter().map(PadRow::values).collect();
        let errors: Vec<f64> =
            values.iter().flat_map(|[up, down]| up.iter().zip(down).map(|(&a, &b)| less(a, b))).collect();
        assert!(errors.iter().all(|error| error.abs() <= f64::from(set.error_eta()) && error.fract() == 0.0));
        noise::assert_noise(&format!("{set} errors"), &errors, fresh_variance(set), 1.0);
        // No row is another's, and they are as uniform as a block's: 6 σ of a mean of so many.
        let whole = f64::from(bits).exp2();
        for (at, [up, down]) in values.iter().enumerate() {
            assert!(values[..at].iter().all(|[other, _]| other.iter().zip(up).filter(|(a, b)| a == b).count() < 3));
            for words in [up, down] {
                let mean = words.iter().map(|&word| word as f64 / whole).sum::<f64>() / words.len() as f64;
                assert!((mean - 0.5).abs() < 6.0 / (12.0 * words.len() as f64).sqrt(), "row {at}: mean {mean}");
            }
        }
        // What travels.
        let bits = exact.body_bits - 4;
        let rounded = Precision { body_bits: bits, output_bits: bits, ..exact };
        let zeros = vec![0.0; rows * width];
        let plaintext = Plaintext { rows: &zeros, tokens: rows, features: width, steps: &vec![1.0; rows] };
        let (body, _) = encrypt_with_pads(pads, &domain, rounded, plaintext).unwrap();
        let noise: Vec<f64> = (0..rows * width)
            .map(|at| less(body.value(at / width, at % width) << 4, values[at / width][1][at % width]))
            .collect();
        noise::assert_noise(&format!("{set} body"), &noise, fresh_variance(set) + body_variance(rounded), 1.0);
    }
}

/// A block has a secret of its own: not that of the block before, of the same product under the same masks.
#[test]
fn two_blocks_have_nothing_in_common() {
    let (set, shape) = (ParameterSet::P24, LinearShape { d_in: 50, d_out: 50 });
    let (domain, seed) = (domain(set, Direction::Forward), MaskSeed::from_bytes([9; 32]));
    let weights = random_weights(&mut rng(1), shape);
    let masks = mask_product(Precision::standard(set), &seed, &domain, &weights, shape);
    let blocks = [0, 1].map(|_| PadRow::prepare(&seed, &domain, &masks, shape.d_in, 8).unwrap());
    let [first, second] = blocks.map(|pads| pads.iter().flat_map(|pad| pad.values().concat()).collect::<Vec<_>>());
    assert!(first.iter().zip(&second).filter(|(a, b)| a == b).count() < 4);
}

#[test]
fn pads_that_do_not_fit_are_refused() {
    let (set, shape) = (ParameterSet::P24, LinearShape { d_in: 5, d_out: 7 });
    let (precision, seed) = (Precision::standard(set), MaskSeed::from_bytes([9; 32]));
    let forward = domain(set, Direction::Forward);
    let weights = random_weights(&mut rng(1), shape);
    let masks = mask_product(precision, &seed, &forward, &weights, shape);
    for rows in [0, 1025, usize::MAX] {
        let refused = PadRow::prepare(&seed, &forward, &masks, 5, rows).map(|_| ()).unwrap_err();
        assert!(matches!(refused, EncryptError::PadRows { most: 1024, .. }), "{refused}");
    }
    let other_set = domain(ParameterSet::P32, Direction::Forward);
    let refused = PadRow::prepare(&seed, &other_set, &masks, 5, 1).map(|_| ());
    assert!(matches!(refused, Err(EncryptError::Precision { .. })));

    let sealed = |rows: usize, domain: &MaskDomain, precision, values: &[f32], features: usize| {
        let pads = PadRow::prepare(&seed, &forward, &masks, 5, rows).unwrap();
        let tokens = values.len() / features;
        let plaintext = Plaintext { rows: values, tokens, features, steps: &vec![1.0; tokens] };
        encrypt_with_pads(pads, domain, precision, plaintext)
    };
    let refused = |rows, domain: &MaskDomain, precision, values: &[f32], features| {
        sealed(rows, domain, precision, values, features).map(|_| ()).unwrap_err()
    };
    let backward = domain(set, Direction::Backward);
    assert!(matches!(refused(2, &forward, precision, &[0.0; 5], 5), EncryptError::Pads { rows: 2, tokens: 1 }));
    assert!(matches!(refused(1, &backward, precision, &[0.0; 5], 5), EncryptError::Pads { .. }));
    assert!(matches!(refused(1, &forward, precision, &[0.0; 6], 6), EncryptError::Pads { .. }));
    let coarse = Precision { mask_limbs: 2, ..precision };
    assert!(matches!(refused(1, &forward, coarse, &[0.0; 5], 5), EncryptError::Pads { .. }));
    let invalid = Precision { output_bits: 11, ..precision };
    assert!(matches!(refused(1, &forward, invalid, &[0.0; 5], 5), EncryptError::Precision { .. }));
    for value in [f32::NAN, f32::INFINITY, 8_388_608.0] {
        let refused = refused(2, &forward, precision, &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, value, 0.0, 0.0], 5);
        assert!(matches!(refused, EncryptError::Range { token: 1 }), "{refused}");
    }

    let ticket = || sealed(2, &forward, precision, &[1.0; 10], 5).unwrap().1;
    assert_eq!(ticket().open(vec![0.0; 13]).map(|_| ()), Err(DecryptError::Output(13)));
    let mut decryption = ticket().open(vec![0.0; 14]).unwrap();
    let tile = |first_column, bits, rows, columns| ProductTile {
        first_column,
        rows: Planes::zeros_of_bits(bits, rows, columns),
    };
    assert!(matches!(decryption.tile(tile(0, 14, 2, 7)), Err(DecryptError::Dimensions { .. })));
    assert!(matches!(decryption.tile(tile(0, 16, 1, 7)), Err(DecryptError::Dimensions { .. })));
    assert!(matches!(decryption.tile(tile(1, 16, 2, 7)), Err(DecryptError::Columns { .. })));
    assert_eq!(decryption.tile(tile(0, 16, 2, 3)), Ok(()));
    assert_eq!(decryption.tile(tile(2, 16, 2, 2)), Err(DecryptError::Repeated(2)));
    assert_eq!(decryption.finish().map(|_| ()), Err(DecryptError::Missing { missing: 4, first: 3 }));
}

/// What has an implementation of `Clone` has two of `Once`, and which one is meant cannot be told: then this does not compile.
#[test]
fn a_row_and_a_ticket_cannot_be_copied() {
    trait Once<Which> {
        fn is_of_one_use() {}
    }
    struct Copied;
    impl<T> Once<()> for T {}
    impl<T: Clone> Once<Copied> for T {}
    <PadRow as Once<_>>::is_of_one_use();
    <PadTicket as Once<_>>::is_of_one_use();
}
