//! The check of mask products: exact, modulo q.
//!
//! `A' = A·W mod q` is right if and only if it is in every entry, and for secret ternary columns `r` with `v = W·r`,
//! `A'·r = A·v mod q`. A row of `A'` with any entry wrong by `δ ≠ 0 mod q` passes a column with probability at most ½:
//! whatever the other entries are, `δ·r_j` has to be one residue, and of `r_j`, which is 0 with ½ and 1 or −1 with ¼ each,
//! that is met at most so often, `δ = q/2` included, for which 1 and −1 are the same. 48 columns: 2^-48.
//!
//! It needs all bytes of `A'`: what the owner keeps of them it rounds off itself, afterwards.
//!
//! Cost: `48·n` multiply-adds for each feature that goes in and each that comes out, once a run, and the keystream of the
//! masks.

use rayon::prelude::*;
use zeroize::Zeroizing;

use super::project::Weights;
use super::{COLUMNS, MASK_COLUMNS};
use crate::he::{MaskColumns, MaskDomain, MaskProduct, MaskSeed, SecretRng, UnverifiedMasks, vectorised};

/// Groups of sixteen columns.
const GROUPS: usize = MASK_COLUMNS / COLUMNS;

/// Columns of masks, or of their product, that a thread takes at a time.
const AT_A_TIME: usize = 16;

/// Fewest columns that are worth a task: each has sums of its own, which have to be added up.
const FEWEST: usize = 128;

/// Coefficients of a sum in which they are added up at a time: those of a vector register.
const LANES: usize = 8;

/// Columns of the check that share what is loaded of the masks.
const SHARING: usize = 12;

/// The secret columns `r` of one matrix in one direction, and `v`.
pub struct MaskCheck {
    outer: usize,
    /// `r` is drawn from it whenever it is used, since it would take a fifth as much memory as `v`.
    key: Zeroizing<[u8; 32]>,
    /// `v = W·r`, `[inner][column]`.
    products: Zeroizing<Vec<[i32; MASK_COLUMNS]>>,
}

/// A product of masks that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not the product of the masks by this matrix")]
pub struct ForgedMasks;

impl MaskCheck {
    /// Fresh secret columns for a matrix.
    pub(super) fn draw(weights: &Weights<'_>, rng: &mut SecretRng) -> Self {
        let (_, outer) = weights.dimensions();
        let mut key = Zeroizing::new([0; 32]);
        rng.fill(key.as_mut());
        let columns = ternary(&key, outer);
        let groups: [Zeroizing<Vec<[i8; COLUMNS]>>; GROUPS] = std::array::from_fn(|group| {
            let part = |column: &[i8; MASK_COLUMNS]| std::array::from_fn(|c| column[group * COLUMNS + c]);
            Zeroizing::new(columns.iter().map(part).collect())
        });
        let groups: [&[[i8; COLUMNS]]; GROUPS] = std::array::from_fn(|group| &groups[group][..]);
        let products = weights.times(groups, |sums| Products(integers(sums.as_flattened())));
        let products = products.into_iter().map(|Products(products)| products).collect::<Vec<_>>();
        Self { outer, key, products: products.into() }
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&self.products[..])
    }

    /// Accepts what came as the product of the masks of `seed` and `domain`, and keeps `limbs` bytes of a value.
    ///
    /// # Errors
    /// When it is not that product.
    ///
    /// # Panics
    /// If it is not of this matrix's columns, or does not have all bytes, which whoever asks for all of them for the right
    /// matrix cannot bring about; or if `limbs` are none, or more than there are.
    pub fn verify(
        &self,
        masks: UnverifiedMasks,
        seed: &MaskSeed,
        domain: &MaskDomain,
        limbs: u8,
    ) -> Result<MaskProduct, ForgedMasks> {
        let precision = masks.precision();
        assert!(usize::from(precision.mask_limbs) == domain.set.limbs() && precision.set == domain.set);
        assert_eq!(masks.outer(), self.outer, "the product of this matrix");
        let right = match domain.set.limbs() {
            0..=4 => self.agrees::<u32>(&masks, seed, domain),
            _ => self.agrees::<u64>(&masks, seed, domain),
        };
        if right { Ok(masks.accept(limbs)) } else { Err(ForgedMasks) }
    }

    /// Whether `A·v − A'·r` is 0 mod q.
    fn agrees<W: Residue>(&self, masks: &UnverifiedMasks, seed: &MaskSeed, domain: &MaskDomain) -> bool {
        let (rows, bytes) = (domain.set.mask_rows(), domain.column_bytes());
        let secret = ternary(&self.key, self.outer);
        let of_masks = |first: usize, columns: &[[i32; MASK_COLUMNS]]| {
            let mut keystream = MaskColumns::from(seed, domain, first);
            let mut column = vec![0; bytes];
            combine::<W>(rows, columns, |_, words| {
                keystream.write(&mut column);
                load::<W>(&column, words);
            })
        };
        let of_product = |first: usize, columns: &[[i8; MASK_COLUMNS]]| {
            let negative: Zeroizing<Vec<_>> =
                Zeroizing::new(columns.iter().map(|column| column.map(|r| -i32::from(r))).collect());
            combine::<W>(rows, &negative, |at, words| load::<W>(masks.column(first + at), words))
        };
        let fair = |count: usize| count.div_ceil(2 * rayon::current_num_threads()).max(FEWEST);
        let (inner_task, outer_task) = (fair(self.products.len()), fair(self.outer));
        let a = self.products.par_chunks(inner_task).enumerate().map(|(task, part)| of_masks(task * inner_task, part));
        let b = secret.par_chunks(outer_task).enumerate().map(|(task, part)| of_product(task * outer_task, part));
        let sum = a.chain(b).reduce(
            || vec![W::default(); rows * MASK_COLUMNS],
            |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a = a.plus(b));
                a
            },
        );
        let modulus = 8 * domain.set.limbs() as u32;
        // Over all of them, so that the time does not tell which.
        sum.into_iter().fold(W::default(), |any, value| any.or(value.low(modulus))) == W::default()
    }
}

/// `v` of one feature: arrays of 48 have no default of their own.
#[derive(Clone, Copy)]
struct Products([i32; MASK_COLUMNS]);

impl Default for Products {
    fn default() -> Self {
        Self([0; MASK_COLUMNS])
    }
}

/// Whole numbers below 2^31.
fn integers(sums: &[f64]) -> [i32; MASK_COLUMNS] {
    std::array::from_fn(|c| sums[c] as i32)
}

/// Independent entries: 0 with probability ½, 1 and −1 with ¼ each.
fn ternary(key: &[u8; 32], count: usize) -> Zeroizing<Vec<[i8; MASK_COLUMNS]>> {
    let mut columns = Zeroizing::new(vec![[0_i8; MASK_COLUMNS]; count]);
    let mut bits = Zeroizing::new(vec![0_u8; count * MASK_COLUMNS / 4]);
    SecretRng::from_key(key).fill(&mut bits);
    let pairs = bits.iter().flat_map(|&byte| [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6]);
    // The difference of two bits.
    columns.as_flattened_mut().iter_mut().zip(pairs).for_each(|(entry, pair)| {
        *entry = (pair & 1) as i8 - (pair >> 1) as i8;
    });
    columns
}

/// `Σ_i column_i·coefficients_i`, `[column of the check][row]`, where `load` gives the words of column `i`.
fn combine<W: Residue>(
    rows: usize,
    coefficients: &[[i32; MASK_COLUMNS]],
    mut load: impl FnMut(usize, &mut [W]),
) -> Vec<W> {
    let mut sums = vec![W::default(); MASK_COLUMNS * rows];
    let mut words = vec![W::default(); AT_A_TIME * rows];
    for (part, coefficients) in coefficients.chunks(AT_A_TIME).enumerate() {
        for (at, words) in words.chunks_exact_mut(rows).take(coefficients.len()).enumerate() {
            load(part * AT_A_TIME + at, words);
        }
        add_up::<W>(rows, &words, coefficients, &mut sums);
    }
    sums
}

vectorised! {
    /// Words of a column of bytes, `[limb][row]`.
    fn load<W: Residue>(bytes: &[u8], words: &mut [W]) = W::load
}

/// Adds some columns, `[column][row]`, times their coefficients to the sums. For AVX2 alone: a product of words is two
/// instructions on vectors of any width, and compiled for AVX-512 the sums leave their registers.
fn add_up<W: Residue>(rows: usize, words: &[W], coefficients: &[[i32; MASK_COLUMNS]], sums: &mut [W]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<W: Residue>(rows: usize, words: &[W], coefficients: &[[i32; MASK_COLUMNS]], sums: &mut [W]) {
            add_up_body(rows, words, coefficients, sums);
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the function needs AVX2, which was just detected.
            return unsafe { wide(rows, words, coefficients, sums) };
        }
    }
    add_up_body(rows, words, coefficients, sums);
}

#[inline(always)]
fn add_up_body<W: Residue>(rows: usize, words: &[W], coefficients: &[[i32; MASK_COLUMNS]], sums: &mut [W]) {
    for row in (0..rows).step_by(LANES) {
        for first in (0..MASK_COLUMNS).step_by(SHARING) {
            let mut sum = [[W::default(); LANES]; SHARING];
            for (at, coefficients) in coefficients.iter().enumerate() {
                let words = &words[at * rows + row..][..LANES];
                let coefficients = &coefficients[first..first + SHARING];
                for (sum, &coefficient) in sum.iter_mut().zip(coefficients) {
                    let coefficient = W::of(coefficient);
                    for (sum, &word) in sum.iter_mut().zip(words) {
                        *sum = sum.plus(word.times(coefficient));
                    }
                }
            }
            for (at, sum) in sum.iter().enumerate() {
                let total = &mut sums[(first + at) * rows + row..][..LANES];
                total.iter_mut().zip(sum).for_each(|(total, &sum)| *total = total.plus(sum));
            }
        }
    }
}

/// A word whose arithmetic wraps, and so is right mod any smaller power of two.
trait Residue: Copy + Default + PartialEq + Send + Sync {
    fn of(coefficient: i32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    /// The low `bits`.
    fn low(self, bits: u32) -> Self;
    /// Words of a column of bytes, `[limb][row]`.
    fn load(bytes: &[u8], words: &mut [Self]);
}

macro_rules! residue {
    ($word:ty) => {
        impl Residue for $word {
            #[inline(always)]
            fn of(coefficient: i32) -> Self {
                coefficient as Self
            }

            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }

            fn or(self, other: Self) -> Self {
                self | other
            }

            fn low(self, bits: u32) -> Self {
                self << (Self::BITS - bits)
            }

            #[inline(always)]
            fn load(bytes: &[u8], words: &mut [Self]) {
                words.fill(0);
                for (limb, plane) in bytes.chunks_exact(words.len()).enumerate() {
                    words.iter_mut().zip(plane).for_each(|(word, &byte)| *word |= Self::from(byte) << (8 * limb));
                }
            }
        }
    };
}

residue!(u32);
residue!(u64);
