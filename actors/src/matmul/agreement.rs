//! Whether a kernel gives the portable kernel's bytes on this very machine.
//!
//! A wrong sum looks like any other, and training on wrong sums looks like training badly. So a kernel proves itself
//! before it serves: on a product of awkward sizes whose bytes are spread over their whole range, with the bytes of a value
//! that are in use.

use std::sync::Mutex;

use protocol::he::{Planes, ProductTile};
use protocol::ids::{Direction, LinearShape};

use super::{Kernel, PackedLinear, Product, Rows};

/// No multiple of any kernel's blocks, with more inner elements than one block of each holds.
const SHAPE: LinearShape = LinearShape { d_in: 1100, d_out: 75 };
/// More rows than a tile, and so few that kernels have another way for them.
const ROWS: [usize; 4] = [45, 1, 2, 4];
/// Bytes of a value, and bits of an output value, that are asked for.
const WIDTHS: [(usize, u32); 5] = [(3, 16), (3, 10), (3, 12), (4, 24), (6, 32)];

/// Whether `kernel` multiplies as `portable` does, both ways.
pub(super) fn agrees(kernel: &dyn Kernel, portable: &dyn Kernel) -> bool {
    // A multiplicative generator: any bytes that reach all values and both signs will do.
    let bytes = |count: usize| (1..=count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
    let weights: Vec<i8> = bytes(SHAPE.d_in * SHAPE.d_out).map(|byte| byte as i8).collect();
    let Some(packed) = PackedLinear::new(SHAPE, &weights) else { return false };
    [Direction::Forward, Direction::Backward].into_iter().all(|direction| {
        let cases = WIDTHS.into_iter().flat_map(|width| ROWS.map(|rows| (width, rows)));
        cases.into_iter().all(|((limbs, output_bits), rows)| {
            let weights = packed.along(direction);
            let mut body = Planes::scratch(limbs, rows, weights.inner());
            let count = body.bytes().len();
            body.bytes_mut().iter_mut().zip(bytes(count)).for_each(|(to, byte)| *to = byte);
            let product = Product { weights, limbs, output_bits, rows: Rows::Body(&body) };
            let answer = tiles(kernel, &product);
            answer.is_some() && answer == tiles(portable, &product)
        })
    })
}

/// All tiles of a product in the order of their columns.
fn tiles(kernel: &dyn Kernel, product: &Product<'_>) -> Option<Vec<ProductTile>> {
    let tiles = Mutex::new(Vec::new());
    let collect = |tile| match tiles.lock() {
        Ok(mut tiles) => {
            tiles.push(tile);
            std::ops::ControlFlow::Continue(())
        }
        Err(_) => std::ops::ControlFlow::Break(()),
    };
    kernel.multiply(product, product.weights.outer(), &collect).ok()?;
    let mut tiles = tiles.into_inner().ok()?;
    tiles.sort_by_key(|tile| tile.first_column);
    Some(tiles)
}

#[cfg(test)]
mod tests {
    use super::super::{ProductError, TileSink, kernels};
    use super::*;

    /// A kernel with a fault in one bit of one output value.
    struct Faulty(std::sync::Arc<dyn Kernel>);

    impl Kernel for Faulty {
        fn name(&self) -> &str {
            "faulty"
        }

        fn multiply(&self, product: &Product<'_>, columns: usize, sink: TileSink<'_>) -> Result<(), ProductError> {
            self.0.multiply(product, columns, &|mut tile| {
                tile.rows.bytes_mut()[70] ^= 1;
                sink(tile)
            })
        }

        fn operations(&self, limbs: usize) -> usize {
            self.0.operations(limbs)
        }

        fn peak_ops(&self) -> Option<f64> {
            None
        }
    }

    #[test]
    fn every_kernel_of_this_machine_agrees_and_a_faulty_one_does_not() {
        let kernels = kernels();
        let portable = &kernels[kernels.len() - 1];
        for kernel in &kernels {
            assert!(agrees(kernel.as_ref(), portable.as_ref()), "{}", kernel.name());
            assert!(!agrees(&Faulty(std::sync::Arc::clone(kernel)), portable.as_ref()), "{}", kernel.name());
        }
    }
}
