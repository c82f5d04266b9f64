//! The bits of values that make no whole byte, packed densely.
//!
//! Of a value's bits, 8 at a time stand in byte planes; 2, 4 or 6 are left below, which are packed row by row: the upper 4 of
//! 4 or 6 into a plane of 4 bits, the lower 2 of 2 or 6 into one of 2. A row is cut into groups of 32 columns, the fewest of
//! any tile, and a group's bytes are columns that lie apart: byte `j` of 16 has columns `j` and `16 + j`, byte `j` of 8
//! columns `j`, `8 + j`, `16 + j` and `24 + j`, the first in the lowest bits. So packing is shifting and masking of whole
//! vectors, without moving a byte from its place in them. A last group of fewer columns takes as many bytes as any.
//!
//! Here the bits that are packed come and go as bytes, the lowest limb of values brought to whole bytes, at whose upper end
//! they stand.

use std::ops::Range;

use rayon::prelude::*;

use super::Planes;
use super::lanes::{ColumnTile, column_tiles, prefetch, tiles_of, vectorised};

/// Columns that are packed together.
pub(super) const GROUP: usize = 32;

/// Most byte planes that a value has.
pub(super) const HIGH_PLANES: usize = 6;

/// A run of columns of a row: its byte planes, least significant first, and what is packed of it, whole groups. Planes that
/// there are not are empty.
pub(super) struct Row<'a> {
    pub(super) high: [&'a [u8]; HIGH_PLANES],
    pub(super) fours: &'a [u8],
    pub(super) twos: &'a [u8],
}

/// The same to be written.
pub(super) struct RowMut<'a> {
    pub(super) high: [&'a mut [u8]; HIGH_PLANES],
    pub(super) fours: &'a mut [u8],
    pub(super) twos: &'a mut [u8],
}

/// Rows that a task spreads or packs at least.
const TASK_ROWS: usize = 32;

/// Bytes of a row of the plane of 4 bits and of the plane of 2.
pub(super) const fn short_row_bytes(bits: u32, columns: usize) -> [usize; 2] {
    let (groups, short) = (columns.div_ceil(GROUP), bits as usize % 8);
    [(short / 4) * groups * (GROUP / 2), (short / 2 % 2) * groups * (GROUP / 4)]
}

/// Bytes of a row in all planes together.
pub(super) const fn row_bytes(bits: u32, columns: usize) -> usize {
    let [fours, twos] = short_row_bytes(bits, columns);
    bits as usize / 8 * columns + fours + twos
}

/// Where a column's bits are in a plane of `width` bits: the byte of its row, and the shift.
const fn place(width: usize, column: usize) -> (usize, usize) {
    let (group, at, bytes) = (column / GROUP, column % GROUP, GROUP * width / 8);
    (group * bytes + at % bytes, at / bytes * width)
}

/// The `short` lowest bits of a value.
pub(super) fn get(short: u32, planes: [&[u8]; 2], row: usize, column: usize, columns: usize) -> u8 {
    let [four_row, two_row] = short_row_bytes(short, columns);
    let read = |plane: &[u8], row_bytes: usize, width: usize| {
        let (byte, shift) = place(width, column);
        plane[row * row_bytes + byte] >> shift & ((1 << width) - 1)
    };
    match short {
        2 => read(planes[1], two_row, 2),
        4 => read(planes[0], four_row, 4),
        6 => read(planes[0], four_row, 4) << 2 | read(planes[1], two_row, 2),
        _ => 0,
    }
}

/// Sets the `short` lowest bits of a value.
pub(super) fn set(short: u32, planes: [&mut [u8]; 2], row: usize, column: usize, columns: usize, value: u8) {
    let [four_row, two_row] = short_row_bytes(short, columns);
    let write = |plane: &mut [u8], row_bytes: usize, width: usize, value: u8| {
        let (byte, shift) = place(width, column);
        let (byte, mask) = (&mut plane[row * row_bytes + byte], ((1 << width) - 1) << shift);
        *byte = *byte & !mask | value << shift & mask;
    };
    let [fours, twos] = planes;
    match short {
        2 => write(twos, two_row, 2, value),
        4 => write(fours, four_row, 4, value),
        6 => {
            write(fours, four_row, 4, value >> 2);
            write(twos, two_row, 2, value);
        }
        _ => {}
    }
}

/// Packs the upper 4 bits of some bytes, whole groups of them.
#[inline(always)]
pub(super) fn pack_fours(low: &[u8], fours: &mut [u8]) {
    for (to, from) in fours.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut().zip(low.as_chunks::<GROUP>().0) {
        *to = std::array::from_fn(|j| from[j] >> 4 | from[16 + j] & 0xf0);
    }
}

/// Packs the lowest 2 of the upper `short` bits of some bytes, whole groups of them.
#[inline(always)]
pub(super) fn pack_twos(short: u32, low: &[u8], twos: &mut [u8]) {
    let below = 8 - short;
    for (to, from) in twos.as_chunks_mut::<{ GROUP / 4 }>().0.iter_mut().zip(low.as_chunks::<GROUP>().0) {
        let two = |at: usize| from[at] >> below & 3;
        *to = std::array::from_fn(|j| two(j) | two(8 + j) << 2 | two(16 + j) << 4 | two(24 + j) << 6);
    }
}

/// The bytes whose upper `short` bits were packed, zeros below them: whole groups.
#[inline(always)]
pub(super) fn unpack(short: u32, fours: &[u8], twos: &[u8], low: &mut [u8]) {
    let (groups, _) = low.as_chunks_mut::<GROUP>();
    if short & 4 == 0 {
        groups.as_flattened_mut().fill(0);
    } else {
        for (to, from) in groups.iter_mut().zip(fours.as_chunks::<{ GROUP / 2 }>().0) {
            *to = std::array::from_fn(|at| if at < 16 { from[at] << 4 } else { from[at - 16] & 0xf0 });
        }
    }
    if short & 2 != 0 {
        let below = 8 - short;
        for (to, from) in groups.iter_mut().zip(twos.as_chunks::<{ GROUP / 4 }>().0) {
            *to = std::array::from_fn(|at| to[at] | (from[at % 8] >> (at / 8 * 2) & 3) << below);
        }
    }
}

/// Some columns of planes, all rows and bits of them.
pub(super) struct PlanesTile<'a> {
    bits: u32,
    rows: usize,
    bytes: ColumnTile<'a, u8>,
    fours: Option<ColumnTile<'a, u8>>,
    twos: Option<ColumnTile<'a, u8>>,
}

impl<'a> PlanesTile<'a> {
    /// Cuts planes into disjoint tiles of at most [`super::lanes::TILE`] columns.
    pub(super) fn cut(planes: &'a mut Planes) -> Vec<Self> {
        let (bits, rows, columns) = (planes.bits(), planes.rows(), planes.columns());
        let [bytes, fours, twos] = planes.parts_mut();
        let bytes = column_tiles(bytes, columns, 0..columns);
        let columns: Vec<_> = bytes.iter().map(ColumnTile::columns).collect();
        let mut fours = packed_tiles(4, fours, rows, &columns).into_iter();
        let mut twos = packed_tiles(2, twos, rows, &columns).into_iter();
        bytes.into_iter().map(|bytes| Self { bits, rows, bytes, fours: fours.next(), twos: twos.next() }).collect()
    }

    /// Which columns these are.
    pub(super) fn columns(&self) -> Range<usize> {
        self.bytes.columns()
    }

    /// Fetches a row that will be written soon; nothing where there is no such row.
    #[inline(always)]
    pub(super) fn fetch(&self, row: usize) {
        if row < self.rows {
            (0..self.bits as usize / 8).for_each(|plane| self.bytes.fetch(plane * self.rows + row));
            self.fours.iter().chain(&self.twos).for_each(|tile| tile.fetch(row));
        }
    }

    /// The tile's part of a row.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize) -> RowMut<'_> {
        assert!(row < self.rows);
        let high = self.bytes.rows_mut(row, self.rows, self.bits as usize / 8);
        RowMut {
            high,
            fours: self.fours.as_mut().map_or(&mut [], |tile| tile.row_mut(row)),
            twos: self.twos.as_mut().map_or(&mut [], |tile| tile.row_mut(row)),
        }
    }
}

/// All rows of planes, one behind the other.
pub(super) fn rows_mut(planes: &mut Planes) -> Vec<RowMut<'_>> {
    let (rows, columns) = (planes.rows(), planes.columns());
    let row_bytes = short_row_bytes(planes.bits(), columns);
    let [bytes, fours, twos] = planes.parts_mut();
    // Of a plane that there is not, there are no rows.
    let mut high: Vec<_> =
        bytes.chunks_exact_mut((rows * columns).max(1)).map(|plane| plane.chunks_exact_mut(columns)).collect();
    let mut fours = fours.chunks_exact_mut(row_bytes[0].max(1));
    let mut twos = twos.chunks_exact_mut(row_bytes[1].max(1));
    let row = |_| RowMut {
        high: std::array::from_fn(|plane| high.get_mut(plane).and_then(Iterator::next).unwrap_or_default()),
        fours: fours.next().unwrap_or_default(),
        twos: twos.next().unwrap_or_default(),
    };
    (0..rows).map(row).collect()
}

/// Cuts a plane of `width` bits as columns are cut; into nothing where there is no such plane.
fn packed_tiles<'a>(
    width: usize,
    plane: &'a mut [u8],
    rows: usize,
    columns: &[Range<usize>],
) -> Vec<ColumnTile<'a, u8>> {
    if plane.is_empty() {
        return Vec::new();
    }
    let bytes = |columns: usize| columns.div_ceil(GROUP) * GROUP * width / 8;
    let stride = plane.len() / rows;
    // Tiles begin with a group.
    tiles_of(plane, stride, columns.iter().map(|columns| bytes(columns.start)..bytes(columns.end)))
}

/// The lowest limb of a row's run of columns, which begins with a group: whole groups of bytes.
#[inline(always)]
fn read_low(planes: &Planes, row: usize, first: usize, low: &mut [u8]) {
    let [fours, twos] = runs(planes, row, first, low.len());
    unpack(planes.bits() % 8, fours, twos, low);
}

/// A run of columns of a row, which begins with a group.
#[inline(always)]
pub(super) fn row(planes: &Planes, row: usize, first: usize, columns: usize) -> Row<'_> {
    let (size, start) = (planes.rows() * planes.columns(), row * planes.columns() + first);
    let mut high: [&[u8]; HIGH_PLANES] = [&[]; HIGH_PLANES];
    for (plane, run) in high[..planes.bits() as usize / 8].iter_mut().enumerate() {
        *run = &planes.bytes()[plane * size + start..][..columns];
    }
    let [fours, twos] = runs(planes, row, first, columns.next_multiple_of(GROUP));
    Row { high, fours, twos }
}

/// Fetches what [`row`] gives.
#[inline(always)]
pub(super) fn fetch(planes: &Planes, row: usize, first: usize, columns: usize) {
    let Row { high, fours, twos } = self::row(planes, row, first, columns);
    high.into_iter().chain([fours, twos]).for_each(prefetch);
}

/// Where a row's run of columns is packed: whole groups, in planes of which one may be empty.
#[inline(always)]
fn runs(planes: &Planes, row: usize, first: usize, columns: usize) -> [&[u8]; 2] {
    let row_bytes = short_row_bytes(planes.bits(), planes.columns());
    let [fours, twos] = planes.short_planes();
    let run = |plane: &'_ [u8], row_bytes: usize, width: usize| {
        let start = (row * row_bytes + first * width / 8).min(plane.len());
        start..(start + columns * width / 8).min(plane.len())
    };
    [&fours[run(fours, row_bytes[0], 4)], &twos[run(twos, row_bytes[1], 2)]]
}

impl Planes {
    /// The same values brought to whole bytes, at whose upper end they stand: `2^(8·limbs − bits)` times as large.
    pub fn spread(&self) -> Self {
        let (rows, columns) = (self.rows(), self.columns());
        let mut whole = Self::scratch(self.limbs(), rows, columns);
        if rows * columns == 0 {
            return whole;
        }
        let (low, high) = whole.bytes_mut().split_at_mut(if self.is_whole() { 0 } else { rows * columns });
        let (task, planes) = (TASK_ROWS * columns, &self.bytes()[..high.len()]);
        high.par_chunks_mut(task).zip(planes.par_chunks(task)).for_each(|(to, from)| to.copy_from_slice(from));
        let low = low.par_chunks_mut(columns).enumerate().with_min_len(TASK_ROWS);
        low.for_each(|(row, low)| spread_row(self, row, low));
        whole
    }

    /// Packs values of `bits` bits that stand at the upper end of whole bytes: [`Self::spread`] undone. What is below them is
    /// left out.
    ///
    /// # Panics
    /// If these are not the whole bytes of so many bits.
    pub fn pack(self, bits: u32) -> Self {
        assert!(self.is_whole() && Self::has_width(bits) && self.limbs() == bits.div_ceil(8) as usize);
        let (rows, columns, short) = (self.rows(), self.columns(), bits % 8);
        if short == 0 {
            return self;
        }
        let mut packed = Self::scratch_of_bits(bits, rows, columns);
        if rows * columns == 0 {
            return packed;
        }
        let (low, high) = self.bytes().split_at(rows * columns);
        let [bytes, fours, twos] = packed.parts_mut();
        let task = TASK_ROWS * columns;
        bytes.par_chunks_mut(task).zip(high.par_chunks(task)).for_each(|(to, from)| to.copy_from_slice(from));
        for (plane, width) in [(fours, 4), (twos, 2)] {
            let low = low.par_chunks(columns).with_min_len(TASK_ROWS);
            let row_bytes = (plane.len() / rows).max(1);
            plane.par_chunks_mut(row_bytes).zip(low).for_each(|(to, low)| pack_row(width, short, low, to));
        }
        packed
    }
}

vectorised! {
    /// The lowest limb of a row.
    fn spread_row<>(planes: &Planes, row: usize, low: &mut [u8]) = spread_row_body
}

#[inline(always)]
fn spread_row_body(planes: &Planes, row: usize, low: &mut [u8]) {
    let columns = low.len();
    let (groups, rest) = low.split_at_mut(columns / GROUP * GROUP);
    read_low(planes, row, 0, groups);
    if !rest.is_empty() {
        let mut last = [0; GROUP];
        read_low(planes, row, groups.len(), &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

vectorised! {
    /// Packs `width` bits of the lowest limb of a row.
    fn pack_row<>(width: usize, short: u32, low: &[u8], to: &mut [u8]) = pack_row_body
}

#[inline(always)]
fn pack_row_body(width: usize, short: u32, low: &[u8], to: &mut [u8]) {
    let pack = |low: &[u8], to: &mut [u8]| match width {
        4 => pack_fours(low, to),
        _ => pack_twos(short, low, to),
    };
    let (groups, rest) = low.split_at(low.len() / GROUP * GROUP);
    let (whole, partial) = to.split_at_mut(groups.len() * width / 8);
    pack(groups, whole);
    let mut last = [0; GROUP];
    last[..rest.len()].copy_from_slice(rest);
    pack(&last, partial);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng as _, RngCore as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Every number of bits that values may have.
    fn widths() -> impl Iterator<Item = u32> {
        (8..=48).filter(|&bits| Planes::has_width(bits))
    }

    fn random(bits: u32, rows: usize, columns: usize, seed: u64) -> (Vec<u64>, Planes) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<u64> = (0..rows * columns).map(|_| rng.random_range(0..1 << bits)).collect();
        // What is in a group behind the last column is of earlier use.
        let mut planes = Planes::scratch_of_bits(bits, rows, columns);
        rng.fill_bytes(planes.bytes_mut());
        values.iter().enumerate().for_each(|(at, &value)| planes.set_value(at / columns, at % columns, value));
        (values, planes)
    }

    /// A value read bit by bit, by the module's description alone.
    fn by_description(planes: &Planes, row: usize, column: usize) -> u64 {
        let (bits, rows, columns) = (planes.bits() as usize, planes.rows(), planes.columns());
        let (groups, group, at) = (columns.div_ceil(32), column / 32, column % 32);
        let (high, short) = (bits / 8, bits % 8);
        let fours = high * rows * columns;
        let twos = fours + if short >= 4 { rows * groups * 16 } else { 0 };
        let bytes = planes.bytes();
        let mut value = 0;
        for plane in (0..high).rev() {
            value = value << 8 | u64::from(bytes[(plane * rows + row) * columns + column]);
        }
        if short >= 4 {
            let byte = bytes[fours + (row * groups + group) * 16 + at % 16];
            value = value << 4 | u64::from(if at < 16 { byte & 15 } else { byte >> 4 });
        }
        if short % 4 == 2 {
            let byte = bytes[twos + (row * groups + group) * 8 + at % 8];
            value = value << 2 | u64::from(byte >> (2 * (at / 8)) & 3);
        }
        value
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn values_are_where_the_description_says_and_come_back(
            rows in 1usize..80,
            columns in 1usize..300,
            seed: u64,
        ) {
            for bits in widths() {
                let (values, planes) = random(bits, rows, columns, seed);
                prop_assert_eq!(Some(planes.bytes().len()), Planes::bytes_for(bits, rows, columns));
                let spread = planes.spread();
                prop_assert_eq!((spread.bits(), spread.limbs()), (8 * bits.div_ceil(8), planes.limbs()));
                let up = spread.bits() - bits;
                for (at, &value) in values.iter().enumerate() {
                    let (row, column) = (at / columns, at % columns);
                    prop_assert_eq!(planes.value(row, column), value);
                    prop_assert_eq!(by_description(&planes, row, column), value);
                    prop_assert_eq!(spread.value(row, column), value << up);
                }
                // What is below the bits is left out.
                let mut noisy = spread.clone();
                for (at, &value) in values.iter().enumerate() {
                    noisy.set_value(at / columns, at % columns, value << up | seed & ((1 << up) - 1));
                }
                for packed in [spread.pack(bits), noisy.pack(bits)] {
                    for (at, &value) in values.iter().enumerate() {
                        prop_assert_eq!(packed.value(at / columns, at % columns), value);
                    }
                }
            }
        }

        /// Tiles written one by one make the same planes as values set one by one.
        #[test]
        fn tiles_are_columns_of_the_whole(rows in 1usize..20, columns in 1usize..300, seed: u64) {
            for bits in widths() {
                let (values, _) = random(bits, rows, columns, seed);
                let up = 8 * bits.div_ceil(8) - bits;
                let mut planes = Planes::zeros_of_bits(bits, rows, columns);
                for mut tile in PlanesTile::cut(&mut planes) {
                    let of_tile = tile.columns();
                    for row in 0..rows {
                        let values = &values[row * columns..][of_tile.clone()];
                        let words: Vec<u64> = values.iter().map(|&value| value << up).collect();
                        tile.fetch(row + 1);
                        write_row(bits % 8, tile.row_mut(row), &words);
                    }
                }
                for (at, &value) in values.iter().enumerate() {
                    prop_assert_eq!(planes.value(at / columns, at % columns), value);
                }
                // From any group on, as decryption reads them.
                for first in (0..columns).step_by(GROUP) {
                    fetch(&planes, rows - 1, first, columns - first);
                    let run = row(&planes, rows - 1, first, columns - first);
                    let mut low = vec![7; (columns - first).next_multiple_of(GROUP)];
                    unpack(bits % 8, run.fours, run.twos, &mut low);
                    for (at, &value) in values[(rows - 1) * columns + first..].iter().enumerate() {
                        let high = |plane: usize| u64::from(run.high[plane][at]) << (bits % 8 + 8 * plane as u32);
                        let high: u64 = (0..bits as usize / 8).map(high).sum();
                        prop_assert_eq!(high | u64::from(low[at]) >> (8 - bits % 8), value);
                    }
                }
            }
        }
    }

    /// Writes values that were brought to whole bytes.
    fn write_row(short: u32, row: RowMut<'_>, values: &[u64]) {
        for (plane, bytes) in row.high.into_iter().enumerate() {
            let limb = plane + usize::from(short != 0);
            bytes.iter_mut().zip(values).for_each(|(byte, value)| *byte = (value >> (8 * limb)) as u8);
        }
        let mut low: Vec<u8> = values.iter().map(|&value| value as u8).collect();
        low.resize(values.len().next_multiple_of(GROUP), 0);
        if short & 4 != 0 {
            pack_fours(&low, row.fours);
        }
        if short & 2 != 0 {
            pack_twos(short, &low, row.twos);
        }
    }

    /// Vectors of every width give what plain code gives.
    #[test]
    fn vectors_pack_as_plain_code_does() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for (columns, short) in [1, 31, 32, 33, 576, 1000].into_iter().flat_map(|n| [2, 4, 6].map(|short| (n, short))) {
            let mut low = vec![0; columns];
            rng.fill_bytes(&mut low);
            for width in [4, 2].into_iter().filter(|&width| short & width != 0) {
                let bytes = columns.div_ceil(GROUP) * GROUP * width as usize / 8;
                let mut packed = [vec![0; bytes], vec![0; bytes]];
                pack_row(width as usize, short, &low, &mut packed[0]);
                pack_row_body(width as usize, short, &low, &mut packed[1]);
                assert_eq!(packed[0], packed[1], "{columns} columns, {width} of {short} bits");
            }
        }
    }
}
