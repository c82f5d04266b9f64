//! Every kernel against a product in 128-bit integers.
#![allow(clippy::unwrap_used)]

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use protocol::he::{ParameterSet, Planes, Precision, ProductTile};
use protocol::model::{Direction, LinearShape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::digits::Quads;
use super::micro::{Micro, checked_steps, interleave};
use super::product::Cpu;
use super::{Kernel, PackedLinear, PackedMatrix, Product, ProductError, tile_columns};

/// The block of the VNNI kernel with its instruction in plain Rust: what is around the instruction is tested on every
/// CPU.
struct ByteDots;

impl Micro for ByteDots {
    type Encoding = Quads;
    const LANES: usize = 12;
    const COLUMNS: usize = 32;

    fn prepare(&self, weights: &PackedMatrix, panel: usize, quads: Range<usize>, words: &mut [u32]) {
        interleave(weights, panel, quads, words);
    }

    fn multiply(&self, digits: &[u32], weights: &[u32], sums: &mut [i32]) {
        checked_steps::<Self>(digits, weights, sums);
        sums.fill(0);
        for (digits, weights) in digits.chunks_exact(Self::LANES).zip(weights.chunks_exact(Self::COLUMNS)) {
            for (digit, sums) in digits.iter().zip(sums.chunks_exact_mut(Self::COLUMNS)) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    let pairs = digit.to_le_bytes().into_iter().zip(weight.to_le_bytes());
                    *sum += pairs.map(|(limb, weight)| i32::from(limb) * i32::from(weight as i8)).sum::<i32>();
                }
            }
        }
    }
}

/// All kernels of this machine, and those that can be imitated on it.
fn kernels() -> Vec<Arc<dyn Kernel>> {
    let mut kernels = super::kernels();
    kernels.push(Arc::new(Cpu { name: "byte dots", micro: ByteDots }));
    kernels
}

/// Operands of one product.
struct Case {
    shape: LinearShape,
    weights: Vec<i8>,
    mask: Vec<u8>,
    body: Planes,
    precision: Precision,
    direction: Direction,
}

/// How the random bytes of a case are drawn.
#[derive(Clone, Copy, Debug)]
enum Fill {
    Uniform,
    /// Bytes and weights of the largest magnitude, where accumulators overflow first.
    Extreme,
}

impl Case {
    fn random(
        shape: LinearShape,
        tokens: usize,
        precision: Precision,
        direction: Direction,
        fill: Fill,
        seed: u64,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut byte = || match fill {
            Fill::Uniform => rng.random(),
            Fill::Extreme => [0xff, 0x80, 0x7f, 0x00][rng.random_range(0..4)],
        };
        let (inner, _) = shape.along(direction);
        let set = precision.set;
        let mask = (0..inner * set.limbs() * set.mask_rows()).map(|_| byte()).collect();
        let body = (0..set.limbs() * tokens * inner).map(|_| byte()).collect();
        let weights = (0..shape.d_in * shape.d_out)
            .map(|_| match fill {
                Fill::Uniform => rng.random(),
                Fill::Extreme => [-128, -127, 127][rng.random_range(0..3)],
            })
            .collect();
        let body = Planes::from_bytes(set.limbs(), tokens, inner, body).unwrap();
        Self { shape, weights, mask, body, precision, direction }
    }

    fn mask_value(&self, row: usize, feature: usize) -> u64 {
        let set = self.precision.set;
        (0..set.limbs())
            .map(|l| u64::from(self.mask[(feature * set.limbs() + l) * set.mask_rows() + row]) << (8 * l))
            .sum()
    }

    /// One output value, from the definition.
    fn expected(&self, column: usize, operand: impl Fn(usize) -> u64) -> u64 {
        let (inner, _) = self.shape.along(self.direction);
        let sum: i128 = (0..inner)
            .map(|i| {
                let weight = match self.direction {
                    Direction::Forward => self.weights[i * self.shape.d_out + column],
                    Direction::Backward => self.weights[column * self.shape.d_out + i],
                };
                i128::from(operand(i)) * i128::from(weight)
            })
            .sum();
        let value = sum.rem_euclid(1 << self.precision.set.modulus_bits());
        let dropped = self.precision.dropped_bits();
        let rounded = if dropped == 0 { value } else { (value + (1 << (dropped - 1))) >> dropped };
        (rounded % (1 << (8 * u32::from(self.precision.output_limbs)))) as u64
    }

    fn run(&self, kernel: &dyn Kernel) -> Vec<ProductTile> {
        let packed = PackedLinear::new(self.shape, &self.weights).unwrap();
        let weights = packed.along(self.direction);
        let tiles = Mutex::new(Vec::new());
        let product = Product { precision: self.precision, weights, mask: &self.mask, body: &self.body };
        kernel
            .multiply(&product, tile_columns(weights.outer()), &|tile| {
                tiles.lock().unwrap().push(tile);
                ControlFlow::Continue(())
            })
            .unwrap();
        let mut tiles = tiles.into_inner().unwrap();
        tiles.sort_by_key(|tile| tile.first_column);
        tiles
    }

    /// Checks every body value, and the mask values of `mask_rows`.
    fn check(&self, kernel: &dyn Kernel, mask_rows: &[usize]) {
        let (_, outer) = self.shape.along(self.direction);
        let mut next = 0;
        for tile in self.run(kernel) {
            assert_eq!(tile.first_column, next, "tiles cover the columns once");
            assert_eq!(tile.mask.columns(), tile.body.columns());
            assert_eq!(tile.mask.rows(), self.precision.set.mask_rows());
            assert_eq!(tile.body.rows(), self.body.rows());
            next += tile.body.columns();
            for column in 0..tile.body.columns() {
                let j = tile.first_column + column;
                for row in 0..self.body.rows() {
                    let expected = self.expected(j, |i| self.body.value(row, i));
                    assert_eq!(tile.body.value(row, column), expected, "{} body ({row}, {j})", kernel.name());
                }
                for &row in mask_rows {
                    let expected = self.expected(j, |i| self.mask_value(row, i));
                    assert_eq!(tile.mask.value(row, column), expected, "{} mask ({row}, {j})", kernel.name());
                }
            }
        }
        assert_eq!(next, outer);
    }
}

fn precisions() -> impl Strategy<Value = Precision> {
    prop::sample::select(ParameterSet::ALL.to_vec())
        .prop_flat_map(|set| (1..=set.limbs() as u8).prop_map(move |output_limbs| Precision { set, output_limbs }))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_match_the_definition(
        d_in in 1usize..150,
        d_out in 1usize..150,
        tokens in 1usize..12,
        precision in precisions(),
        backward: bool,
        extreme: bool,
        seed: u64,
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        let fill = if extreme { Fill::Extreme } else { Fill::Uniform };
        let case = Case::random(LinearShape { d_in, d_out }, tokens, precision, direction, fill, seed);
        let last = precision.set.mask_rows() - 1;
        for kernel in kernels() {
            case.check(kernel.as_ref(), &[0, 191, 192, last]);
        }
    }
}

/// Inner dimensions beyond one cache block, where P48's accumulators would overflow if they were not read out.
#[test]
fn long_inner_dimensions_are_exact() {
    for set in ParameterSet::ALL {
        let shape = LinearShape { d_in: 4133, d_out: 33 };
        let precision = Precision { set, output_limbs: set.limbs() as u8 };
        let case = Case::random(shape, 5, precision, Direction::Forward, Fill::Extreme, 7);
        for kernel in kernels() {
            case.check(kernel.as_ref(), &[0, set.mask_rows() - 1]);
        }
    }
}

/// All weights and digits at the bound at once: the largest sums that there can be.
#[test]
fn the_largest_sums_do_not_wrap() {
    for (set, body) in
        [(ParameterSet::P48, 0x80_00_u64), (ParameterSet::P48, 0xffff_ffff_ffff), (ParameterSet::P32, 0x8000_8000)]
    {
        let shape = LinearShape { d_in: 2100, d_out: 17 };
        let precision = Precision { set, output_limbs: set.limbs() as u8 };
        let mut case = Case::random(shape, 3, precision, Direction::Forward, Fill::Uniform, 1);
        case.weights.fill(-128);
        for (row, feature) in (0..3).flat_map(|row| (0..shape.d_in).map(move |feature| (row, feature))) {
            case.body.set_value(row, feature, body);
        }
        for kernel in kernels() {
            case.check(kernel.as_ref(), &[]);
        }
    }
}

#[test]
fn a_sink_that_breaks_off_stops_the_product() {
    let shape = LinearShape { d_in: 64, d_out: 4096 };
    let precision = Precision::standard(ParameterSet::P24);
    let case = Case::random(shape, 1, precision, Direction::Forward, Fill::Uniform, 3);
    let packed = PackedLinear::new(shape, &case.weights).unwrap();
    let product = Product { precision, weights: packed.along(Direction::Forward), mask: &case.mask, body: &case.body };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for kernel in kernels() {
        let calls = Mutex::new(0);
        pool.install(|| {
            kernel.multiply(&product, 64, &|_| {
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
    let precision = Precision::standard(ParameterSet::P24);
    let case = Case::random(shape, 2, precision, Direction::Forward, Fill::Uniform, 3);
    let packed = PackedLinear::new(shape, &case.weights).unwrap();
    let forward = packed.along(Direction::Forward);
    let good = || Product { precision, weights: forward, mask: &case.mask, body: &case.body };
    let silent = |_: ProductTile| panic!("no tile may come from refused operands");
    for kernel in kernels() {
        let error = |product: Product<'_>| kernel.multiply(&product, 64, &silent).unwrap_err();
        let short = Product { mask: &case.mask[1..], ..good() };
        assert!(matches!(error(short), ProductError::Mask { inner: 20, .. }));
        let turned = Product { weights: packed.along(Direction::Backward), ..good() };
        assert!(matches!(error(turned), ProductError::Mask { inner: 10, .. }));
        let body = Planes::zeros(4, 2, 20);
        assert!(matches!(error(Product { body: &body, ..good() }), ProductError::Body { limbs: 4, .. }));
        let none = Precision { output_limbs: 0, ..precision };
        assert_eq!(error(Product { precision: none, ..good() }), ProductError::Precision(none));
    }
    assert!(PackedLinear::new(shape, &case.weights[1..]).is_none());
}
