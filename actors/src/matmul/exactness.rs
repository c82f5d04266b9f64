//! Whether a device gives the portable kernel's bytes: the definition of a right product, as cases that can be repeated.
//!
//! All of it is arithmetic mod q, so there is nothing between right and wrong. A device proves itself on a few cases at
//! its start; `node bench exactness` goes on with random ones.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::he::mask::expand_planes;
use protocol::he::{MaskDomain, MaskSeed, ParameterSet, Planes, ProductTile};
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::{Device, DeviceError, MAX_LIMBS, Multiplicand, PackedLinear, Product, ProductTask, Rows, portable_kernel};

/// Multiply-adds of a random case: a fraction of a second of the portable kernel.
const MOST_MACS: usize = 150_000_000;

/// A product that a device has to compute as the portable kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Of all that is random: weights, body or masks.
    pub seed: u64,
    /// The matrix.
    pub shape: LinearShape,
    /// Which way it is multiplied.
    pub direction: Direction,
    /// Bits of an output value.
    pub output_bits: u32,
    /// What it is multiplied by.
    pub rows: CaseRows,
    /// Columns of a tile.
    pub tile_columns: usize,
}

/// What a case's matrix is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseRows {
    /// A body of any values.
    Body {
        /// Bits of a value.
        bits: u32,
        /// Its rows.
        tokens: usize,
    },
    /// The masks of a parameter set.
    Masks {
        /// The set.
        set: ParameterSet,
        /// The feature of the first row of the matrix.
        first_feature: usize,
    },
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, shape: LinearShape { d_in, d_out }, direction, output_bits, rows, tile_columns } = self;
        write!(f, "seed {seed}: {d_in} × {d_out}, {direction:?}, ")?;
        match rows {
            CaseRows::Body { bits, tokens } => write!(f, "{tokens} rows of {bits} bits")?,
            CaseRows::Masks { set, first_feature } => write!(f, "{set} masks of features {first_feature}..")?,
        }
        write!(f, ", {output_bits} bits out, tiles of {tile_columns} columns")
    }
}

/// Why a case is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExactnessError {
    /// The device gave no product.
    #[error("{case}: {source}")]
    Device {
        /// Which case.
        case: Box<Case>,
        /// Why.
        source: DeviceError,
    },
    /// Columns came twice or not at all.
    #[error("{case}: column {column} came {times} times")]
    Columns {
        /// Which case.
        case: Box<Case>,
        /// The first such column.
        column: usize,
        /// How often it came.
        times: usize,
    },
    /// A tile of values of other bits.
    #[error("{case}: a tile of {bits} bits a value")]
    Width {
        /// Which case.
        case: Box<Case>,
        /// Bits that came.
        bits: u32,
    },
    /// The product is wrong.
    #[error("{case}: byte {limb} of row {row}, column {column} is {given}, not {right}; {wrong} of {all} bytes differ")]
    Different {
        /// Which case.
        case: Box<Case>,
        /// Where the first wrong byte is.
        limb: usize,
        /// Where the first wrong byte is.
        row: usize,
        /// Where the first wrong byte is.
        column: usize,
        /// What came.
        given: u8,
        /// The portable kernel's byte.
        right: u8,
        /// Wrong bytes in the column's limb and tile.
        wrong: usize,
        /// Bytes of these.
        all: usize,
    },
}

impl Case {
    /// A random case: any shape, all bits and parameter sets, both directions.
    pub fn random(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Small and large sizes alike, odd ones and multiples of what kernels like.
        let mut size = |most: usize| {
            let size = (most as f64).powf(random.random::<f64>()).ceil() as usize;
            if random.random_bool(0.3) { size.next_multiple_of(64) } else { size }.clamp(1, most)
        };
        let (mut d_in, mut d_out, tokens) = (size(6000), size(6000), size(700));
        let direction = if random.random() { Direction::Forward } else { Direction::Backward };
        let rows = if random.random_bool(0.3) {
            let set = ParameterSet::ALL[random.random_range(0..ParameterSet::ALL.len())];
            CaseRows::Masks { set, first_feature: random.random_range(0..5000) }
        } else {
            CaseRows::Body { bits: 2 * random.random_range(4..=4 * MAX_LIMBS as u32), tokens }
        };
        let (limbs, count) = rows.size();
        while limbs * count * d_in * d_out > MOST_MACS {
            let larger = if d_in > d_out { &mut d_in } else { &mut d_out };
            *larger = (*larger / 2).max(1);
        }
        Self {
            seed,
            shape: LinearShape { d_in, d_out },
            direction,
            output_bits: 2 * random.random_range(4..=4 * limbs as u32),
            rows,
            tile_columns: random.random_range(1..=1000),
        }
    }

    /// What a device is tried with before it serves: awkward sizes, all sets' limbs and masks, both directions.
    pub fn start_up() -> Vec<Self> {
        let (odd, even) = (LinearShape { d_in: 1100, d_out: 75 }, LinearShape { d_in: 256, d_out: 640 });
        let body = |bits, tokens| CaseRows::Body { bits, tokens };
        let mut rows = vec![
            (odd, body(8, 3), 8),
            (odd, body(16, 45), 16),
            (odd, body(22, 45), 10),
            (odd, body(20, 45), 12),
            (even, body(24, 300), 16),
            (odd, body(32, 129), 24),
            (odd, body(40, 31), 32),
            (odd, body(48, 45), 30),
        ];
        let small = LinearShape { d_in: 70, d_out: 33 };
        rows.extend(
            ParameterSet::ALL.map(|set| (small, CaseRows::Masks { set, first_feature: 5 }, set.modulus_bits())),
        );
        let case = |(shape, rows, output_bits)| {
            [Direction::Forward, Direction::Backward].map(|direction| Self {
                seed: 1,
                shape,
                direction,
                output_bits,
                rows,
                tile_columns: 64,
            })
        };
        rows.into_iter().flat_map(case).collect()
    }

    /// Computes the product on a device and compares.
    ///
    /// # Errors
    /// When the device gives no product, or a wrong one.
    pub fn check(&self, device: &dyn Device) -> Result<(), ExactnessError> {
        let case = || Box::new(*self);
        let Self { seed, shape, direction, output_bits, rows, tile_columns } = *self;
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
        let mut values = vec![0_u8; shape.d_in * shape.d_out];
        random.fill_bytes(&mut values);
        let values: Vec<i8> = values.into_iter().map(|byte| byte as i8).collect();
        let (inner, outer) = shape.along(direction);
        let (limbs, count) = rows.size();
        let (operand, body) = match rows {
            CaseRows::Body { bits, tokens } => {
                let mut body = Planes::scratch_of_bits(bits, tokens, inner);
                random.fill_bytes(body.bytes_mut());
                let spread = body.spread();
                (Multiplicand::Body(Arc::new(body)), spread)
            }
            CaseRows::Masks { set, first_feature } => {
                let mask_seed = MaskSeed::generate(&mut random);
                let linear = LinearId { layer: random.random(), group: Group::Down };
                let domain = MaskDomain { set, product: linear.along(direction) };
                let masks = expand_planes(&mask_seed, &domain, first_feature..first_feature + inner);
                (Multiplicand::Masks { seed: mask_seed, domain, first_feature }, masks)
            }
        };
        let task = ProductTask { direction, limbs, output_bits, rows: operand };
        let failed = |source| ExactnessError::Device { case: case(), source };
        let tiles = device
            .hold(shape, &values)
            .and_then(|matrix| collect(|sink| matrix.multiply(&task, tile_columns, sink)))
            .map_err(failed)?;
        for column in 0..outer {
            let holds =
                |tile: &&ProductTile| (tile.first_column..tile.first_column + tile.rows.columns()).contains(&column);
            let times = tiles.iter().filter(holds).count();
            if times != 1 {
                return Err(ExactnessError::Columns { case: case(), column, times });
            }
        }
        if let Some(tile) = tiles.iter().find(|tile| tile.first_column + tile.rows.columns() > outer) {
            let column = tile.first_column + tile.rows.columns() - 1;
            return Err(ExactnessError::Columns { case: case(), column, times: 1 });
        }
        let packed = PackedLinear::new(shape, &values).ok_or(DeviceError::Values { count: values.len(), shape });
        let packed = packed.map_err(failed)?;
        let product = Product { weights: packed.along(direction), limbs, output_bits, rows: Rows::Body(&body) };
        let right = collect(|sink| Ok(portable_kernel().multiply(&product, outer, sink)?)).map_err(failed)?;
        let right = right
            .into_iter()
            .next()
            .map_or_else(|| Planes::zeros(output_bits.div_ceil(8) as usize, count, 0), |tile| tile.rows);
        tiles.iter().try_for_each(|tile| self.compare(tile, &right))
    }

    /// A tile against the whole right product.
    fn compare(&self, tile: &ProductTile, right: &Planes) -> Result<(), ExactnessError> {
        let (width, outer) = (tile.rows.columns(), right.columns());
        if tile.rows.bits() != self.output_bits {
            return Err(ExactnessError::Width { case: Box::new(*self), bits: tile.rows.bits() });
        }
        let rows = tile.rows.spread();
        for limb in 0..rows.limbs() {
            let right = right.plane(limb).chunks_exact(outer).map(|row| &row[tile.first_column..][..width]);
            let given = rows.plane(limb);
            let pairs = || right.clone().flatten().zip(given).enumerate().filter(|(_, (right, given))| right != given);
            if let Some((place, (&right, &given_byte))) = pairs().next() {
                return Err(ExactnessError::Different {
                    case: Box::new(*self),
                    limb,
                    row: place / width,
                    column: tile.first_column + place % width,
                    given: given_byte,
                    right,
                    wrong: pairs().count(),
                    all: given.len(),
                });
            }
        }
        Ok(())
    }
}

impl CaseRows {
    /// Bytes of a value, and rows.
    fn size(self) -> (usize, usize) {
        match self {
            Self::Body { bits, tokens } => (bits.div_ceil(8) as usize, tokens),
            Self::Masks { set, .. } => (set.limbs(), set.mask_rows()),
        }
    }
}

/// All tiles that a product gives away.
fn collect(
    multiply: impl FnOnce(super::TileSink<'_>) -> Result<(), DeviceError>,
) -> Result<Vec<ProductTile>, DeviceError> {
    let tiles = Mutex::new(Vec::new());
    multiply(&|tile| {
        tiles.lock().unwrap_or_else(PoisonError::into_inner).push(tile);
        ControlFlow::Continue(())
    })?;
    Ok(tiles.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Bytes that reach all values, by a multiplicative generator: for products whose time is measured, not their result.
pub fn bytes(count: usize) -> impl Iterator<Item = u8> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
}

#[cfg(test)]
mod tests {
    use super::super::{CpuDevice, HeldMatrix, TileSink, kernels};
    use super::*;

    #[test]
    fn every_kernel_of_this_machine_is_exact() {
        for kernel in kernels() {
            let device = CpuDevice::new(kernel);
            for case in Case::start_up().into_iter().chain((0..6).map(Case::random)) {
                assert_eq!(case.check(&device), Ok(()), "{}", device.name());
            }
        }
    }

    #[test]
    fn random_cases_reach_everything_and_stay_small() {
        let cases: Vec<Case> = (0..400).map(Case::random).collect();
        assert_eq!(cases[7], Case::random(7));
        for limbs in 1..=MAX_LIMBS {
            let with = |short: u32| {
                let is = move |case: &&Case| case.rows.size().0 == limbs && case.output_bits % 8 == short;
                cases.iter().any(|case| is(&case))
            };
            assert!(with(0) && (limbs == 1 || (with(2) && with(4) && with(6))), "{limbs}");
        }
        for set in ParameterSet::ALL {
            for direction in [Direction::Forward, Direction::Backward] {
                let is = |case: &&Case| {
                    case.direction == direction && matches!(case.rows, CaseRows::Masks { set: of, .. } if of == set)
                };
                assert!(cases.iter().any(|case| is(&case)), "{set} {direction:?}");
            }
        }
        for case in cases {
            let (limbs, rows) = case.rows.size();
            assert!(limbs * rows * case.shape.d_in * case.shape.d_out <= MOST_MACS, "{case}");
        }
    }

    /// What a faulty device does to a tile; `None` keeps it back.
    type Fault = fn(ProductTile) -> Option<ProductTile>;

    struct Faulty(CpuDevice, Fault);

    struct FaultyMatrix(Arc<dyn HeldMatrix>, Fault);

    impl Device for Faulty {
        fn name(&self) -> String {
            "faulty".to_owned()
        }

        fn own_memory(&self) -> Option<u64> {
            None
        }

        fn memory_for(&self, shape: LinearShape) -> u64 {
            self.0.memory_for(shape)
        }

        fn hold(&self, shape: LinearShape, values: &[i8]) -> Result<Arc<dyn HeldMatrix>, DeviceError> {
            Ok(Arc::new(FaultyMatrix(self.0.hold(shape, values)?, self.1)))
        }

        fn measure_speed(&self) -> Result<f64, DeviceError> {
            self.0.measure_speed()
        }
    }

    impl HeldMatrix for FaultyMatrix {
        fn shape(&self) -> LinearShape {
            self.0.shape()
        }

        fn memory_bytes(&self) -> u64 {
            self.0.memory_bytes()
        }

        fn multiply(&self, task: &ProductTask, columns: usize, sink: TileSink<'_>) -> Result<(), DeviceError> {
            let fault = self.1;
            self.0.multiply(task, columns, &|tile| fault(tile).map_or(ControlFlow::Continue(()), sink))
        }
    }

    #[test]
    fn a_device_with_a_fault_in_one_bit_or_a_tile_too_few_is_found_out() {
        let faulty = |fault| Faulty(CpuDevice::new(portable_kernel()), fault);
        let flipped = faulty(|mut tile| {
            let (row, column) = (tile.rows.rows() - 1, tile.rows.columns() - 1);
            let value = tile.rows.value(row, column);
            tile.rows.set_value(row, column, value ^ 1);
            Some(tile)
        });
        let lost = faulty(|tile| (tile.first_column > 0).then_some(tile));
        for case in Case::start_up() {
            assert!(matches!(case.check(&flipped), Err(ExactnessError::Different { wrong: 1, .. })), "{case}");
            assert!(matches!(case.check(&lost), Err(ExactnessError::Columns { column: 0, times: 0, .. })), "{case}");
        }
    }
}
