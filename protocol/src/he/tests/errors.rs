//! What is refused, and what cannot be written down.

use super::*;

#[test]
fn plaintexts_that_cannot_be_encrypted() {
    let domain = domain(ParameterSet::P24, Direction::Forward);
    let seed = MaskSeed::from_bytes([0; 32]);
    let encrypt = |rows: &[f32], tokens, features, steps: &[f64]| {
        let plaintext = Plaintext { rows, tokens, features, steps };
        encrypt(&seed, &domain, Precision::standard(domain.set), plaintext).map(|_| ()).unwrap_err()
    };
    assert!(matches!(encrypt(&[], 0, 4, &[]), EncryptError::Shape { .. }));
    assert!(matches!(encrypt(&[0.0; 4], 1, 5, &[1.0]), EncryptError::Shape { .. }));
    assert!(matches!(encrypt(&[0.0; 4], 2, 2, &[1.0]), EncryptError::Shape { .. }));
    assert!(matches!(encrypt(&[], usize::MAX, 2, &[]), EncryptError::Shape { .. }));
    for step in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(encrypt(&[0.0; 4], 2, 2, &[1.0, step]), EncryptError::Step { token: 1 }));
    }
    for value in [f32::NAN, f32::INFINITY, 8_388_608.0, -8_388_608.0] {
        assert!(matches!(encrypt(&[0.0, 0.0, 0.0, value], 2, 2, &[1.0; 2]), EncryptError::Range { token: 1 }));
    }
}

/// Precisions that do not fit P24 with the standard one.
fn wrong_precisions() -> [Precision; 6] {
    let standard = Precision::standard(ParameterSet::P24);
    [
        Precision::standard(ParameterSet::P32),
        Precision { output_bits: 0, ..standard },
        Precision { output_bits: 11, ..standard },
        Precision { body_bits: 26, ..standard },
        Precision { body_bits: 14, ..standard },
        Precision { mask_limbs: 0, ..standard },
    ]
}

#[test]
fn precisions_that_do_not_fit() {
    let domain = domain(ParameterSet::P24, Direction::Forward);
    let seed = MaskSeed::from_bytes([0; 32]);
    let plaintext = Plaintext { rows: &[0.0; 6], tokens: 3, features: 2, steps: &[1.0; 3] };
    let ticket = |precision| encrypt(&seed, &domain, precision, plaintext).map(|(_, ticket)| ticket);
    let standard = Precision::standard(ParameterSet::P24);
    let masks = |precision| {
        let mut builder = MaskProductBuilder::new(precision, 1)?;
        let rows = Planes::zeros(usize::from(precision.mask_limbs), precision.set.mask_rows(), 1);
        builder.tile(&ProductTile { first_column: 0, rows })?;
        builder.finish().map(|masks| Arc::new(masks.unchecked()))
    };
    for wrong in wrong_precisions() {
        assert!(matches!(ticket(wrong), Err(EncryptError::Precision { .. })));
        let opened = ticket(standard).unwrap().open(masks(standard).unwrap(), wrong, vec![0.0; 3]);
        assert!(matches!(opened, Err(DecryptError::Precision { .. })));
    }
    for invalid in &wrong_precisions()[1..] {
        assert!(matches!(masks(*invalid), Err(DecryptError::Precision { .. })));
    }
    for other in [Precision { mask_limbs: 2, ..standard }, Precision::standard(ParameterSet::P32)] {
        let opened = ticket(standard).unwrap().open(masks(other).unwrap(), standard, vec![0.0; 3]);
        assert!(matches!(opened, Err(DecryptError::Precision { .. })));
    }
    // A mask product does not care how bodies are rounded.
    let fine = Precision { output_bits: 24, ..standard };
    assert!(ticket(standard).unwrap().open(masks(fine).unwrap(), standard, vec![0.0; 3]).is_ok());
    let short = ticket(standard).unwrap().open(masks(standard).unwrap(), standard, vec![0.0; 2]);
    assert_eq!(short.map(|_| ()), Err(DecryptError::Output(2)));
}

#[test]
fn tiles_that_do_not_fit() {
    let (tokens, outer, limbs, n) = (3, 10, 2, 1024);
    let precision = Precision::standard(ParameterSet::P24);
    let tile =
        |first_column, rows: [usize; 3]| ProductTile { first_column, rows: Planes::zeros(rows[0], rows[1], rows[2]) };

    let mut masks = MaskProductBuilder::new(precision, outer).unwrap();
    for wrong in [[2, n, 4], [4, n, 4], [3, n - 1, 4]] {
        assert!(matches!(masks.tile(&tile(0, wrong)), Err(DecryptError::Dimensions { .. })));
    }
    for (first, width) in [(7, 4), (10, 1), (usize::MAX, 4), (0, 0)] {
        assert!(matches!(masks.tile(&tile(first, [3, n, width])), Err(DecryptError::Columns { .. })));
    }
    masks.tile(&tile(2, [3, n, 4])).unwrap();
    assert_eq!(masks.tile(&tile(5, [3, n, 4])), Err(DecryptError::Repeated(5)));
    masks.tile(&tile(6, [3, n, 4])).unwrap();
    assert_eq!(masks.finish().map(|_| ()), Err(DecryptError::Missing { missing: 2, first: 0 }));

    let mut masks = MaskProductBuilder::new(precision, outer).unwrap();
    masks.tile(&tile(0, [3, n, outer])).unwrap();
    let domain = domain(ParameterSet::P24, Direction::Forward);
    let plaintext = Plaintext { rows: &[0.0; 6], tokens, features: 2, steps: &[1.0; 3] };
    let (_, ticket) = encrypt(&MaskSeed::from_bytes([0; 32]), &domain, precision, plaintext).unwrap();
    let masks = Arc::new(masks.finish().unwrap().unchecked());
    let mut out = vec![7.0f32; tokens * outer];
    let mut decryption = ticket.open(masks, precision, &mut out[..]).unwrap();
    let refuse = |decryption: &mut Decryption<&mut [f32]>, tile: ProductTile| {
        let error = decryption.tile(tile).unwrap_err();
        assert!(decryption.out.iter().all(|&value| value == 7.0));
        error
    };
    for wrong in [[1, tokens, 4], [3, tokens, 4], [limbs, tokens + 1, 4]] {
        assert!(matches!(refuse(&mut decryption, tile(0, wrong)), DecryptError::Dimensions { .. }));
    }
    let packed = ProductTile { first_column: 0, rows: Planes::zeros_of_bits(14, tokens, 4) };
    assert!(matches!(refuse(&mut decryption, packed), DecryptError::Dimensions { bits: 14, expected_bits: 16, .. }));
    for (first, width) in [(7, 4), (10, 4), (usize::MAX, 4), (0, 0)] {
        let wrong = tile(first, [limbs, tokens, width]);
        assert!(matches!(refuse(&mut decryption, wrong), DecryptError::Columns { .. }));
    }
    let good = [limbs, tokens, 4];

    decryption.tile(tile(2, good)).unwrap();
    assert_eq!(decryption.tile(tile(5, good)), Err(DecryptError::Repeated(5)));
    decryption.tile(tile(6, good)).unwrap();
    assert_eq!(decryption.finish().map(|_| ()), Err(DecryptError::Missing { missing: 2, first: 0 }));
}

/// Compiles only while none of the named traits is implemented for the type: with one of them, the path would be
/// ambiguous.
macro_rules! implements_none_of {
    ($type:ty: $($trait:path),+) => {{
        trait Ambiguous<A> {
            fn name() {}
        }
        impl<T: ?Sized> Ambiguous<()> for T {}
        $({
            struct Other;
            impl<T: ?Sized + $trait> Ambiguous<Other> for T {}
        })+
        <$type as Ambiguous<_>>::name();
    }};
}

#[test]
fn secrets_cannot_be_copied_printed_or_serialised() {
    implements_none_of!(Ticket: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
    implements_none_of!(Decryption<Vec<f32>>: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
    implements_none_of!(secret::OneTimeSecret: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
    implements_none_of!(sampling::SecretRng: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
}
