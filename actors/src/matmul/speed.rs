//! How fast this machine multiplies: what a worker says in its offer.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use protocol::he::Planes;
use protocol::model::{Direction, LinearShape};

use super::{Kernel, PackedLinear, Product, ProductError, Rows, tile_columns};

/// Time that a measurement is given: enough for the clock to come up, short enough for a start-up.
const BUDGET: Duration = Duration::from_millis(80);
/// A matrix of the size of a small model's: big enough that its packing and rounding count as they do in service.
const SHAPE: LinearShape = LinearShape { d_in: 576, d_out: 576 };
/// Rows of the body.
const TOKENS: usize = 1024;
/// Bytes of a value, and of an output value: what bodies usually have.
const LIMBS: usize = 3;
const OUTPUT_LIMBS: usize = 2;

/// Multiply-accumulates of a value mod 2^24 by an int8 weight, per second, on all threads of the current rayon pool.
///
/// The whole way of a body product is measured (packing, multiplying, rounding), over the median of the
/// products that fit a budget of about 80 ms, but at least three.
pub fn measure_speed(kernel: &dyn Kernel) -> f64 {
    // Any bytes will do: no kernel's time depends on its operands.
    let bytes = |count: usize| (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<_>>();
    let weights: Vec<i8> = bytes(SHAPE.d_in * SHAPE.d_out).into_iter().map(|byte| byte as i8).collect();
    let packed = PackedLinear::new(SHAPE, &weights).expect("as many weights as the shape has");
    let body = bytes(LIMBS * TOKENS * SHAPE.d_in);
    let body = Planes::from_bytes(LIMBS, TOKENS, SHAPE.d_in, body).expect("as many bytes as the body has");
    let weights = packed.along(Direction::Forward);
    let product = Product { weights, limbs: LIMBS, output_limbs: OUTPUT_LIMBS, rows: Rows::Body(&body) };

    let seconds = product_seconds(kernel, &product, BUDGET).expect("operands that fit each other");
    let macs = TOKENS * SHAPE.d_in * SHAPE.d_out;
    macs as f64 / seconds
}

/// Median seconds of a product on all threads of the current rayon pool, its tiles dropped: over as many runs as fit
/// `budget` after one that warms up, but at least three.
///
/// # Errors
/// When the operands do not fit each other.
pub fn product_seconds(kernel: &dyn Kernel, product: &Product<'_>, budget: Duration) -> Result<f64, ProductError> {
    let columns = tile_columns(product.weights.outer());
    let run = || {
        let start = Instant::now();
        kernel.multiply(product, columns, &|tile| {
            black_box(tile);
            ControlFlow::Continue(())
        })?;
        Ok::<_, ProductError>(start.elapsed().as_secs_f64())
    };
    let start = Instant::now();
    run()?;
    let mut seconds = Vec::new();
    while seconds.len() < 3 || start.elapsed() < budget {
        seconds.push(run()?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}
