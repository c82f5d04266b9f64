//! How fast this machine multiplies: what a worker says in its offer.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::he::Planes;
use protocol::ids::{Direction, LinearShape};

use super::{
    Device, DeviceError, HeldMatrix, Kernel, Multiplicand, PackedLinear, Product, ProductError, ProductTask, Rows,
    exactness, tile_columns,
};

/// Time that a measurement is given: enough for the clock to come up and for some product to be undisturbed by others that
/// start at the same time, short enough for a start-up.
const BUDGET: Duration = Duration::from_millis(250);
/// A matrix of the size of a small model's: big enough that its packing and rounding count as they do in service.
const SHAPE: LinearShape = LinearShape { d_in: 576, d_out: 576 };
/// Rows of the body: those of a sequence, so that a product takes no longer than a processor is left to one process.
const TOKENS: usize = 256;
/// Bytes of a value, and bits of an output value: what bodies usually have.
const LIMBS: usize = 3;
const OUTPUT_BITS: u32 = 16;

/// A matrix of the size of a model of a billion parameters, and rows, for devices that are fast: what takes the copies
/// longer than the arithmetic has to be long.
const DEVICE_SHAPE: LinearShape = LinearShape { d_in: 2048, d_out: 8192 };
const DEVICE_TOKENS: usize = 2048;

/// Multiply-accumulates of a value mod 2^24 by an int8 weight, per second, on all threads of the current rayon pool.
///
/// The whole way of a body product is measured (packing, multiplying, rounding): the fastest of those that fit a budget of
/// 250 ms, but of at least three. What slows the others down is what else runs at this moment, such as another worker
/// that measures itself; were it to count, workers alike would be dealt unlike shares for a whole run.
pub fn measure_speed(kernel: &dyn Kernel) -> f64 {
    // Any bytes will do: no kernel's time depends on its operands.
    let weights: Vec<i8> = exactness::bytes(SHAPE.d_in * SHAPE.d_out).map(|byte| byte as i8).collect();
    let packed = PackedLinear::new(SHAPE, &weights).expect("as many weights as the shape has");
    let body = exactness::bytes(LIMBS * TOKENS * SHAPE.d_in).collect();
    let body = Planes::from_bytes(LIMBS, TOKENS, SHAPE.d_in, body).expect("as many bytes as the body has");
    let weights = packed.along(Direction::Forward);
    let product = Product { weights, limbs: LIMBS, output_bits: OUTPUT_BITS, rows: Rows::Body(&body) };

    let seconds = runs(BUDGET, || multiply_once(kernel, &product)).expect("operands that fit each other")[0];
    let macs = TOKENS * SHAPE.d_in * SHAPE.d_out;
    macs as f64 / seconds
}

/// Median seconds of a product on all threads of the current rayon pool, its tiles dropped: over as many runs as fit
/// `budget` after one that warms up, but at least three.
///
/// # Errors
/// When the operands do not fit each other.
pub fn product_seconds(kernel: &dyn Kernel, product: &Product<'_>, budget: Duration) -> Result<f64, ProductError> {
    runs(budget, || multiply_once(kernel, product)).map(|seconds| seconds[seconds.len() / 2])
}

fn multiply_once(kernel: &dyn Kernel, product: &Product<'_>) -> Result<(), ProductError> {
    kernel.multiply(product, tile_columns(product.weights.outer()), &|tile| {
        black_box(tile);
        ControlFlow::Continue(())
    })
}

/// As [`product_seconds`], of a matrix that a device holds: from rows in the computer's memory to tiles there.
///
/// # Errors
/// When the operands do not fit each other, or the device fails.
pub fn task_seconds(matrix: &dyn HeldMatrix, task: &ProductTask, budget: Duration) -> Result<f64, DeviceError> {
    runs(budget, || run_task(matrix, task)).map(|seconds| seconds[seconds.len() / 2])
}

fn run_task(matrix: &dyn HeldMatrix, task: &ProductTask) -> Result<(), DeviceError> {
    let (_, outer) = matrix.shape().along(task.direction);
    matrix.multiply(task, tile_columns(outer), &|tile| {
        black_box(tile);
        ControlFlow::Continue(())
    })
}

/// Multiply-accumulates of a value mod 2^24 by an int8 weight, per second, of a device to which rows are copied and from
/// which tiles come back; the fastest product of some, as in [`measure_speed`].
///
/// # Errors
/// When the device fails.
pub fn measure_device_speed(device: &dyn Device) -> Result<f64, DeviceError> {
    let shape = DEVICE_SHAPE;
    let values: Vec<i8> = exactness::bytes(shape.d_in * shape.d_out).map(|byte| byte as i8).collect();
    let matrix = device.hold(shape, &values)?;
    let mut body = Planes::scratch(LIMBS, DEVICE_TOKENS, shape.d_in);
    let count = body.bytes().len();
    body.bytes_mut().iter_mut().zip(exactness::bytes(count)).for_each(|(to, byte)| *to = byte);
    let rows = Multiplicand::Body(Arc::new(body));
    let task = ProductTask { direction: Direction::Forward, limbs: LIMBS, output_bits: OUTPUT_BITS, rows };
    let seconds = runs(BUDGET, || run_task(matrix.as_ref(), &task))?[0];
    Ok((DEVICE_TOKENS * shape.d_in * shape.d_out) as f64 / seconds)
}

/// Seconds of each run, in ascending order: of as many as fit `budget` after one that warms up, but at least three.
fn runs<E>(budget: Duration, mut once: impl FnMut() -> Result<(), E>) -> Result<Vec<f64>, E> {
    let start = Instant::now();
    once()?;
    let mut seconds = Vec::new();
    while seconds.len() < 3 || start.elapsed() < budget {
        let start = Instant::now();
        once()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}
