//! How fast this machine multiplies: what a worker says in its offer.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use protocol::he::{ParameterSet, Planes, Precision};
use protocol::model::{Direction, LinearShape};

use super::{Kernel, PackedLinear, Product, tile_columns};

/// Time that a measurement is given: enough for the clock to come up, short enough for a start-up.
const BUDGET: Duration = Duration::from_millis(80);
/// A matrix of the size of a small model's: big enough that its packing and rounding count as they do in service.
const SHAPE: LinearShape = LinearShape { d_in: 576, d_out: 576 };
/// Rows of the body; the mask adds its own.
const TOKENS: usize = 256;

/// Multiply-accumulates of a value mod 2^24 by an int8 weight, per second, on all threads of the current rayon pool.
///
/// The whole way of a product is measured (packing, multiplying, rounding), mask rows included, over the median of the
/// products that fit a budget of about 80 ms, but at least three.
pub fn measure_speed(kernel: &dyn Kernel) -> f64 {
    let precision = Precision::standard(ParameterSet::P24);
    let set = precision.set;
    // Any bytes will do: no kernel's time depends on its operands.
    let bytes = |count: usize| (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<_>>();
    let weights: Vec<i8> = bytes(SHAPE.d_in * SHAPE.d_out).into_iter().map(|byte| byte as i8).collect();
    let mask = bytes(SHAPE.d_in * set.limbs() * set.mask_rows());
    let body = bytes(set.limbs() * TOKENS * SHAPE.d_in);
    let packed = PackedLinear::new(SHAPE, &weights).expect("as many weights as the shape has");
    let body = Planes::from_bytes(set.limbs(), TOKENS, SHAPE.d_in, body).expect("as many bytes as the body has");
    let product = Product { precision, weights: packed.along(Direction::Forward), mask: &mask, body: &body };

    let run = || {
        let start = Instant::now();
        kernel
            .multiply(&product, tile_columns(SHAPE.d_out), &|tile| {
                black_box(tile);
                ControlFlow::Continue(())
            })
            .expect("operands that fit each other");
        start.elapsed().as_secs_f64()
    };
    let start = Instant::now();
    run();
    let mut seconds = Vec::new();
    while seconds.len() < 3 || start.elapsed() < BUDGET {
        seconds.push(run());
    }
    seconds.sort_by(f64::total_cmp);
    let macs = (set.mask_rows() + TOKENS) * SHAPE.d_in * SHAPE.d_out;
    macs as f64 / seconds[seconds.len() / 2]
}
