//! Every kernel against a product in 128-bit integers.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use protocol::he::{Planes, ProductTile};
use protocol::ids::{Direction, LinearShape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::digits::Quads;
use super::lines::Line;
use super::micro::{Micro, checked_lines};
use super::product::Cpu;
use super::weights::{HALF, PANEL};
use super::{Kernel, MAX_LIMBS, PackedLinear, Product, ProductError, Rows, answer_columns};

/// A block like those of VNNI and AMX with their instruction in plain Rust: what is around the instruction is tested
/// on every CPU.
struct ByteDots<const LANES: usize>;

impl<const LANES: usize> Micro for ByteDots<LANES> {
    type Encoding = Quads;
    const LANES: usize = LANES;
    const COLUMNS: usize = PANEL;
    const INNER_BLOCKS: usize = 5;

    fn prepare<'a>(&self, packed: &'a [Line], _half: usize, _scratch: &'a mut Vec<Line>) -> &'a [Line] {
        packed
    }

    fn multiply(&self, digits: &[Line], weights: &[Line], rows: usize, sums: &mut [Line]) {
        checked_lines::<Self>(digits, weights, sums);
        sums[..2 * rows].fill(Line::ZERO);
        for (digits, weights) in digits.chunks_exact(LANES).zip(weights.chunks_exact(PANEL)) {
            for (digits, sums) in digits[..rows].iter().zip(sums.chunks_exact_mut(2)) {
                for (index, line) in weights.iter().enumerate() {
                    let (half, quad) = (index / HALF, index % HALF);
                    for (sum, weights) in sums[half].0.iter_mut().zip(line.0) {
                        let pairs = digits.0[quad].to_le_bytes().into_iter().zip(weights.to_le_bytes());
                        let dot = pairs.map(|(limb, weight)| i32::from(limb) * i32::from(weight as i8)).sum::<i32>();
                        *sum = sum.wrapping_add(dot as u32);
                    }
                }
            }
        }
    }
}

/// All kernels of this machine, and those that can be imitated on it.
fn kernels() -> Vec<Arc<dyn Kernel>> {
    let mut kernels = super::kernels();
    kernels.push(Arc::new(Cpu::new("12 byte dots", ByteDots::<12>)));
    kernels.push(Arc::new(Cpu::new("32 byte dots", ByteDots::<32>)));
    kernels
}

/// How the random bytes of a case are drawn.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Uniform,
    /// Bytes and weights of the largest magnitude, where accumulators overflow first.
    Extreme,
}

/// Operands of one product.
struct Case {
    shape: LinearShape,
    direction: Direction,
    weights: Vec<i8>,
    packed: PackedLinear,
    /// The rows, as a body; the same values are multiplied as a mask.
    rows: Planes,
    output_bits: u32,
}

impl Case {
    fn random(
        shape: LinearShape,
        direction: Direction,
        rows: usize,
        (limbs, output_bits): (usize, u32),
        fill: Fill,
        seed: u64,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let weights: Vec<i8> = (0..shape.d_in * shape.d_out)
            .map(|_| match fill {
                Fill::Uniform => rng.random(),
                Fill::Extreme => [-128, -127, 127][rng.random_range(0..3)],
            })
            .collect();
        let (inner, _) = shape.along(direction);
        let bytes = (0..limbs * rows * inner)
            .map(|_| match fill {
                Fill::Uniform => rng.random(),
                Fill::Extreme => [0xff, 0x80, 0x7f, 0x00][rng.random_range(0..4)],
            })
            .collect();
        let packed = PackedLinear::new(shape, &weights).unwrap();
        let rows = Planes::from_bytes(limbs, rows, inner, bytes).unwrap();
        Self { shape, direction, weights, packed, rows, output_bits }
    }

    /// The rows in the order of a keystream.
    fn keystream(&self) -> Vec<u8> {
        let (limbs, rows, inner) = (self.rows.limbs(), self.rows.rows(), self.rows.columns());
        let mut bytes = Vec::with_capacity(limbs * rows * inner);
        for feature in 0..inner {
            for limb in 0..limbs {
                bytes.extend((0..rows).map(|row| self.rows.plane(limb)[row * inner + feature]));
            }
        }
        bytes
    }

    fn product<'a>(&'a self, rows: Rows<'a>) -> Product<'a> {
        let weights = self.packed.along(self.direction);
        Product { weights, limbs: self.rows.limbs(), output_bits: self.output_bits, rows }
    }

    /// Bytes in which an output value has room.
    fn output_limbs(&self) -> usize {
        self.output_bits.div_ceil(8) as usize
    }

    /// The whole output, from the definition.
    fn expected(&self) -> Planes {
        let (inner, outer) = self.shape.along(self.direction);
        let bits = 8 * self.rows.limbs() as u32;
        let dropped = bits - self.output_bits;
        let up = 8 * self.output_limbs() as u32 - self.output_bits;
        let values: Vec<u64> =
            (0..self.rows.rows() * inner).map(|index| self.rows.value(index / inner, index % inner)).collect();
        let mut output = Planes::zeros(self.output_limbs(), self.rows.rows(), outer);
        for row in 0..self.rows.rows() {
            for j in 0..outer {
                let weight = |i: usize| match self.direction {
                    Direction::Forward => self.weights[i * self.shape.d_out + j],
                    Direction::Backward => self.weights[j * self.shape.d_out + i],
                };
                let sum: i128 = (0..inner).map(|i| i128::from(values[row * inner + i]) * i128::from(weight(i))).sum();
                let value = sum.rem_euclid(1 << bits);
                let rounded = if dropped == 0 { value } else { (value + (1 << (dropped - 1))) >> dropped };
                output.set_value(row, j, ((rounded % (1 << self.output_bits)) << up) as u64);
            }
        }
        output
    }

    fn run(&self, kernel: &dyn Kernel, rows: Rows<'_>) -> Planes {
        let (_, outer) = self.shape.along(self.direction);
        let tiles = Mutex::new(Vec::new());
        kernel
            .multiply(&self.product(rows), answer_columns(rows.count(), outer), &|tile| {
                tiles.lock().unwrap().push(tile);
                ControlFlow::Continue(())
            })
            .unwrap();
        let mut tiles = tiles.into_inner().unwrap();
        tiles.sort_by_key(|tile: &ProductTile| tile.first_column);
        let mut whole = Planes::zeros(self.output_limbs(), rows.count(), outer);
        let mut next = 0;
        for ProductTile { first_column, rows: tile } in tiles {
            assert_eq!(first_column, next, "tiles cover the columns once");
            assert_eq!((tile.bits(), tile.rows()), (8 * self.output_limbs() as u32, rows.count()));
            next += tile.columns();
            for (row, column) in (0..tile.rows()).flat_map(|row| (0..tile.columns()).map(move |column| (row, column))) {
                whole.set_value(row, first_column + column, tile.value(row, column));
            }
        }
        assert_eq!(next, outer);
        whole
    }

    /// Checks all values that every kernel computes, of a body and of a mask.
    fn check(&self) {
        let expected = self.expected();
        let keystream = self.keystream();
        for kernel in kernels() {
            let body = self.run(kernel.as_ref(), Rows::Body(&self.rows));
            assert!(body == expected, "{} multiplies the body", kernel.name());
            let masks = Rows::Masks { keystream: &keystream, rows: self.rows.rows() };
            assert!(self.run(kernel.as_ref(), masks) == expected, "{} multiplies the mask", kernel.name());
        }
    }
}

/// Bytes of a value, and bits of an output value.
fn widths() -> impl Strategy<Value = (usize, u32)> {
    (1..=MAX_LIMBS).prop_flat_map(|limbs| (Just(limbs), (4..=4 * limbs as u32).prop_map(|bits| 2 * bits)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_kernel_matches_the_definition(
        d_in in 1usize..200,
        d_out in 1usize..150,
        rows in 0usize..80,
        widths in widths(),
        backward: bool,
        extreme: bool,
        seed: u64,
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        let fill = if extreme { Fill::Extreme } else { Fill::Uniform };
        Case::random(LinearShape { d_in, d_out }, direction, rows, widths, fill, seed).check();
    }
}

/// As many as have a way of their own, or just not; in one pass and in several; by one thread and by several.
#[test]
fn every_kernel_multiplies_few_rows_right() {
    for (shape, seed) in [((576, 96), 1), ((1700, 40), 2), ((1100, 1001), 3)] {
        let shape = LinearShape { d_in: shape.0, d_out: shape.1 };
        for (rows, widths) in [(1, (3, 12)), (2, (3, 16)), (3, (4, 24)), (5, (3, 10)), (1, (1, 8)), (2, (6, 32))] {
            Case::random(shape, Direction::Forward, rows, widths, Fill::Extreme, seed).check();
        }
    }
}

/// More rows than a task, more columns than a strip.
#[test]
fn every_kernel_cuts_large_products_right() {
    for (limbs, seed) in [(3, 1), (6, 2)] {
        let shape = LinearShape { d_in: 70, d_out: 301 };
        Case::random(shape, Direction::Forward, 229, (limbs, 12), Fill::Uniform, seed).check();
    }
}

/// Inner dimensions of several passes, where accumulators would overflow if they were not read out.
#[test]
fn every_kernel_is_exact_over_long_inner_dimensions() {
    for limbs in 1..=MAX_LIMBS {
        let shape = LinearShape { d_in: 4133, d_out: 33 };
        Case::random(shape, Direction::Forward, 5, (limbs, 8 * limbs as u32), Fill::Extreme, 7).check();
    }
}

/// All weights and digits at the bound at once: the largest sums that there can be.
#[test]
fn the_largest_sums_do_not_wrap() {
    for (limbs, value) in [(6, 0x80_00_u64), (6, 0xffff_ffff_ffff), (5, 0x7f_8000_7fff), (4, 0x8000_8000)] {
        let shape = LinearShape { d_in: 2100, d_out: 17 };
        let mut case = Case::random(shape, Direction::Forward, 3, (limbs, 8 * limbs as u32), Fill::Uniform, 1);
        case.weights.fill(-128);
        case.packed = PackedLinear::new(shape, &case.weights).unwrap();
        for (row, feature) in (0..3).flat_map(|row| (0..shape.d_in).map(move |feature| (row, feature))) {
            case.rows.set_value(row, feature, value);
        }
        case.check();
    }
}

/// A buffer that was used for something larger is used again.
#[test]
fn what_a_buffer_held_before_does_not_matter() {
    let large = Case::random(LinearShape { d_in: 300, d_out: 64 }, Direction::Forward, 90, (4, 24), Fill::Extreme, 4);
    let small = Case::random(LinearShape { d_in: 65, d_out: 33 }, Direction::Forward, 7, (3, 10), Fill::Uniform, 5);
    for kernel in kernels() {
        for case in [&large, &small, &large] {
            let body = case.run(kernel.as_ref(), Rows::Body(&case.rows));
            assert!(body == case.expected(), "{}", kernel.name());
        }
    }
}

#[test]
fn the_peak_is_above_the_speed() {
    for kernel in super::kernels() {
        let speed = super::measure_speed(kernel.as_ref()) * kernel.operations(3) as f64;
        assert!(speed > 0.0);
        if let Some(peak) = kernel.peak_ops() {
            // Other tests may hold the processors back while one of the two is measured.
            assert!(peak.is_finite() && 10.0 * peak > speed, "{}: {speed} of {peak}", kernel.name());
        }
    }
}

#[test]
fn a_sink_that_breaks_off_stops_the_product() {
    let shape = LinearShape { d_in: 64, d_out: 4096 };
    let case = Case::random(shape, Direction::Forward, 3, (3, 16), Fill::Uniform, 3);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for kernel in kernels() {
        let calls = Mutex::new(0);
        pool.install(|| {
            kernel.multiply(&case.product(Rows::Body(&case.rows)), 64, &|_| {
                *calls.lock().unwrap() += 1;
                ControlFlow::Break(())
            })
        })
        .unwrap();
        assert_eq!(*calls.lock().unwrap(), 1);
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let shape = LinearShape { d_in: 20, d_out: 10 };
    let case = Case::random(shape, Direction::Forward, 2, (3, 16), Fill::Uniform, 3);
    let keystream = case.keystream();
    let masks = |bytes| Rows::Masks { keystream: &keystream[bytes..], rows: 2 };
    let silent = |_: ProductTile| panic!("no tile may come from refused operands");
    for kernel in kernels() {
        let error = |product: Product<'_>| kernel.multiply(&product, 64, &silent).unwrap_err();
        assert!(matches!(error(case.product(masks(1))), ProductError::Masks { inner: 20, rows: 2, .. }));
        let backward = case.packed.along(Direction::Backward);
        let turned = Product { weights: backward, ..case.product(masks(0)) };
        assert!(matches!(error(turned), ProductError::Masks { inner: 10, .. }));
        let turned = Product { weights: backward, ..case.product(Rows::Body(&case.rows)) };
        assert!(matches!(error(turned), ProductError::Body { inner: 10, columns: 20, .. }));
        let body = Planes::zeros(4, 2, 20);
        let other = case.product(Rows::Body(&body));
        assert!(matches!(error(other), ProductError::Body { body_bits: 32, limbs: 3, .. }));
        let huge = Product { rows: Rows::Masks { keystream: &keystream, rows: usize::MAX }, ..case.product(masks(0)) };
        assert!(matches!(error(huge), ProductError::Masks { .. }));
        let packed = Planes::zeros_of_bits(22, 2, 20);
        let other = case.product(Rows::Body(&packed));
        assert!(
            matches!(error(other), ProductError::Body { body_bits: 22, limbs: 3, .. }),
            "it has to be spread first"
        );
        for (limbs, output_bits) in [(0, 0), (3, 0), (3, 32), (7, 16), (3, 6), (3, 11)] {
            let product = Product { limbs, output_bits, ..case.product(masks(0)) };
            assert_eq!(error(product), ProductError::Bits { limbs, output_bits });
        }
    }
    assert!(PackedLinear::new(shape, &case.weights[1..]).is_none());
}
