//! The kernels' source on the processor against the portable kernel and the protocol's masks, byte for byte.
//!
//! This is no GPU: the instructions of `kernels/ptx.cuh` are replaced. Everything else is the source that a GPU runs.
#![allow(clippy::unwrap_used)]

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;

use proptest::prelude::*;
use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskSeed, ParameterSet, Planes};
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::geometry::{self, Launch, padded_outer, pitch};
use super::host::{Argument, Host};
use crate::matmul::{MAX_LIMBS, PackedLinear, Product, Rows, kernels};

/// Bytes of largest magnitude, where sums are largest.
const EXTREME_BYTES: [u8; 4] = [0xff, 0x80, 0x7f, 0x00];
const EXTREME_WEIGHTS: [i8; 3] = [-128, -127, 127];

/// Operands of a product, as they lie on a device.
struct Case {
    limbs: usize,
    row_count: usize,
    inner: usize,
    outer: usize,
    /// `limbs × row_count × inner`.
    body: Planes,
    /// `[limb][row][pitch]`, with anything behind the inner dimension.
    rows: Vec<u8>,
    /// `inner × outer`.
    values: Vec<i8>,
    /// `[padded outer][pitch]`.
    weights: Vec<u8>,
    seed: u64,
}

impl Case {
    fn random((limbs, row_count, inner, outer): (usize, usize, usize, usize), extreme: bool, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut byte = |choice: &[u8]| if extreme { choice[rng.random_range(0..choice.len())] } else { rng.random() };
        let extreme_weights = EXTREME_WEIGHTS.map(|weight| weight as u8);
        let values: Vec<i8> = (0..inner * outer).map(|_| byte(&extreme_weights) as i8).collect();
        let rows: Vec<u8> = (0..limbs * row_count * pitch(inner)).map(|_| byte(&EXTREME_BYTES)).collect();
        let bytes = rows.chunks_exact(pitch(inner)).flat_map(|row| &row[..inner]).copied().collect();
        let body = Planes::from_bytes(limbs, row_count, inner, bytes).unwrap();
        let mut weights = vec![0; padded_outer(outer) * pitch(inner)];
        for (j, line) in weights.chunks_exact_mut(pitch(inner)).take(outer).enumerate() {
            line.iter_mut().enumerate().take(inner).for_each(|(i, to)| *to = values[i * outer + j] as u8);
        }
        Self { limbs, row_count, inner, outer, body, rows, values, weights, seed }
    }

    fn weights(&self, columns: &Range<usize>) -> &[u8] {
        // Not a byte behind the columns: tests see whether more is read.
        &self.weights[columns.start * pitch(self.inner)..columns.end * pitch(self.inner)]
    }

    /// `[output limb][row][column]` of some columns, by the portable kernel.
    fn expected(&self, columns: &Range<usize>, output_bits: u32) -> Vec<u8> {
        let shape = LinearShape { d_in: self.inner, d_out: self.outer };
        let packed = PackedLinear::new(shape, &self.values).unwrap();
        let product = Product {
            weights: packed.along(Direction::Forward),
            limbs: self.limbs,
            output_bits,
            rows: Rows::Body(&self.body),
        };
        let kernels = kernels();
        let portable = kernels.last().unwrap();
        assert_eq!(portable.name(), "portable");
        let whole = Mutex::new(Planes::zeros(output_limbs(output_bits), self.row_count, self.outer));
        portable
            .multiply(&product, self.outer, &|tile| {
                let mut whole = whole.lock().unwrap();
                for row in 0..tile.rows.rows() {
                    for column in 0..tile.rows.columns() {
                        whole.set_value(row, tile.first_column + column, tile.rows.value(row, column));
                    }
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        let whole = whole.into_inner().unwrap();
        whole.bytes().chunks_exact(self.outer).flat_map(|row| &row[columns.clone()]).copied().collect()
    }

    /// The fused product of some columns, and that of compute capability 9.0.
    fn fused(&self, host: &mut Host, columns: &Range<usize>, output_bits: u32) -> [Vec<u8>; 2] {
        let launch = geometry::product(self.limbs, self.row_count, columns.len());
        let hopper = geometry::hopper_product(self.limbs, self.row_count, columns.len());
        [("velum_product_l", launch), ("velum_hopper_product_l", hopper)]
            .map(|(kernel, launch)| self.launched(host, kernel, &launch, columns, output_bits))
    }

    fn launched(
        &self,
        host: &mut Host,
        kernel: &str,
        launch: &Launch,
        columns: &Range<usize>,
        output_bits: u32,
    ) -> Vec<u8> {
        let mut out = vec![0x5a; output_limbs(output_bits) * self.row_count * columns.len()];
        let mut arguments = [
            Argument::Input(&self.rows),
            number(self.row_count),
            number(pitch(self.inner)),
            Argument::Input(self.weights(columns)),
            number(columns.len()),
            Argument::Buffer(&mut out),
            Argument::Number(output_bits),
        ];
        host.launch(&format!("{kernel}{}", self.limbs), launch, self.seed, &mut arguments);
        out
    }

    /// The same by a library's product of biased bytes, which is computed here.
    fn biased(&self, host: &mut Host, columns: &Range<usize>, output_bits: u32) -> Vec<u8> {
        let pitch = pitch(self.inner);
        let mut rows = self.rows.clone();
        let vectors = (rows.len() / 16) as u64;
        let mut arguments = [Argument::Buffer(&mut rows), Argument::Value(vectors.to_ne_bytes().to_vec())];
        host.launch("velum_bias", &geometry::bias(vectors), self.seed, &mut arguments);

        let weights = self.weights(columns);
        let mut sums = vec![0x5a; 4 * columns.len()];
        let mut arguments =
            [Argument::Input(weights), number(pitch), number(columns.len()), Argument::Buffer(&mut sums)];
        host.launch("velum_column_sums", &geometry::column_sums(columns.len()), self.seed, &mut arguments);

        let products: Vec<u8> = rows
            .chunks_exact(pitch)
            .flat_map(|row| weights.chunks_exact(pitch).map(move |line| dot(row, line)))
            .flat_map(i32::to_ne_bytes)
            .collect();
        let mut out = vec![0x5a; output_limbs(output_bits) * self.row_count * columns.len()];
        let mut arguments = [
            Argument::Input(&products),
            Argument::Input(&sums),
            number(self.row_count),
            number(columns.len()),
            Argument::Buffer(&mut out),
            Argument::Number(output_bits),
        ];
        let launch = geometry::finish(self.row_count, columns.len());
        host.launch(&format!("velum_finish_l{}", self.limbs), &launch, self.seed, &mut arguments);
        out
    }
}

fn number(value: usize) -> Argument<'static> {
    Argument::Number(value.try_into().unwrap())
}

fn dot(signed: &[u8], weights: &[u8]) -> i32 {
    signed.iter().zip(weights).map(|(&byte, &weight)| i32::from(byte as i8) * i32::from(weight as i8)).sum()
}

/// Bytes in which an output value has room.
fn output_limbs(output_bits: u32) -> usize {
    output_bits.div_ceil(8) as usize
}

/// Values of 1 to [`MAX_LIMBS`] bytes and output bits of them.
fn widths() -> impl Strategy<Value = (usize, u32)> {
    (1..=MAX_LIMBS).prop_flat_map(|limbs| (Just(limbs), (4..=4 * limbs as u32).prop_map(|bits| 2 * bits)))
}

#[test]
fn launches_fit_the_source() {
    let mut numbers = vec![0u8; (6 * 4 * 2 + 6) * 4];
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], shared_bytes: 0 };
    Host::start().launch("constants", &launch, 0, &mut [Argument::Buffer(&mut numbers)]);
    let numbers: Vec<usize> =
        numbers.chunks_exact(4).map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap()) as usize).collect();
    let (tiles, numbers) = numbers.split_at(6 * 4 * 2);
    let (all, hopper) = tiles.split_at(6 * 4);
    for limbs in 1..=MAX_LIMBS {
        let expected = |tile: geometry::Tile| [tile.rows, tile.columns, tile.threads, tile.shared_bytes];
        let range = 4 * (limbs - 1)..4 * limbs;
        assert_eq!(all[range.clone()], expected(geometry::tile(limbs)), "{limbs}");
        assert_eq!(hopper[range], expected(geometry::hopper_tile(limbs)), "{limbs}");
    }
    let (features, rows) = (numbers[0], numbers[1]);
    let launch = geometry::expand_masks(10 * features, 7 * rows, 3);
    assert_eq!((launch.block[0] as usize, launch.grid), (features, [21, 10, 1]));
    let (threads, columns) = (numbers[2], numbers[3]);
    let launch = geometry::finish(3, 5 * threads * columns);
    assert_eq!((launch.block[0] as usize, launch.grid), (threads, [5, 3, 1]));
    assert_eq!(geometry::bias(1).block[0] as usize, threads);
    assert_eq!(geometry::column_sums(5 * threads / 32).grid, [5, 1, 1]);
    assert_eq!(geometry::column_sums(1).block[0] as usize, threads);
    let (launch, operations) = geometry::register_loop(3);
    assert_eq!(launch.block[0] as usize, numbers[4]);
    assert_eq!(operations, u64::from(launch.grid[0]) * (numbers[4] / 32 * numbers[5] * 2 * 16 * 8 * 32) as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20, ..ProptestConfig::with_cases(64) })]

    /// Both ways to multiply, on shapes of a few tiles, with columns that begin and end anywhere.
    #[test]
    fn products_are_those_of_the_portable_kernel(
        (limbs, output_bits) in widths(),
        row_tiles in 0.0..2.2f64,
        inner in 1usize..800,
        outer in 1usize..300,
        aligned: bool,
        first in 0.0..0.5f64,
        extreme: bool,
        seed: u64,
    ) {
        let row_count = 1 + (row_tiles * geometry::tile(limbs).rows as f64) as usize;
        let outer = if aligned { outer.next_multiple_of(16) } else { outer };
        let first = (first * outer as f64) as usize;
        let columns = if aligned { first / 16 * 16 } else { first }..outer;
        let case = Case::random((limbs, row_count, inner, outer), extreme, seed);
        let expected = case.expected(&columns, output_bits);
        let mut host = Host::start();
        let [fused, hopper] = case.fused(&mut host, &columns, output_bits);
        prop_assert!(fused == expected, "the fused product");
        prop_assert!(hopper == expected, "the fused product of compute capability 9.0");
        prop_assert!(case.biased(&mut host, &columns, output_bits) == expected, "the product of biased bytes");
    }

    /// Masks of all sets, from any feature on.
    #[test]
    fn masks_are_the_protocols(
        set in prop::sample::select(ParameterSet::ALL.to_vec()),
        first_feature in 0usize..20_000,
        features in 1usize..200,
        layer: u16,
        group in prop::sample::select([&Group::ALL[..], &[Group::Head]].concat()),
        backward: bool,
        key: [u8; 32],
        seed: u64,
    ) {
        let direction = if backward { Direction::Backward } else { Direction::Forward };
        let domain = MaskDomain { set, product: LinearId { layer, group }.along(direction) };
        let (limbs, rows) = (set.limbs(), set.mask_rows());
        let mut planes = vec![0x5a; limbs * rows * pitch(features)];
        let stream = [&key[..], &domain.nonce(), &(first_feature as u32).to_le_bytes()].concat();
        let mut arguments = [
            Argument::Buffer(&mut planes),
            Argument::Value(stream),
            number(features),
            number(rows),
            number(limbs),
            number(pitch(features)),
        ];
        let launch = geometry::expand_masks(features, rows, limbs);
        Host::start().launch("velum_expand_masks", &launch, seed, &mut arguments);

        let mut keystream = vec![0; features * domain.column_bytes()];
        let columns = first_feature..first_feature + features;
        expand(&MaskSeed::from_bytes(key), &domain, columns, &mut keystream);
        for (row, line) in planes.chunks_exact(pitch(features)).enumerate() {
            let column = keystream.iter().skip(row).step_by(domain.column_bytes());
            prop_assert!(line[..features].iter().eq(column));
            prop_assert!(line[features..].iter().all(|&byte| byte == 0));
        }
    }
}

/// More tiles than a band of the raster, and the last band not whole.
#[test]
fn every_tile_of_a_band_is_computed_once() {
    for (limbs, output_bits, seed) in [(6, 32, 1), (3, 16, 2), (3, 10, 3)] {
        let tile = geometry::tile(limbs);
        let case = Case::random((limbs, 9 * tile.rows + 5, 70, 2 * tile.columns + 1), false, seed);
        let columns = 0..case.outer;
        let expected = case.expected(&columns, output_bits);
        let [fused, hopper] = case.fused(&mut Host::start(), &columns, output_bits);
        assert!(fused == expected && hopper == expected, "{limbs}");
    }
}

/// One value: everything else of a tile is repeated and dropped.
#[test]
fn the_smallest_product_is_right() {
    for limbs in 1..=MAX_LIMBS {
        let case = Case::random((limbs, 1, 1, 1), true, limbs as u64);
        let expected = case.expected(&(0..1), 8 * limbs as u32);
        let mut host = Host::start();
        let [fused, hopper] = case.fused(&mut host, &(0..1), 8 * limbs as u32);
        assert!(fused == expected && hopper == expected, "{limbs}");
        assert!(case.biased(&mut host, &(0..1), 8 * limbs as u32) == expected, "{limbs}");
    }
}

/// Weights and bytes all of the largest magnitude, as long as sums of more than four limbs may be.
#[test]
fn the_largest_sums_are_exact() {
    let mut host = Host::start();
    for (limbs, byte, weight) in [(6, 0xff, -128), (5, 0xff, 127), (4, 0xff, -128), (6, 0x00, -128)] {
        let inner = geometry::MAX_INNER;
        let mut case = Case::random((limbs, 1, inner, 1), false, 3);
        case.values.fill(weight);
        case.weights[..inner].fill(weight as u8);
        case.rows.fill(byte);
        case.body.bytes_mut().fill(byte);
        let expected = case.expected(&(0..1), 8 * limbs as u32);
        assert!(case.biased(&mut host, &(0..1), 8 * limbs as u32) == expected, "{limbs}");
        if byte != 0 && limbs == 6 {
            let [fused, hopper] = case.fused(&mut host, &(0..1), 8 * limbs as u32);
            assert!(fused == expected && hopper == expected, "{limbs}");
        }
    }
}

/// The sum of all entries of `A·B`, for the operands that the loop's comment tells.
#[test]
fn the_register_loop_multiplies_what_it_says() {
    const PASSES: u32 = 3;
    let (launch, _) = geometry::register_loop(1);
    let mut out = vec![0; 4];
    let mut arguments = [Argument::Buffer(&mut out), Argument::Number(PASSES)];
    Host::start().launch("velum_register_loop", &launch, 1, &mut arguments);

    let word = |number: u32| (number + 1).wrapping_mul(2_654_435_761);
    let mut expected = 0i32;
    for warp in 0..launch.block[0] / 32 {
        // Sums over the rows of A and the columns of B, for each inner index.
        let (mut rows, mut columns) = ([0i32; 32], [0i32; 32]);
        for lane in 0..32u32 {
            for register in 0..6 {
                let bytes = word((warp * 32 + lane) * 6 + register).to_le_bytes();
                for (i, byte) in bytes.into_iter().enumerate() {
                    let inner = 4 * (lane % 4) as usize + i;
                    match register {
                        0 | 1 => rows[inner] += i32::from(byte),
                        2 | 3 => rows[inner + 16] += i32::from(byte),
                        _ => columns[inner + 16 * (register as usize - 4)] += i32::from(byte as i8),
                    }
                }
            }
        }
        let product = rows.iter().zip(columns).map(|(row, column)| row * column).fold(0, i32::wrapping_add);
        expected = expected.wrapping_add(product.wrapping_mul(16 * PASSES as i32));
    }
    expected = expected.wrapping_mul(launch.grid[0] as i32);
    assert_eq!(i32::from_ne_bytes(out.try_into().unwrap()), expected);
}
