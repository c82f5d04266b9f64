//! Our ciphertexts are ordinary GLWE ciphertexts: an independent library, tfhe's core_crypto, decrypts them, and what
//! it encrypts we decrypt. Values mod `2^(8·limbs)` are handed over in the top bits of its 64-bit words, where
//! arithmetic mod 2^64 is ours.

use std::sync::Arc;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tfhe::core_crypto::algorithms::polynomial_algorithms::polynomial_wrapping_add_mul_assign;
use tfhe::core_crypto::prelude::*;

use super::{
    MaskProductBuilder, MaskSeed, ParameterSet, Planes, Precision, ProductTile, Ticket, domain, encrypt, mask, rng,
};
use crate::he::products::MaskTransform;
use crate::he::secret::OneTimeSecret;

const FEATURES: usize = 5;

/// A secret of ours as tfhe's: -1 is 2^64 - 1.
fn secret_key(set: ParameterSet, secret: &[i8]) -> GlweSecretKeyOwned<u64> {
    let words = secret.iter().map(|&s| i64::from(s) as u64).collect();
    GlweSecretKey::from_container(words, PolynomialSize(set.polynomial_size()))
}

fn messages(set: ParameterSet, rng: &mut ChaCha8Rng, tokens: usize) -> Vec<i64> {
    let half = 1i64 << (set.modulus_bits() - 1).min(24);
    (0..tokens * FEATURES).map(|_| rng.random_range(1 - half..half)).collect()
}

#[test]
fn tfhe_decrypts_ours() {
    for set in ParameterSet::ALL {
        let (size, tokens, spare) = (set.polynomial_size(), set.polynomial_size() + 9, 64 - set.modulus_bits());
        let mut rng = rng(21);
        let domain = domain(set, crate::ids::Direction::Backward);
        let seed = MaskSeed::generate(&mut rng);
        let messages = messages(set, &mut rng, tokens);
        let rows: Vec<f32> = messages.iter().map(|&m| m as f32).collect();
        let steps = vec![1.0; tokens];
        let plaintext = crate::he::Plaintext { rows: &rows, tokens, features: FEATURES, steps: &steps };
        let (body, ticket) = encrypt(&seed, &domain, Precision::exact(set), plaintext).unwrap();
        let mask = mask::expand_planes(&seed, &domain, 0..FEATURES);

        for block in 0..2 {
            let key = secret_key(set, &ticket.secret(block));
            for feature in 0..FEATURES {
                let mut words: Vec<u64> = (0..set.mask_rows()).map(|row| mask.value(row, feature) << spare).collect();
                let token = |t: usize| block * size + t;
                words.extend(
                    (0..size).map(|t| if token(t) < tokens { body.value(token(t), feature) << spare } else { 0 }),
                );
                let modulus = CiphertextModulus::new_native();
                let ciphertext = GlweCiphertext::from_container(words, PolynomialSize(size), modulus);
                let mut decrypted = PlaintextList::new(0u64, PlaintextCount(size));
                decrypt_glwe_ciphertext(&key, &ciphertext, &mut decrypted);
                for t in (0..size).take_while(|&t| token(t) < tokens) {
                    let value = decrypted.as_ref()[t] as i64 >> spare;
                    let error = value - messages[token(t) * FEATURES + feature];
                    assert!(error.unsigned_abs() <= u64::from(set.error_eta()), "{set}: error {error}");
                }
            }
        }
    }
}

#[test]
fn we_decrypt_tfhes() {
    for set in ParameterSet::ALL {
        let (size, tokens, spare) = (set.polynomial_size(), set.polynomial_size(), 64 - set.modulus_bits());
        let mut rng = rng(22);
        let coefficients: Vec<i8> = (0..set.mask_rows()).map(|_| rng.random_range(-1..=1)).collect();
        let key = secret_key(set, &coefficients);
        let mut seeder = new_seeder();
        let seeder = seeder.as_mut();
        let mut generator = EncryptionRandomGenerator::<DefaultRandomGenerator>::new(seeder.seed(), seeder);
        let messages = messages(set, &mut rng, tokens);

        let mut mask = Planes::zeros(set.limbs(), set.mask_rows(), FEATURES);
        let mut body = Planes::zeros(set.limbs(), tokens, FEATURES);
        for feature in 0..FEATURES {
            // For a modulus below its own, tfhe scales plaintexts into the top bits by itself.
            let values: Vec<u64> = (0..size).map(|t| messages[t * FEATURES + feature] as u64).collect();
            let plaintexts = PlaintextList::from_container(values);
            let glwe_size = GlweDimension(set.glwe_dimension()).to_glwe_size();
            // Words mod 2^(8·limbs), kept by tfhe in the top bits.
            let modulus = CiphertextModulus::try_new_power_of_2(set.modulus_bits() as usize).unwrap();
            let mut ciphertext = GlweCiphertext::new(0u64, glwe_size, PolynomialSize(size), modulus);
            // A standard deviation of 2 units of ours.
            let noise =
                Gaussian::from_dispersion_parameter(StandardDev(2.0 / f64::from(set.modulus_bits()).exp2()), 0.0);
            encrypt_glwe_ciphertext(&key, &mut ciphertext, &plaintexts, noise, &mut generator);
            let (mask_words, body_words) = ciphertext.as_ref().split_at(set.mask_rows());
            for (row, word) in mask_words.iter().enumerate() {
                mask.set_value(row, feature, word >> spare);
            }
            for (row, word) in body_words.iter().enumerate() {
                body.set_value(row, feature, word >> spare);
            }
        }

        let precision = Precision::exact(set);
        let ticket = Ticket::new(precision, vec![OneTimeSecret::of(set, &coefficients)], vec![1.0; tokens]);
        let mut masks = MaskProductBuilder::new(precision, FEATURES).unwrap();
        masks.tile(&ProductTile { first_column: 0, rows: mask }).unwrap();
        let masks = Arc::new(masks.finish().unwrap().unchecked());
        let mut decryption = ticket.open(masks, precision, vec![0.0; tokens * FEATURES]).unwrap();
        decryption.tile(ProductTile { first_column: 0, rows: body }).unwrap();
        let out = decryption.finish().unwrap().unchecked();
        for (&value, &message) in out.iter().zip(&messages) {
            // 7 σ, and the rounding of 25 bits to f32.
            assert!((f64::from(value) - message as f64).abs() <= 15.0, "{set}: {value} for {message}");
        }
    }
}

#[test]
fn products_are_tfhes_products() {
    for set in ParameterSet::ALL {
        let (size, limbs) = (set.polynomial_size(), set.limbs());
        let mut rng = rng(23);
        let seed = MaskSeed::generate(&mut rng);
        let domain = domain(set, crate::ids::Direction::Forward);
        let mut keystream = vec![0; domain.column_bytes()];
        mask::expand(&seed, &domain, 7..8, &mut keystream);
        let coefficients: Vec<i8> = (0..set.mask_rows()).map(|_| rng.random_range(-1..=1)).collect();
        let transform = MaskTransform::new(set, limbs);
        let mut working = transform.working::<u64>();
        let mut transformed = vec![0.0; transform.column_numbers()];
        transform.transform(&keystream, &mut working, &mut transformed);
        let mut product = vec![0u64; size];
        transform.multiply(&transformed, &OneTimeSecret::of(set, &coefficients), &mut working, &mut product);

        let word = |row: usize| (0..limbs).map(|l| u64::from(keystream[l * set.mask_rows() + row]) << (8 * l)).sum();
        let words: Vec<u64> = (0..set.mask_rows()).map(word).collect();
        let secret: Vec<u64> = coefficients.iter().map(|&s| i64::from(s) as u64).collect();
        let mut sum = Polynomial::new(0u64, PolynomialSize(size));
        for (a, s) in words.chunks_exact(size).zip(secret.chunks_exact(size)) {
            polynomial_wrapping_add_mul_assign(
                &mut sum,
                &Polynomial::from_container(a.to_vec()),
                &Polynomial::from_container(s.to_vec()),
            );
        }
        let mask = (1u64 << set.modulus_bits()) - 1;
        assert!(product.iter().zip(sum.as_ref()).all(|(ours, theirs)| ours & mask == theirs & mask));
    }
}
