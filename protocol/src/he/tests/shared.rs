//! Rows of a block that several calls share are those of any other call, and each serves one of them.

use super::*;
use crate::he::noise::{fresh_variance, product_variance};
use crate::he::reference::reference_answer;

/// Rows that are there already, in tasks of so many.
struct Given<'a> {
    rows: &'a [f32],
    steps: &'a [f64],
}

impl<'a> Given<'a> {
    fn tasks(rows: &'a [f32], features: usize, steps: &'a [f64], each: usize) -> Vec<Self> {
        rows.chunks(each * features).zip(steps.chunks(each)).map(|(rows, steps)| Self { rows, steps }).collect()
    }
}

impl RowTask for Given<'_> {
    type Error = std::convert::Infallible;

    fn rows(&self) -> usize {
        self.steps.len()
    }

    fn make(self, rows: &mut [f32], steps: &mut [f64]) -> Result<(), Self::Error> {
        rows.copy_from_slice(self.rows);
        steps.copy_from_slice(self.steps);
        Ok(())
    }
}

/// A row that cannot be made.
struct Unmade;

impl RowTask for Unmade {
    type Error = &'static str;

    fn rows(&self) -> usize {
        1
    }

    fn make(self, _: &mut [f32], _: &mut [f64]) -> Result<(), Self::Error> {
        Err("unmade")
    }
}

/// Three calls of one block, cut into tiles of `width` columns and answered in another order, against exact products.
fn check(precision: Precision, shape: LinearShape, calls: [usize; 3], width: usize, seed: u64) {
    let mut rng = rng(seed);
    let domain = domain(precision.set, Direction::Backward);
    let (inner, outer) = shape.along(Direction::Backward);
    let (weights, mask_seed) = (random_weights(&mut rng, shape), MaskSeed::generate(&mut rng));
    let norms = column_norms_squared(&weights, shape, Direction::Backward);
    let widest = norms.iter().fold(0.0f64, |a, &b| a.max(b));
    let room =
        1.0 - 8.0 * product_variance(precision, widest).sqrt() / f64::from(precision.set.modulus_bits() - 1).exp2();
    if room < 0.1 {
        return;
    }
    let masks = mask_product(precision, &mask_seed, &domain, &weights, shape);
    let (parts, secret) = share(&mask_seed, &domain, inner, &calls).unwrap();
    let sent = calls.into_iter().zip(parts).enumerate().map(|(number, (most, part))| {
        // One of the calls uses fewer rows than it may.
        let rows = if number == 1 { most.div_ceil(2) } else { most };
        let mut values: Vec<f32> = (0..rows * inner).map(|_| rng.random_range(-3.0..3.0)).collect();
        values[..inner].fill(0.0);
        let steps = steps(precision.set, &values, inner, &norms, room * 0.99);
        let tasks = Given::tasks(&values, inner, &steps, 7);
        let (body, ticket) = part.encrypt(&domain, precision, inner, tasks).unwrap();
        assert_eq!((body.bits(), body.rows(), body.columns()), (precision.body_bits.into(), rows, inner));
        assert_eq!((ticket.tokens(), ticket.precision()), (rows, precision));
        (values, steps, body, ticket)
    });
    let sent: Vec<_> = sent.collect();
    let answers = secret.finish(&masks).unwrap();
    for ((values, steps, body, ticket), rows) in sent.into_iter().zip(answers).rev() {
        let answer = reference_answer(precision, Direction::Backward, &body, &weights, shape);
        let mut decryption = ticket.open(rows, vec![f32::NAN; steps.len() * outer]).unwrap();
        for first in (0..outer).step_by(width).rev() {
            decryption.tile(round_trip::cut(&answer, first, width.min(outer - first))).unwrap();
        }
        let out = decryption.finish().unwrap().unchecked();
        let expected = exact_product(&values, &weights, shape, Direction::Backward);
        for (index, (&value, &expected)) in out.iter().zip(&expected).enumerate() {
            let (token, column) = (index / outer, index % outer);
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
            check(precision, LinearShape { d_in: 70, d_out: 150 }, [3, 6, 1], 64, 1);
            check(precision, LinearShape { d_in: 1, d_out: 1 }, [1, 17, 100], 1, 2);
            check(precision, LinearShape { d_in: 200, d_out: 33 }, [100, 40, 116], 32, 3);
        }
    }
}

/// A message of zeros under the identity: what is left after decryption are the errors, fresh in each row, of all calls alike.
#[test]
fn errors_are_those_of_any_other_call() {
    for set in ParameterSet::ALL {
        let (width, calls) = (120, [15, 25]);
        let (exact, shape) = (Precision::exact(set), LinearShape { d_in: width, d_out: width });
        let weights: Vec<i8> = (0..width * width).map(|at| i8::from(at / width == at % width)).collect();
        let (domain, seed) = (domain(set, Direction::Forward), MaskSeed::from_bytes([4; 32]));
        let masks = mask_product(exact, &seed, &domain, &weights, shape);
        let (parts, secret) = share(&seed, &domain, width, &calls).unwrap();
        let answers = secret.finish(&masks).unwrap();
        let mut errors = Vec::new();
        for ((rows, part), answer) in calls.into_iter().zip(parts).zip(answers) {
            let zeros = vec![0.0; rows * width];
            let steps = vec![1.0; rows];
            let (body, ticket) = part.encrypt(&domain, exact, width, Given::tasks(&zeros, width, &steps, 4)).unwrap();
            let mut decryption = ticket.open(answer, vec![0.0; rows * width]).unwrap();
            decryption.tile(ProductTile { first_column: 0, rows: body }).unwrap();
            errors.extend(decryption.finish().unwrap().unchecked().into_iter().map(f64::from));
        }
        assert!(errors.iter().all(|error| error.abs() <= f64::from(set.error_eta()) && error.fract() == 0.0));
        noise::assert_noise(&format!("{set} errors"), &errors, fresh_variance(set), 1.0);
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let (set, shape) = (ParameterSet::P24, LinearShape { d_in: 5, d_out: 7 });
    let (precision, seed) = (Precision::standard(set), MaskSeed::from_bytes([9; 32]));
    let (forward, backward) = (domain(set, Direction::Forward), domain(set, Direction::Backward));
    let weights = random_weights(&mut rng(1), shape);
    let masks = mask_product(precision, &seed, &forward, &weights, shape);
    for calls in [&[][..], &[0], &[3, 0], &[1000, 25], &[usize::MAX, 2]] {
        let refused = share(&seed, &forward, 5, calls).map(|_| ()).unwrap_err();
        assert!(matches!(refused, EncryptError::PadRows { most: 1024, .. }), "{refused}");
    }
    let other = domain(ParameterSet::P32, Direction::Forward);
    let (_, secret) = share(&seed, &other, 5, &[1]).unwrap();
    assert!(matches!(secret.finish(&masks).map(|_| ()), Err(EncryptError::Precision { .. })));

    let block = || share(&seed, &forward, 5, &[2, 3]).unwrap();
    let seal = |part: SharedRows, domain: &MaskDomain, precision, values: &[f32], features: usize| {
        let tokens = values.len() / features;
        part.encrypt(domain, precision, features, Given::tasks(values, features, &vec![1.0; tokens], 1)).map_err(
            |error| {
                let RowError::Encrypt(error) = error;
                error
            },
        )
    };
    let refused = |domain: &MaskDomain, precision, values: &[f32], features| {
        seal(block().0.swap_remove(0), domain, precision, values, features).map(|_| ()).unwrap_err()
    };
    assert!(matches!(refused(&forward, precision, &[0.0; 15], 5), EncryptError::Pads { rows: 2, tokens: 3 }));
    assert!(matches!(refused(&backward, precision, &[0.0; 5], 5), EncryptError::Pads { .. }));
    assert!(matches!(refused(&forward, precision, &[0.0; 6], 6), EncryptError::Pads { .. }));
    let invalid = Precision { output_bits: 11, ..precision };
    assert!(matches!(refused(&forward, invalid, &[0.0; 5], 5), EncryptError::Precision { .. }));
    let refused = refused(&forward, precision, &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0], 5);
    assert!(matches!(refused, EncryptError::Range { token: 1 }), "{refused}");

    let failing = |steps: &[f64], tasks| {
        let part = block().0.swap_remove(1);
        part.encrypt(&forward, precision, 5, Given::tasks(&[0.5; 15], 5, steps, tasks)).map(|_| ()).unwrap_err()
    };
    for wrong in [f64::NAN, f64::INFINITY, -1.0] {
        let RowError::Encrypt(error) = failing(&[1.0, 1.0, wrong], 2);
        assert!(matches!(error, EncryptError::Step { token: 2 }), "{error}");
    }
    let none = block().0.swap_remove(0).encrypt(&forward, precision, 5, Vec::<Given<'_>>::new()).map(|_| ());
    assert!(matches!(none, Err(RowError::Encrypt(EncryptError::Shape { tokens: 0, .. }))));
    let unmade = block().0.swap_remove(0).encrypt(&forward, precision, 5, vec![Unmade]).map(|_| ());
    assert!(matches!(unmade, Err(RowError::Make("unmade"))));

    // The other call's rows, those of another block, and what was made from coarser masks.
    let opened = |precision: Precision, answer: fn(Vec<SharedAnswer>, Vec<SharedAnswer>) -> SharedAnswer, size| {
        let [(mut parts, secret), (_, other)] = [block(), block()];
        let answer = answer(secret.finish(&masks).unwrap(), other.finish(&masks).unwrap());
        let (_, ticket) = seal(parts.swap_remove(0), &forward, precision, &[1.0; 10], 5).unwrap();
        ticket.open(answer, vec![0.0; size]).map(|_| ())
    };
    assert_eq!(opened(precision, |mut own, _| own.swap_remove(0), 14), Ok(()));
    assert_eq!(opened(precision, |mut own, _| own.swap_remove(1), 14), Err(DecryptError::OtherRows));
    assert_eq!(opened(precision, |_, mut other| other.swap_remove(0), 14), Err(DecryptError::OtherRows));
    assert_eq!(opened(precision, |mut own, _| own.swap_remove(0), 15), Err(DecryptError::Output(15)));
    let coarse = Precision { mask_limbs: precision.mask_limbs - 1, ..precision };
    let refused = opened(coarse, |mut own, _| own.swap_remove(0), 14);
    assert!(matches!(refused, Err(DecryptError::Precision { .. })), "{refused:?}");
}

/// What has an implementation of `Clone` has two of `Once`, and which one is meant cannot be told: then this does not compile.
#[test]
fn rows_secret_answer_and_ticket_cannot_be_copied() {
    trait Once<Which> {
        fn is_of_one_use() {}
    }
    struct Copied;
    impl<T> Once<()> for T {}
    impl<T: Clone> Once<Copied> for T {}
    <SharedRows as Once<_>>::is_of_one_use();
    <SharedSecret as Once<_>>::is_of_one_use();
    <SharedAnswer as Once<_>>::is_of_one_use();
    <SharedTicket as Once<_>>::is_of_one_use();
}
