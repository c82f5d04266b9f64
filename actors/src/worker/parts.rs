//! A served matrix in the memory of one device, or cut by columns over several; and a product cut accordingly.
//!
//! Of the forward product `X·W` a part gives some output columns, of all rows: it needs the whole of X. Of the backward
//! product `dY·Wᵀ` the same part holds some of the inner dimension: it needs its columns of dY, or the masks of its
//! features, and gives a summand of every output column. Summands keep all their bytes: what is rounded is their sum.

use std::ops::Range;
use std::sync::Arc;

use protocol::he::Planes;
use protocol::ids::{Direction, LinearShape};
use protocol::quant::Int8Matrix;
use rayon::prelude::*;

use super::spread::Part;
use crate::matmul::{Device, DeviceError, HeldMatrix, Multiplicand, ProductTask};

/// A matrix in devices' memory.
pub struct HeldLinear {
    shape: LinearShape,
    parts: Vec<HeldPart>,
}

/// What one device has of it.
pub struct HeldPart {
    /// The device's number.
    pub device: usize,
    /// Columns of the matrix, `d_in × d_out`.
    pub columns: Range<usize>,
    /// These columns.
    pub matrix: Arc<dyn HeldMatrix>,
}

impl HeldLinear {
    /// Gives each device its part of a matrix, whose columns `parts` cover in their order. Blocks.
    ///
    /// # Errors
    /// When a device cannot take its part; then no device keeps one.
    pub fn hold(devices: &[Arc<dyn Device>], parts: &[Part], matrix: &Int8Matrix) -> Result<Self, DeviceError> {
        let Int8Matrix { shape, ref values, .. } = *matrix;
        let hold = |part: &Part| {
            let columns = part.columns.clone();
            let own = LinearShape { d_out: columns.len(), ..shape };
            let device = &devices[part.device];
            let matrix = if own == shape {
                device.hold(own, values)?
            } else {
                let values: Vec<i8> =
                    values.chunks_exact(shape.d_out).flat_map(|row| &row[columns.clone()]).copied().collect();
                device.hold(own, &values)?
            };
            Ok(HeldPart { device: part.device, columns, matrix })
        };
        Ok(Self { shape, parts: parts.iter().map(hold).collect::<Result<_, DeviceError>>()? })
    }

    /// Dimensions of the whole matrix.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// The parts in the order of their columns.
    pub fn parts(&self) -> &[HeldPart] {
        &self.parts
    }

    /// The parts of a product, in the same order. Copies the columns of a body on the rayon pool.
    pub fn tasks(&self, task: ProductTask) -> Vec<ProductTask> {
        if self.parts.len() == 1 {
            return vec![task];
        }
        // Columns are cut of whole bytes: groups of packed ones may lie across a cut.
        let spread = match &task.rows {
            Multiplicand::Body(body) if task.direction == Direction::Backward => Some(body.spread()),
            _ => None,
        };
        let part = |part: &HeldPart| match task.direction {
            Direction::Forward => task.clone(),
            Direction::Backward => ProductTask {
                direction: task.direction,
                limbs: task.limbs,
                output_bits: 8 * task.limbs as u32,
                rows: match &task.rows {
                    Multiplicand::Body(body) => {
                        let body = spread.as_ref().unwrap_or(body);
                        Multiplicand::Body(Arc::new(columns_of(body, part.columns.clone())))
                    }
                    &Multiplicand::Masks { seed, domain, first_feature } => {
                        Multiplicand::Masks { seed, domain, first_feature: first_feature + part.columns.start }
                    }
                },
            },
        };
        self.parts.iter().map(part).collect()
    }
}

/// Some columns of a body of whole bytes.
fn columns_of(body: &Planes, columns: Range<usize>) -> Planes {
    let mut part = Planes::scratch(body.limbs(), body.rows(), columns.len());
    if !columns.is_empty() {
        let rows = part.bytes_mut().par_chunks_exact_mut(columns.len());
        rows.zip(body.bytes().par_chunks_exact(body.columns()))
            .for_each(|(part, row)| part.copy_from_slice(&row[columns.clone()]));
    }
    part
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::ops::ControlFlow;
    use std::sync::Mutex;

    use proptest::prelude::*;
    use protocol::he::{MaskDomain, MaskSeed, ParameterSet, ProductTile};
    use protocol::ids::{Group, LinearId};
    use rand::{Rng as _, RngCore as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::super::sum::{CiphertextSum, SumShape};
    use super::*;
    use crate::matmul::{CpuDevice, kernels, tile_columns};

    /// All tiles of a product or of a part, in the order of their columns.
    fn tiles(matrix: &dyn HeldMatrix, task: &ProductTask, columns: usize) -> Vec<ProductTile> {
        let tiles = Mutex::new(Vec::new());
        let collect = |tile| {
            tiles.lock().unwrap().push(tile);
            ControlFlow::Continue(())
        };
        matrix.multiply(task, columns, &collect).unwrap();
        let mut tiles = tiles.into_inner().unwrap();
        tiles.sort_by_key(|tile| tile.first_column);
        tiles
    }

    /// `[row][column]` values of tiles that cover all columns.
    fn values(tiles: &[ProductTile], rows: usize, outer: usize) -> Vec<u64> {
        let mut values = vec![u64::MAX; rows * outer];
        for tile in tiles {
            for (row, column) in (0..rows).flat_map(|row| (0..tile.rows.columns()).map(move |column| (row, column))) {
                values[row * outer + tile.first_column + column] = tile.rows.value(row, column);
            }
        }
        values
    }

    /// A cut product put together again, and the same product of the portable kernel, which is not cut.
    fn cut_and_whole(matrix: &Int8Matrix, columns: &[usize], task: &ProductTask) -> [Vec<u64>; 2] {
        // Each part on another of this machine's kernels, as far as they go.
        let kernels = kernels();
        let device = |number: usize| CpuDevice::new(Arc::clone(&kernels[number % kernels.len()]));
        let devices: Vec<Arc<dyn Device>> = (0..columns.len()).map(|number| Arc::new(device(number)) as _).collect();
        let mut start = 0;
        let part = |(device, &width): (usize, &usize)| {
            let columns = start..start + width;
            start += width;
            Part { device, columns }
        };
        let parts: Vec<Part> = columns.iter().enumerate().map(part).collect();
        let held = HeldLinear::hold(&devices, &parts, matrix).unwrap();
        let (_, outer) = held.shape().along(task.direction);
        let rows = task.rows.count();
        let tasks = held.tasks(task.clone());
        let mut sum = CiphertextSum::new(SumShape {
            parts: tasks.len(),
            limbs: task.limbs,
            output_bits: task.output_bits,
            rows,
            outer,
            cell_columns: tile_columns(outer),
        });
        let mut answer = Vec::new();
        for (number, (part, task)) in held.parts().iter().zip(&tasks).enumerate() {
            let (_, part_outer) = part.matrix.shape().along(task.direction);
            for mut tile in tiles(part.matrix.as_ref(), task, tile_columns(part_outer)) {
                if task.direction == Direction::Forward {
                    tile.first_column += part.columns.start;
                    answer.push(tile);
                } else {
                    answer.extend(sum.add(number, tile).unwrap());
                }
            }
        }
        let portable = CpuDevice::new(Arc::clone(&kernels[kernels.len() - 1]));
        let whole = portable.hold(matrix.shape, &matrix.values).unwrap();
        [answer, tiles(whole.as_ref(), task, tile_columns(outer))].map(|tiles| values(&tiles, rows, outer))
    }

    fn matrix(shape: LinearShape, random: &mut ChaCha8Rng) -> Int8Matrix {
        Int8Matrix { shape, values: (0..shape.d_in * shape.d_out).map(|_| random.random()).collect() }
    }

    /// Bits of a body's values, and of an output's.
    fn widths() -> impl Strategy<Value = (u32, u32)> {
        (4_u32..=24).prop_flat_map(|bits| (Just(2 * bits), (4..=bits).prop_map(|bits| 2 * bits)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_cut_body_product_is_the_whole_one(
            d_in in 1_usize..150,
            columns in prop::collection::vec(1_usize..120, 2..4),
            rows in 1_usize..30,
            (bits, output_bits) in widths(),
            backward: bool,
            seed: u64,
        ) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let shape = LinearShape { d_in, d_out: columns.iter().sum() };
            let matrix = matrix(shape, &mut random);
            let direction = if backward { Direction::Backward } else { Direction::Forward };
            let (inner, _) = shape.along(direction);
            let mut body = Planes::zeros_of_bits(bits, rows, inner);
            random.fill_bytes(body.bytes_mut());
            let limbs = body.limbs();
            let task = ProductTask { direction, limbs, output_bits, rows: Multiplicand::Body(Arc::new(body)) };
            let [cut, whole] = cut_and_whole(&matrix, &columns, &task);
            prop_assert!(cut == whole);
        }
    }

    #[test]
    fn a_cut_mask_product_is_the_whole_one() {
        let mut random = ChaCha8Rng::seed_from_u64(4);
        let matrix = matrix(LinearShape { d_in: 37, d_out: 150 }, &mut random);
        for (set, direction) in ParameterSet::ALL
            .into_iter()
            .flat_map(|set| [Direction::Forward, Direction::Backward].map(|direction| (set, direction)))
        {
            let domain = MaskDomain { set, product: LinearId { layer: 3, group: Group::Down }.along(direction) };
            let rows = Multiplicand::Masks { seed: MaskSeed::from_bytes([9; 32]), domain, first_feature: 0 };
            for output_bits in (8..=set.modulus_bits()).step_by(8) {
                let task = ProductTask { direction, limbs: set.limbs(), output_bits, rows: rows.clone() };
                let [cut, whole] = cut_and_whole(&matrix, &[64, 56, 30], &task);
                assert!(cut == whole, "{set} {direction:?} {output_bits}");
            }
        }
    }
}
