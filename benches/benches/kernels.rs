//! The worker's kernels on one core: seconds of a product, how near that is to the processor's peak, and what the
//! encryption costs beside plain bytes.
//!
//! `cargo bench -p benches --bench kernels`. The peak is measured, not looked up: the kernel's own multiply instruction
//! on registers alone. Times are processor time of one thread, the best of several runs: whoever shares the machine
//! costs us its caches, but not our time.
//!
//! The last column is the encrypted product of masks and body over the plain product of as many rows of unsigned
//! bytes as that has rows of limbs, by the same kernel; a kernel with 16-bit digits does less for a limb than for a
//! plain byte.

use std::ops::ControlFlow;

use actors::matmul::{Kernel, PackedLinear, Product, Rows, kernels, tile_columns};
use protocol::he::{ParameterSet, Planes};
use protocol::ids::{Direction, LinearShape};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TOKENS: usize = 1024;
const RUNS: usize = 5;
const SHAPES: [LinearShape; 3] = [
    LinearShape { d_in: 576, d_out: 3072 },
    LinearShape { d_in: 1536, d_out: 576 },
    LinearShape { d_in: 2048, d_out: 2048 },
];

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    println!(
        "{:<12} {:<4} {:>12} {:>9} {:>6} {:>9} {:>6} {:>9} {:>6} {:>6}",
        "kernel", "set", "inner×outer", "body ms", "peak", "masks ms", "peak", "plain ms", "peak", "ratio"
    );
    for kernel in &kernels() {
        let peak = pool.install(|| kernel.peak_ops());
        if let Some(peak) = peak {
            println!("{:<12} register-resident: {:.3} T op/s", kernel.name(), peak / 1e12);
        }
        // The portable kernel is there for other processors: one product says how far behind it is.
        let shapes = if peak.is_some() { &SHAPES[..] } else { &SHAPES[..1] };
        for &set in &ParameterSet::ALL[..if peak.is_some() { 3 } else { 1 }] {
            for &shape in shapes {
                pool.install(|| report(kernel.as_ref(), peak, set, shape));
            }
        }
    }
}

/// One line of the table.
fn report(kernel: &dyn Kernel, peak: Option<f64>, set: ParameterSet, shape: LinearShape) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut bytes = |count| {
        let mut bytes = vec![0; count];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let (limbs, masks) = (set.limbs(), set.mask_rows());
    let weights: Vec<i8> = bytes(shape.d_in * shape.d_out).into_iter().map(|byte| byte as i8).collect();
    let packed = PackedLinear::new(shape, &weights).expect("as many weights as the shape has");
    let weights = packed.along(Direction::Forward);
    let mut planes = |limbs, rows| {
        Planes::from_bytes(limbs, rows, shape.d_in, bytes(limbs * rows * shape.d_in)).expect("as many bytes")
    };
    let (body, plain) = (planes(limbs, TOKENS), planes(1, limbs * (masks + TOKENS)));
    let keystream = bytes(shape.d_in * limbs * masks);

    let time = |limbs, output_bits, rows: Rows<'_>| {
        let product = Product { weights, limbs, output_bits, rows };
        let seconds = best_seconds(kernel, &product, tile_columns(shape.d_out));
        let operations = (rows.count() * shape.d_in * shape.d_out * kernel.operations(limbs)) as f64;
        let share = peak.map_or("-".to_owned(), |peak| format!("{:.0} %", 100.0 * operations / seconds / peak));
        (seconds, share)
    };
    let (body, body_share) = time(limbs, set.modulus_bits() - 8, Rows::Body(&body));
    let (masks, masks_share) = time(limbs, set.modulus_bits() - 8, Rows::Masks { keystream: &keystream, rows: masks });
    let (plain, plain_share) = time(1, 8, Rows::Body(&plain));
    println!(
        "{:<12} {:<4} {:>12} {:>9.2} {:>6} {:>9.2} {:>6} {:>9.2} {:>6} {:>6.2}",
        kernel.name(),
        set.name(),
        format!("{}×{}", shape.d_in, shape.d_out),
        1e3 * body,
        body_share,
        1e3 * masks,
        masks_share,
        1e3 * plain,
        plain_share,
        (body + masks) / plain
    );
}

fn best_seconds(kernel: &dyn Kernel, product: &Product<'_>, tile_columns: usize) -> f64 {
    let run = || {
        let start = processor_seconds();
        let sink = |tile| {
            std::hint::black_box(tile);
            ControlFlow::Continue(())
        };
        kernel.multiply(product, tile_columns, &sink).expect("operands that fit");
        processor_seconds() - start
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

/// Processor time of this process so far. Only one thread works at a time here.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec, which is all that the call writes.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "the process has a clock");
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}
