//! Rows of a tile, between words and planes: what encryption and decryption do to every value beside the transforms.
//!
//! Each is some twenty operations on sixteen values where the processor has wide vectors, which compilers do not find by
//! themselves: rounding `κ·x` to a word, cutting words into bytes, packing their lowest bits, and the way back. Here is what
//! the vectors have to agree with, and what runs where there are none or where columns are left over; [`x86`] has the vectors.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::packing::{self, GROUP, Row, RowMut};
use super::word::Word;
use super::{Planes, Precision};

/// A word whose rows may have vectors of their own.
pub(super) trait RowWord: Word {
    /// [`Encode::row`] for the first groups of columns: how many columns were done, and the bits of the largest magnitude.
    #[inline(always)]
    fn encode_groups(_: &Encode, _step: f64, _words: &[Self], _input: &[f32], _row: &mut RowMut<'_>) -> (usize, u32) {
        (0, 0)
    }

    /// [`Decode::row`] for the first groups of columns: how many columns were done.
    #[inline(always)]
    fn decode_groups(_: &Decode, _unit: f64, _row: &Row<'_>, _products: &[Self], _out: &mut [f32]) -> usize {
        0
    }
}

impl RowWord for u64 {}

impl RowWord for u32 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn encode_groups(encode: &Encode, step: f64, words: &[u32], input: &[f32], row: &mut RowMut<'_>) -> (usize, u32) {
        x86::encode(encode, step, words, input, row)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn decode_groups(decode: &Decode, unit: f64, row: &Row<'_>, products: &[u32], out: &mut [f32]) -> usize {
        x86::decode(decode, unit, row, products, out)
    }
}

/// How a row is encoded: `(b + round(κ·x) + half) >> (8·dropped_bytes)`, of which all bytes but the lowest are byte planes
/// where `short` is not 0, and the `short` upper bits of the lowest are packed. Mod the word size: bits above the modulus
/// stay above what is written, and what is below its bits is not written.
#[derive(Clone, Copy)]
pub(super) struct Encode {
    /// Half of what is rounded off.
    pub(super) half: u64,
    /// Bits of the bytes that are dropped.
    pub(super) shift: u32,
    /// Bits that are packed: 0, 2, 4 or 6.
    pub(super) short: u32,
    /// Byte planes.
    pub(super) planes: usize,
}

impl Encode {
    /// For a body of this precision.
    pub(super) fn of(precision: Precision) -> Self {
        let (bits, dropped) = (u32::from(precision.body_bits), precision.body_dropped_bits());
        Self { half: (1 << dropped) >> 1, shift: dropped / 8 * 8, short: bits % 8, planes: bits as usize / 8 }
    }

    /// Encodes `input` by κ = `step` on top of `words`, as many of each, and writes what comes of it. Returns the bits of the largest
    /// magnitude of the input: infinity is above all numbers there, and NaN above infinity.
    #[inline(always)]
    pub(super) fn row<W: RowWord>(&self, step: f64, words: &[W], input: &[f32], row: &mut RowMut<'_>) -> u32 {
        assert_eq!(words.len(), input.len());
        let (done, mut largest) = W::encode_groups(self, step, words, input, row);
        for (at, (words, input)) in words[done..].chunks(GROUP).zip(input[done..].chunks(GROUP)).enumerate() {
            let start = done + at * GROUP;
            let mut low = [0; GROUP];
            for (column, (&word, &x)) in words.iter().zip(input).enumerate() {
                largest = largest.max(x.to_bits() & (u32::MAX >> 1));
                let value = word.add(W::rounded(f64::from(x) * step)).add_shift(self.half, self.shift);
                low[column] = value.limb(0);
                for (plane, bytes) in row.high[..self.planes].iter_mut().enumerate() {
                    bytes[start + column] = value.limb(plane + usize::from(self.short != 0));
                }
            }
            if self.short & 4 != 0 {
                packing::pack_fours(&low, &mut row.fours[start / 2..][..GROUP / 2]);
            }
            if self.short & 2 != 0 {
                packing::pack_twos(self.short, &low, &mut row.twos[start / 4..][..GROUP / 4]);
            }
        }
        largest
    }
}

/// How a row is decoded: body less mask product, each brought to `bits`, centred, times a unit.
#[derive(Clone, Copy)]
pub(super) struct Decode {
    /// Bits of a value in which both fit.
    pub(super) bits: u32,
    /// Shifts that bring a value of the body and of the mask product to these.
    pub(super) shifts: (u32, u32),
    /// Bits that are packed: 0, 2, 4 or 6.
    pub(super) short: u32,
    /// Byte planes.
    pub(super) planes: usize,
}

impl Decode {
    /// For a tile of an answer, `bits` and `shifts` as the fields say.
    pub(super) fn of(tile: &Planes, bits: u32, shifts: (u32, u32)) -> Self {
        Self { bits, shifts, short: tile.bits() % 8, planes: tile.bits() as usize / 8 }
    }

    /// Decodes a row, one unit of whose values is worth `unit`, beside the mask products of its columns, as many as `out` has.
    #[inline(always)]
    pub(super) fn row<W: RowWord>(&self, unit: f64, row: Row<'_>, products: &[W], out: &mut [f32]) {
        assert_eq!(products.len(), out.len());
        let done = W::decode_groups(self, unit, &row, products, out);
        for (at, (products, out)) in products[done..].chunks(GROUP).zip(out[done..].chunks_mut(GROUP)).enumerate() {
            let start = done + at * GROUP;
            let mut low = [0; GROUP];
            if self.short != 0 {
                let run = |plane: &'_ [u8], bytes: usize| (start / GROUP * bytes).min(plane.len())..plane.len();
                let (fours, twos) = (&row.fours[run(row.fours, GROUP / 2)], &row.twos[run(row.twos, GROUP / 4)]);
                packing::unpack(self.short, fours, twos, &mut low);
            }
            for (column, (&product, out)) in products.iter().zip(out).enumerate() {
                let mut body = W::of_limb(low[column], 0);
                for (plane, bytes) in row.high[..self.planes].iter().enumerate() {
                    body = body.add(W::of_limb(bytes[start + column], plane + usize::from(self.short != 0)));
                }
                let phase = body.shifted_up(self.shifts.0).sub(product.shifted_up(self.shifts.1));
                *out = (phase.centred(self.bits) * unit) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::he::packing::HIGH_PLANES;

    /// Words of 64 bits have no vectors: what they give is the definition.
    fn encoded<W: RowWord>(encode: Encode, step: f64, words: &[W], input: &[f32]) -> (u32, Vec<Vec<u8>>) {
        let groups = words.len().div_ceil(GROUP);
        let short = |bit: u32, bytes: usize| vec![0xaa_u8; if encode.short & bit == 0 { 0 } else { groups * bytes }];
        let mut high = vec![vec![0; words.len()]; HIGH_PLANES];
        let (mut fours, mut twos) = (short(4, GROUP / 2), short(2, GROUP / 4));
        let mut planes = high.iter_mut();
        let mut row = RowMut {
            high: std::array::from_fn(|_| planes.next().expect("six planes").as_mut_slice()),
            fours: &mut fours,
            twos: &mut twos,
        };
        let largest = encode.row(step, words, input, &mut row);
        high.extend([fours, twos]);
        (largest, high)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn vectors_encode_as_the_definition_does(
            columns in 1usize..140,
            bits in (4u32..=16).prop_map(|half| 2 * half),
            step in 0.0f64..3e5,
            seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (modulus, short) = (if bits > 24 { 32 } else { 24 }, bits % 8);
            let dropped = modulus - bits;
            let encode =
                Encode { half: (1 << dropped) >> 1, shift: dropped / 8 * 8, short, planes: bits as usize / 8 };
            let words: Vec<u32> = (0..columns).map(|_| rng.random()).collect();
            let wide: Vec<u64> = words.iter().map(|&word| word.into()).collect();
            let input: Vec<f32> = (0..columns).map(|_| rng.random_range(-9.0..9.0)).collect();
            prop_assert_eq!(encoded(encode, step, &words, &input), encoded(encode, step, &wide, &input));
        }

        #[test]
        fn vectors_decode_as_the_definition_does(
            columns in 1usize..140,
            body_bits in (4u32..=16).prop_map(|half| 2 * half),
            mask_limbs in 1u32..=4,
            unit in -1e-3f64..1e-3,
            seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let whole = 8 * body_bits.div_ceil(8);
            let bits = whole.max(8 * mask_limbs);
            let (short, planes) = (body_bits % 8, body_bits as usize / 8);
            let decode = Decode { bits, shifts: (bits - whole, bits - 8 * mask_limbs), short, planes };
            let mut bytes = |count: usize| (0..count).map(|_| rng.random()).collect::<Vec<u8>>();
            let groups = columns.div_ceil(GROUP);
            let (high, packed) = (bytes(HIGH_PLANES * columns), [bytes(groups * GROUP / 2), bytes(groups * GROUP / 4)]);
            let row = || Row {
                high: std::array::from_fn(|plane| &high[plane * columns..][..columns]),
                fours: if short & 4 == 0 { &[] } else { &packed[0] },
                twos: if short & 2 == 0 { &[] } else { &packed[1] },
            };
            let products: Vec<u32> = (0..columns).map(|_| rng.random()).collect();
            let wide: Vec<u64> = products.iter().map(|&word| word.into()).collect();
            let mut found = [vec![f32::NAN; columns], vec![f32::NAN; columns]];
            decode.row(unit, row(), &products, &mut found[0]);
            decode.row(unit, row(), &wide, &mut found[1]);
            let [found, expected] = found.map(|row| row.into_iter().map(f32::to_bits).collect::<Vec<_>>());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_largest_magnitude_is_found_and_nothing_is_above_what_is_no_number() {
        let mut input = [1.0_f32; 70];
        for at in [3, 40, 69] {
            input[at] = -8.0;
            let encode = Encode { half: 0, shift: 0, short: 0, planes: 3 };
            assert_eq!(encoded(encode, 1.0, &[0_u32; 70], &input).0, 8.0_f32.to_bits());
            input[at] = f32::NAN;
            assert!(f32::from_bits(encoded(encode, 1.0, &[0_u32; 70], &input).0).is_nan());
            input[at] = 1.0;
        }
    }
}
