//! What is refused, and what cannot be written down.

use super::*;

#[test]
fn plaintexts_that_cannot_be_encrypted() {
    let domain = domain(ParameterSet::P24, Direction::Forward);
    let seed = MaskSeed::from_bytes([0; 32]);
    let encrypt = |rows: &[f32], tokens, features, steps: &[f64]| {
        encrypt(&seed, &domain, Plaintext { rows, tokens, features, steps }).map(|_| ()).unwrap_err()
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

#[test]
fn tiles_that_do_not_fit() {
    let (tokens, outer, limbs, n) = (3, 10, 2, 1024);
    let open = || {
        let domain = domain(ParameterSet::P24, Direction::Forward);
        let plaintext = Plaintext { rows: &[0.0; 6], tokens, features: 2, steps: &[1.0; 3] };
        encrypt(&MaskSeed::from_bytes([0; 32]), &domain, plaintext).unwrap().1
    };
    let precision = Precision::standard(ParameterSet::P24);
    for wrong in [
        Precision::standard(ParameterSet::P32),
        Precision { set: ParameterSet::P24, output_limbs: 0 },
        Precision { set: ParameterSet::P24, output_limbs: 4 },
    ] {
        assert!(matches!(open().open(wrong, outer), Err(DecryptError::Precision { .. })));
    }

    let mut decryption = open().open(precision, outer).unwrap();
    let tile = |first_column, mask: [usize; 3], body: [usize; 3]| ProductTile {
        first_column,
        mask: Planes::zeros(mask[0], mask[1], mask[2]),
        body: Planes::zeros(body[0], body[1], body[2]),
    };
    let mut out = vec![7.0f32; tokens * outer];
    let mut refuse = |decryption: &mut Decryption, tile: ProductTile| {
        let error = decryption.tile(&tile, &mut out).unwrap_err();
        assert!(out.iter().all(|&value| value == 7.0));
        error
    };
    let good = ([limbs, n, 4], [limbs, tokens, 4]);
    for (mask, body) in [
        ([3, n, 4], good.1),
        ([limbs, n - 1, 4], good.1),
        ([limbs, n, 5], good.1),
        (good.0, [1, tokens, 4]),
        (good.0, [limbs, tokens + 1, 4]),
        (good.0, [limbs, tokens, 3]),
    ] {
        assert!(matches!(refuse(&mut decryption, tile(0, mask, body)), DecryptError::Dimensions { .. }));
    }
    for first in [7, 10, usize::MAX] {
        assert!(matches!(refuse(&mut decryption, tile(first, good.0, good.1)), DecryptError::Columns { .. }));
    }
    let empty = tile(0, [limbs, n, 0], [limbs, tokens, 0]);
    assert!(matches!(refuse(&mut decryption, empty), DecryptError::Columns { .. }));
    assert_eq!(decryption.tile(&tile(0, good.0, good.1), &mut out[1..]), Err(DecryptError::Output(29)));

    decryption.tile(&tile(2, good.0, good.1), &mut out).unwrap();
    assert_eq!(decryption.tile(&tile(5, good.0, good.1), &mut out), Err(DecryptError::Repeated(5)));
    decryption.tile(&tile(6, good.0, good.1), &mut out).unwrap();
    assert_eq!(decryption.finish(), Err(DecryptError::Missing { missing: 2, first: 0 }));
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
    implements_none_of!(Decryption: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
    implements_none_of!(secret::OneTimeSecret: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
    implements_none_of!(sampling::SecretRng: Clone, std::fmt::Debug, std::fmt::Display, serde::Serialize);
}
