//! The baseline: the scheme of arXiv 2505.07329 on `tfhe::core_crypto`.
//!
//! One token row is one GLWE ciphertext per 2,048 features. The worker multiplies it by each weight column, written
//! backwards, so that the dot product lands in the last coefficient; it extracts that coefficient as an LWE ciphertext,
//! adds those of all chunks, and packs up to 2,048 of them into one GLWE ciphertext with a packing key switch. Bodies
//! go up with 39 bits (masks as a seed), answers come back with 26 bits. Almost all of the time is the key switch:
//! `2048 · 2 · 4096` word products for each output.
//!
//! It uses long-lived binary keys and a 128 MiB evaluation key; rows are quantised to 7 signed bits, so that a product
//! with int8 weights stays in the 27-bit message space to 8,192 features.

use rayon::prelude::*;
use tfhe::core_crypto::algorithms::polynomial_algorithms::{
    polynomial_karatsuba_wrapping_mul, polynomial_wrapping_add_assign,
};
use tfhe::core_crypto::commons::math::random::{CompressionSeed, Seeder};
use tfhe::core_crypto::entities::compressed_modulus_switched_glwe_ciphertext::CompressedModulusSwitchedGlweCiphertext;
use tfhe::core_crypto::entities::packed_integers::PackedIntegers;
use tfhe::core_crypto::fft_impl::common::modulus_switch;
use tfhe::core_crypto::prelude::*;

use super::{Scheme, SchemeError};
use crate::ids::LinearShape;

/// Degree of the ring.
const POLYNOMIAL_SIZE: PolynomialSize = PolynomialSize(2048);
/// Mask polynomials of a ciphertext.
const GLWE_DIMENSION: GlweDimension = GlweDimension(1);
/// Standard deviation of the Gaussian errors, as a part of the modulus 2^64.
const NOISE: StandardDev = StandardDev(2.845_267_479_601_91e-15);
/// A message of 27 bits sits at the top of a 64-bit word.
const DELTA_LOG: u32 = 37;
/// Bits of a body that goes up.
const INPUT_BITS: CiphertextModulusLog = CiphertextModulusLog(39);
/// Bits of each value that comes back.
const OUTPUT_BITS: CiphertextModulusLog = CiphertextModulusLog(26);
/// Digits of the packing key switch.
const KEY_SWITCH_LEVELS: DecompositionLevelCount = DecompositionLevelCount(2);
/// Bits of each of its digits.
const KEY_SWITCH_BASE_LOG: DecompositionBaseLog = DecompositionBaseLog(14);
/// Rows are quantised to ± this.
const ROW_LIMIT: f32 = 63.0;
/// Bytes of the seed of a mask.
const SEED_BYTES: usize = 16;

/// The published scheme with its keys and the worker's weights.
pub struct PaperScheme {
    shape: LinearShape,
    /// Weight columns backwards and zero-padded, `[column][chunk]`.
    columns: Vec<Vec<Polynomial<Vec<u64>>>>,
    input_key: GlweSecretKeyOwned<u64>,
    output_key: GlweSecretKeyOwned<u64>,
    packing_key: LwePackingKeyswitchKeyOwned<u64>,
}

/// Encrypted rows: for each row and chunk of features the mask's seed and the packed body.
pub struct PaperRequest {
    rows: Vec<Vec<(CompressionSeed, PackedIntegers<u64>)>>,
}

/// What the owner keeps: the quantisation step of each row.
pub struct PaperTicket {
    steps: Vec<f32>,
}

/// Packed products: for each row one ciphertext per 2,048 outputs.
pub struct PaperAnswer {
    rows: Vec<Vec<CompressedModulusSwitchedGlweCiphertext<u64>>>,
}

impl PaperScheme {
    /// Draws keys (some seconds) and prepares `weights`, `d_in × d_out` row-major.
    pub fn new(weights: &[i8], shape: LinearShape) -> Self {
        assert_eq!(weights.len(), shape.d_in * shape.d_out);
        let mut seeder = new_seeder();
        let seeder = seeder.as_mut();
        let mut secrets = SecretRandomGenerator::<DefaultRandomGenerator>::new(seeder.seed());
        let mut draw =
            || allocate_and_generate_new_binary_glwe_secret_key(GLWE_DIMENSION, POLYNOMIAL_SIZE, &mut secrets);
        let (input_key, output_key) = (draw(), draw());
        let mut noise = EncryptionRandomGenerator::<DefaultRandomGenerator>::new(seeder.seed(), seeder);
        let packing_key = allocate_and_generate_new_lwe_packing_keyswitch_key(
            &input_key.as_lwe_secret_key(),
            &output_key,
            KEY_SWITCH_BASE_LOG,
            KEY_SWITCH_LEVELS,
            distribution(),
            CiphertextModulus::new_native(),
            &mut noise,
        );
        let column = |j: usize| {
            let values: Vec<u64> = (0..shape.d_in).map(|i| i64::from(weights[i * shape.d_out + j]) as u64).collect();
            values
                .chunks(POLYNOMIAL_SIZE.0)
                .map(|chunk| {
                    let mut backwards = vec![0; POLYNOMIAL_SIZE.0];
                    for (slot, &value) in backwards.iter_mut().rev().zip(chunk) {
                        *slot = value;
                    }
                    Polynomial::from_container(backwards)
                })
                .collect()
        };
        let columns = (0..shape.d_out).map(column).collect();
        Self { shape, columns, input_key, output_key, packing_key }
    }

    fn encrypt_row(&self, row: &[f32], seeder: &mut dyn Seeder) -> (Vec<(CompressionSeed, PackedIntegers<u64>)>, f32) {
        let largest = row.iter().fold(0.0f32, |a, &x| a.max(x.abs()));
        let step = if largest > 0.0 { largest / ROW_LIMIT } else { 1.0 };
        let chunks = row.chunks(POLYNOMIAL_SIZE.0).map(|chunk| {
            let mut messages = PlaintextList::new(0u64, PlaintextCount(POLYNOMIAL_SIZE.0));
            for (slot, &x) in messages.as_mut().iter_mut().zip(chunk) {
                *slot = ((x / step).round() as i64 as u64) << DELTA_LOG;
            }
            let mut ciphertext = SeededGlweCiphertext::new(
                0u64,
                GLWE_DIMENSION.to_glwe_size(),
                POLYNOMIAL_SIZE,
                seeder.seed().into(),
                CiphertextModulus::new_native(),
            );
            encrypt_seeded_glwe_ciphertext(&self.input_key, &mut ciphertext, &messages, distribution(), seeder);
            let seed = ciphertext.compression_seed();
            let body: Vec<u64> =
                ciphertext.into_container().into_iter().map(|value| modulus_switch(value, INPUT_BITS)).collect();
            (seed, PackedIntegers::pack(&body, INPUT_BITS))
        });
        (chunks.collect(), step)
    }

    fn multiply_row(
        &self,
        row: &[(CompressionSeed, PackedIntegers<u64>)],
    ) -> Vec<CompressedModulusSwitchedGlweCiphertext<u64>> {
        let inputs: Vec<GlweCiphertextOwned<u64>> = row
            .iter()
            .map(|(seed, body)| {
                let body: Vec<u64> = body.unpack::<u64>().map(|value| value << (64 - INPUT_BITS.0)).collect();
                let (size, modulus) = (GLWE_DIMENSION.to_glwe_size(), CiphertextModulus::new_native());
                SeededGlweCiphertext::from_container(body, size, seed.clone(), modulus)
                    .decompress_into_glwe_ciphertext()
            })
            .collect();
        self.columns.chunks(POLYNOMIAL_SIZE.0).map(|columns| self.pack(&inputs, columns)).collect()
    }

    /// Dot products with some columns, packed into one ciphertext.
    fn pack(
        &self,
        inputs: &[GlweCiphertextOwned<u64>],
        columns: &[Vec<Polynomial<Vec<u64>>>],
    ) -> CompressedModulusSwitchedGlweCiphertext<u64> {
        let modulus = CiphertextModulus::new_native();
        let lwe_size = self.input_key.as_lwe_secret_key().lwe_dimension().to_lwe_size();
        let mut products = LweCiphertextList::new(0u64, lwe_size, LweCiphertextCount(columns.len()), modulus);
        products.par_iter_mut().zip(columns).for_each(|(mut product, column)| {
            let mut sum = GlweCiphertext::new(0u64, GLWE_DIMENSION.to_glwe_size(), POLYNOMIAL_SIZE, modulus);
            let mut term = Polynomial::new(0u64, POLYNOMIAL_SIZE);
            for (input, weights) in inputs.iter().zip(column) {
                for (from, mut to) in input.as_polynomial_list().iter().zip(sum.as_mut_polynomial_list().iter_mut()) {
                    polynomial_karatsuba_wrapping_mul(&mut term, &from, weights);
                    polynomial_wrapping_add_assign(&mut to, &term);
                }
            }
            let last = MonomialDegree(POLYNOMIAL_SIZE.0 - 1);
            extract_lwe_sample_from_glwe_ciphertext(&sum, &mut product, last);
        });
        let mut packed = GlweCiphertext::new(0u64, GLWE_DIMENSION.to_glwe_size(), POLYNOMIAL_SIZE, modulus);
        par_keyswitch_lwe_ciphertext_list_and_pack_in_glwe_ciphertext(&self.packing_key, &products, &mut packed);
        CompressedModulusSwitchedGlweCiphertext::compress(&packed, OUTPUT_BITS, LweCiphertextCount(columns.len()))
    }

    fn decrypt_row(&self, row: &[CompressedModulusSwitchedGlweCiphertext<u64>], step: f32, out: &mut [f32]) {
        for (ciphertext, out) in row.iter().zip(out.chunks_mut(POLYNOMIAL_SIZE.0)) {
            let mut messages = PlaintextList::new(0u64, PlaintextCount(POLYNOMIAL_SIZE.0));
            decrypt_glwe_ciphertext(&self.output_key, &ciphertext.extract(), &mut messages);
            for (value, &message) in out.iter_mut().zip(messages.as_ref()) {
                let rounded = message.wrapping_add(1 << (DELTA_LOG - 1)) as i64 >> DELTA_LOG;
                *value = rounded as f32 * step;
            }
        }
    }
}

fn distribution() -> Gaussian<f64> {
    Gaussian::from_dispersion_parameter(NOISE, 0.0)
}

impl Scheme for PaperScheme {
    type Request = PaperRequest;
    type Ticket = PaperTicket;
    type Answer = PaperAnswer;

    fn name(&self) -> String {
        "paper".to_owned()
    }

    fn encrypt(&self, rows: &[f32], tokens: usize) -> Result<(Self::Request, Self::Ticket), SchemeError> {
        let inner = self.shape.d_in;
        if tokens == 0 || tokens.checked_mul(inner) != Some(rows.len()) {
            return Err(SchemeError::Shape { values: rows.len(), tokens, inner });
        }
        let mut seeder = new_seeder();
        let (rows, steps) = rows.chunks_exact(inner).map(|row| self.encrypt_row(row, seeder.as_mut())).unzip();
        Ok((PaperRequest { rows }, PaperTicket { steps }))
    }

    fn multiply(&self, request: &Self::Request) -> Self::Answer {
        PaperAnswer { rows: request.rows.iter().map(|row| self.multiply_row(row)).collect() }
    }

    fn decrypt(&self, ticket: Self::Ticket, answer: &Self::Answer) -> Result<Vec<f32>, SchemeError> {
        if answer.rows.len() != ticket.steps.len() {
            return Err(SchemeError::Answer { found: answer.rows.len(), expected: ticket.steps.len() });
        }
        let mut out = vec![0.0; ticket.steps.len() * self.shape.d_out];
        for ((row, step), out) in answer.rows.iter().zip(ticket.steps).zip(out.chunks_exact_mut(self.shape.d_out)) {
            self.decrypt_row(row, step, out);
        }
        Ok(out)
    }

    fn request_bytes(&self, request: &Self::Request) -> usize {
        let packed = |body: &PackedIntegers<u64>| (body.initial_len() * INPUT_BITS.0).div_ceil(8);
        request.rows.iter().flatten().map(|(_, body)| SEED_BYTES + packed(body)).sum()
    }

    fn answer_bytes(&self, answer: &Self::Answer) -> usize {
        let packed = |ciphertext: &CompressedModulusSwitchedGlweCiphertext<u64>| {
            (ciphertext.packed_integers().initial_len() * OUTPUT_BITS.0).div_ceil(8)
        };
        answer.rows.iter().flatten().map(packed).sum()
    }
}
