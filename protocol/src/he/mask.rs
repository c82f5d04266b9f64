//! Public masks: ChaCha8 keystream, byte for byte the same at the owner, on a worker's processor and on its GPU.
//!
//! Masks keep no secret: everybody knows the seed. What the encryption needs of them is that a lattice made of them is no
//! easier than one of uniform masks, for which any generator without bias will do whose structure lattices know nothing of.
//! So 8 rounds are plenty: without the key, the best distinguishers that were published reach 7, and here a key is given
//! away that nothing hangs on. Secrets and errors come from elsewhere, at full strength.
//!
//! Key: the 32-byte seed. Nonce (IETF, 12 bytes): parameter set (0, 1, 2), direction (0 forward, 1 backward), group
//! (0 to 3 in the order of [`Group::ALL`], 4 of the head), 0, layer as 16-bit little endian, six zeros. The counter begins at 0. With
//! `n = kN` and `L` limbs, keystream byte `(i·L + l)·n + r` is limb `l` of the mask element in row `r` (coefficient
//! `t` of component `c` for `r = c·N + t`) and column `i`: a column is `L·n` contiguous bytes, a multiple of the
//! 64-byte ChaCha block.

use std::ops::Range;

use chacha20::ChaCha8;
use cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use rand::CryptoRng;
use rayon::prelude::*;

use super::lanes::{ColumnTile, column_tiles, transpose_bytes, vectorised};
use super::{ParameterSet, Planes};
use crate::ids::{Direction, Group, ProductId};

/// Public seed of the masks of one owner's run: the same masks serve every call, each block of which has its own secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskSeed([u8; 32]);

impl MaskSeed {
    /// A fresh seed.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The seed that travelled in a header.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes that travel.
    pub const fn to_bytes(self) -> [u8; 32] {
        self.0
    }
}

/// What a mask is for: two products never share one, even under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskDomain {
    /// Parameters, which fix the layout of the bytes.
    pub set: ParameterSet,
    /// The matrix, and which way it is multiplied.
    pub product: ProductId,
}

impl MaskDomain {
    /// The 12-byte nonce.
    pub fn nonce(self) -> [u8; 12] {
        let set = match self.set {
            ParameterSet::P24 => 0,
            ParameterSet::P32 => 1,
            ParameterSet::P48 => 2,
        };
        let direction = match self.product.direction {
            Direction::Forward => 0,
            Direction::Backward => 1,
        };
        let group = match self.product.linear.group {
            Group::Qkv => 0,
            Group::O => 1,
            Group::GateUp => 2,
            Group::Down => 3,
            Group::Head => 4,
        };
        let [low, high] = self.product.linear.layer.to_le_bytes();
        [set, direction, group, 0, low, high, 0, 0, 0, 0, 0, 0]
    }

    /// Bytes of one mask column, `L·n`.
    pub const fn column_bytes(self) -> usize {
        self.set.limbs() * self.set.mask_rows()
    }
}

/// The keystream from some column on, column by column.
pub(crate) struct MaskColumns {
    cipher: ChaCha8,
}

impl MaskColumns {
    /// The keystream from column `first` on.
    pub(crate) fn from(seed: &MaskSeed, domain: &MaskDomain, first: usize) -> Self {
        let mut cipher = ChaCha8::new(&seed.0.into(), &domain.nonce().into());
        cipher.seek(first as u64 * domain.column_bytes() as u64);
        Self { cipher }
    }

    /// Writes as many columns as `out` has room for, `[column][limb][row]`.
    pub(crate) fn write(&mut self, out: &mut [u8]) {
        self.cipher.write_keystream(out);
    }
}

/// Writes the keystream of `columns`, `[column][limb][row]`.
///
/// Panics if `out` does not have `columns.len() · domain.column_bytes()` bytes, or past the end of the keystream
/// (2^38 bytes, more than 20 million columns).
pub fn expand(seed: &MaskSeed, domain: &MaskDomain, columns: Range<usize>, out: &mut [u8]) {
    assert_eq!(out.len(), columns.len() * domain.column_bytes());
    MaskColumns::from(seed, domain, columns.start).write(out);
}

/// The masks of `columns` as the left operand of the product, `L × n × columns`.
pub fn expand_planes(seed: &MaskSeed, domain: &MaskDomain, columns: Range<usize>) -> Planes {
    let (limbs, rows, width) = (domain.set.limbs(), domain.set.mask_rows(), columns.len());
    let mut planes = Planes::zeros(limbs, rows, width);
    if width == 0 {
        return planes;
    }
    column_tiles(planes.bytes_mut(), width, 0..width).into_par_iter().for_each_init(Vec::new, |keystream, tile| {
        let tile_columns = tile.columns();
        keystream.resize(tile_columns.len() * domain.column_bytes(), 0);
        expand(seed, domain, columns.start + tile_columns.start..columns.start + tile_columns.end, keystream);
        transpose_keystream(keystream, domain.column_bytes(), tile);
    });
    planes
}

vectorised! {
    /// `[column][limb·row]` to `[limb·row][column]`.
    fn transpose_keystream<>(keystream: &[u8], column_bytes: usize, tile: ColumnTile<'_, u8>) = transpose_keystream_body
}

#[inline(always)]
fn transpose_keystream_body(keystream: &[u8], column_bytes: usize, mut tile: ColumnTile<'_, u8>) {
    let width = tile.columns().len();
    for row in (0..column_bytes).step_by(8) {
        for column in (0..width).step_by(8) {
            let count = (width - column).min(8);
            let mut block = [0u64; 8];
            for (lane, word) in block.iter_mut().enumerate().take(count) {
                let start = (column + lane) * column_bytes + row;
                let bytes: [u8; 8] = std::array::from_fn(|i| keystream[start + i]);
                *word = u64::from_le_bytes(bytes);
            }
            transpose_bytes(&mut block);
            for (i, word) in block.iter().enumerate() {
                let bytes = word.to_le_bytes();
                let out = &mut tile.row_mut(row + i)[column..column + count];
                match <&mut [u8; 8]>::try_from(&mut *out) {
                    Ok(out) => *out = bytes,
                    Err(_) => out.copy_from_slice(&bytes[..count]),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngCore as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::ids::LinearId;

    fn domain(set: ParameterSet) -> MaskDomain {
        MaskDomain { set, product: LinearId { layer: 0x0102, group: Group::GateUp }.along(Direction::Backward) }
    }

    /// First 32 bytes of some mask columns under the seed 00 01 … 1f: computed by a plain Python transcription of
    /// RFC 8439 with 8 rounds, which was first checked, with 20, against the RFC's own block (section 2.3.2), and with 8
    /// against the first block of draft-strombergson-chacha-test-vectors-01 for a key and nonce of zeros.
    const VECTORS: [(ParameterSet, usize, &str); 9] = [
        (ParameterSet::P24, 0, "07b7054d4806ee8ad0f510316b9b4b5c7ca8766780381f66e5c4efd1f4946c48"),
        (ParameterSet::P24, 5, "4d16c9a4fbe9274d56452fa6e6dfdcca63251f570ca5882072539a825b82f068"),
        (ParameterSet::P24, 14335, "b14c07ef52c58ab5f7f7f9b8985ece4fed866f3709e4234660567f4c2cb14a93"),
        (ParameterSet::P32, 0, "e2a86d051912abebf06f67913aec844112bdb765f4302418ddcc3b099ffb5d8c"),
        (ParameterSet::P32, 5, "a024b28cc5636d93a80782a2b84eebd461cd9408577a359011f545fac841cc5e"),
        (ParameterSet::P32, 14335, "6a390fdb193e2e67dfa814ddb523ab31c3c6045f13376095090f9ad3e6699e36"),
        (ParameterSet::P48, 0, "6b611c6690edb788e11c17510b34e9204891038d4479e4224159fb336e43fd74"),
        (ParameterSet::P48, 5, "6c7902fc2985983f1d61fc48d2b73e1401b0d5108ca5def7ee5722bf7f74aa89"),
        (ParameterSet::P48, 14335, "47fb611ea3aa765a04675ce3c294771d40cd40882c6234637eb2b67709acfaf3"),
    ];

    #[test]
    fn keystream_is_the_one_of_an_independent_implementation() {
        let seed = MaskSeed::from_bytes(std::array::from_fn(|i| i as u8));
        for (set, column, head) in VECTORS {
            let domain = domain(set);
            let mut bytes = vec![0; domain.column_bytes()];
            expand(&seed, &domain, column..column + 1, &mut bytes);
            let hex: String = bytes[..32].iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, head, "{set} column {column}");
        }
    }

    /// The keystream as rand_chacha has it, which has another layout of counter and nonce and shares no code with the
    /// cipher: its counter of 64 bits holds ours and the nonce's first word, its stream the other two.
    fn by_another_library(seed: &MaskSeed, domain: &MaskDomain, column: usize) -> Vec<u8> {
        let nonce = domain.nonce();
        let word = |at: usize| u64::from(u32::from_le_bytes([nonce[at], nonce[at + 1], nonce[at + 2], nonce[at + 3]]));
        let block = (column * domain.column_bytes() / 64) as u64;
        let mut rng = ChaCha8Rng::from_seed(seed.to_bytes());
        rng.set_stream(word(4) | word(8) << 32);
        rng.set_word_pos(16 * u128::from(block | word(0) << 32));
        let mut bytes = vec![0; domain.column_bytes()];
        rng.fill_bytes(&mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn masks_are_those_of_another_library(seed: [u8; 32], column in 0usize..60_000, layer: u16, backward: bool) {
            let seed = MaskSeed::from_bytes(seed);
            let direction = if backward { Direction::Backward } else { Direction::Forward };
            for (set, group) in ParameterSet::ALL.into_iter().flat_map(|set| Group::ALL.map(|group| (set, group))) {
                let domain = MaskDomain { set, product: LinearId { layer, group }.along(direction) };
                let mut bytes = vec![0; domain.column_bytes()];
                expand(&seed, &domain, column..column + 1, &mut bytes);
                prop_assert!(bytes == by_another_library(&seed, &domain, column));
            }
        }

        #[test]
        fn columns_can_be_expanded_in_any_pieces(seed: [u8; 32], start in 0usize..40, count in 0usize..70) {
            let seed = MaskSeed::from_bytes(seed);
            for set in ParameterSet::ALL {
                let domain = domain(set);
                let size = domain.column_bytes();
                let mut whole = vec![0; (start + count) * size];
                expand(&seed, &domain, 0..start + count, &mut whole);
                let mut part = vec![1; count * size];
                expand(&seed, &domain, start..start + count, &mut part);
                prop_assert!(part == whole[start * size..]);

                let planes = expand_planes(&seed, &domain, start..start + count);
                let rows = set.mask_rows();
                for column in 0..count {
                    for limb in 0..set.limbs() {
                        for row in (0..rows).step_by(37).chain([rows - 1]) {
                            prop_assert_eq!(
                                planes.plane(limb)[row * count + column],
                                part[(column * set.limbs() + limb) * rows + row]
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_two_domains_share_a_nonce() {
        let mut seen = std::collections::HashSet::new();
        for set in ParameterSet::ALL {
            for group in Group::ALL.into_iter().chain([Group::Head]) {
                for layer in [0, 1, 255, 256, u16::MAX] {
                    for direction in [Direction::Forward, Direction::Backward] {
                        let linear = LinearId { layer, group };
                        assert!(seen.insert(MaskDomain { set, product: linear.along(direction) }.nonce()));
                    }
                }
            }
        }
    }
}
