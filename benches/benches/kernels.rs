//! The worker's kernels on one core: seconds of a product, and how near that is to the processor's peak.
//!
//! `cargo bench -p benches --bench kernels`. The peak is measured, not looked up: the kernel's multiply-add on
//! registers alone, nothing loaded. Both are processor time of one thread, the best of several runs: whoever shares the
//! machine costs us its caches, but not our time.

use std::ops::ControlFlow;

use actors::matmul::{Kernel, PackedLinear, Product, kernels, tile_columns};
use protocol::he::{ParameterSet, Planes, Precision};
use protocol::model::{Direction, LinearShape};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TOKENS: usize = 1024;
const RUNS: usize = 7;
const SHAPES: [LinearShape; 4] = [
    LinearShape { d_in: 576, d_out: 576 },
    LinearShape { d_in: 576, d_out: 3072 },
    LinearShape { d_in: 1536, d_out: 576 },
    LinearShape { d_in: 2048, d_out: 2048 },
];

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let kernels = kernels();
    println!("{:<12} {:<8} {:>13} {:>9} {:>9} {:>8}", "kernel", "set", "inner × outer", "ms", "GMAC/s", "of peak");
    for kernel in &kernels {
        let peak = peak::digit_macs_per_second(kernel.name());
        // The portable kernel is there for other processors: one product says how far behind it is.
        let shapes = if peak.is_some() { &SHAPES[..] } else { &SHAPES[..1] };
        for set in ParameterSet::ALL {
            for &shape in shapes {
                let seconds = pool.install(|| best_seconds(kernel.as_ref(), set, shape));
                let macs = ((set.mask_rows() + TOKENS) * shape.d_in * shape.d_out) as f64 / seconds;
                let digits = peak::digits(kernel.name(), set);
                let ratio = peak.map_or("-".to_owned(), |peak| format!("{:.0} %", 100.0 * macs * digits / peak));
                let size = format!("{} × {}", shape.d_in, shape.d_out);
                let (name, set) = (kernel.name(), set.name());
                println!("{name:<12} {set:<8} {size:>13} {:>9.1} {:>9.2} {ratio:>8}", 1e3 * seconds, macs / 1e9);
            }
        }
    }
}

fn best_seconds(kernel: &dyn Kernel, set: ParameterSet, shape: LinearShape) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let weights: Vec<i8> = (0..shape.d_in * shape.d_out).map(|_| rng.random_range(-127..=127)).collect();
    let packed = PackedLinear::new(shape, &weights).expect("as many weights as the shape has");
    let mut mask = vec![0; shape.d_in * set.limbs() * set.mask_rows()];
    rng.fill_bytes(&mut mask);
    let mut body = Planes::zeros(set.limbs(), TOKENS, shape.d_in);
    rng.fill_bytes(body.bytes_mut());
    let weights = packed.along(Direction::Forward);
    let product = Product { precision: Precision::standard(set), weights, mask: &mask, body: &body };
    let run = || {
        let start = processor_seconds();
        let sink = |tile| {
            std::hint::black_box(tile);
            ControlFlow::Continue(())
        };
        kernel.multiply(&product, tile_columns(shape.d_out), &sink).expect("operands that fit");
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

/// What the multiply-add instructions can do at most.
mod peak {
    use super::ParameterSet;

    /// Digits of a value in the arithmetic of a kernel.
    pub(super) fn digits(kernel: &str, set: ParameterSet) -> f64 {
        match (kernel, set) {
            ("avx512-vnni", _) => set.limbs() as f64,
            (_, ParameterSet::P48) => 3.0,
            _ => 2.0,
        }
    }

    /// Multiply-accumulates of one digit by one weight, per second, on one core. `None` for a kernel whose
    /// instructions are the compiler's choice.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn digit_macs_per_second(_kernel: &str) -> Option<f64> {
        None
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) use x86::digit_macs_per_second;

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::asm;

        use crate::processor_seconds;

        /// Loop passes of one timing: about a millisecond.
        const PASSES: u64 = 300_000;
        const TIMINGS: usize = 50;

        /// As its namesake above.
        pub(in super::super) fn digit_macs_per_second(kernel: &str) -> Option<f64> {
            match kernel {
                // Twelve instructions on sixteen digits.
                "avx2" if is_x86_feature_detected!("avx2") => Some(best(12 * 16, avx2)),
                // Twenty-four instructions on sixty-four digits.
                "avx512-vnni" if is_x86_feature_detected!("avx512vnni") => Some(best(24 * 64, vnni)),
                _ => None,
            }
        }

        fn best(macs: u64, run: fn()) -> f64 {
            let time = |_| {
                let start = processor_seconds();
                run();
                processor_seconds() - start
            };
            let seconds = (0..TIMINGS).map(time).fold(f64::INFINITY, f64::min);
            (PASSES * macs) as f64 / seconds
        }

        fn avx2() {
            // SAFETY: called only where AVX2 was detected; the loop touches nothing but registers that it names.
            unsafe {
                asm!(
                    "2:",
                    // Product into a renamed register, then into one of twelve sums: what the kernel does.
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm0, ymm0, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm1, ymm1, ymm13",
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm2, ymm2, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm3, ymm3, ymm13",
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm4, ymm4, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm5, ymm5, ymm13",
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm6, ymm6, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm7, ymm7, ymm13",
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm8, ymm8, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm9, ymm9, ymm13",
                    "vpmaddwd ymm12, ymm14, ymm15", "vpaddd ymm10, ymm10, ymm12",
                    "vpmaddwd ymm13, ymm14, ymm15", "vpaddd ymm11, ymm11, ymm13",
                    "dec {passes}",
                    "jnz 2b",
                    passes = inout(reg) PASSES => _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                    out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nomem, nostack),
                );
            }
        }

        fn vnni() {
            // SAFETY: called only where AVX-512 VNNI was detected; the loop touches nothing but registers that it names.
            unsafe {
                asm!(
                    "2:",
                    "vpdpbusd zmm0, zmm30, zmm31", "vpdpbusd zmm1, zmm30, zmm31", "vpdpbusd zmm2, zmm30, zmm31",
                    "vpdpbusd zmm3, zmm30, zmm31", "vpdpbusd zmm4, zmm30, zmm31", "vpdpbusd zmm5, zmm30, zmm31",
                    "vpdpbusd zmm6, zmm30, zmm31", "vpdpbusd zmm7, zmm30, zmm31", "vpdpbusd zmm8, zmm30, zmm31",
                    "vpdpbusd zmm9, zmm30, zmm31", "vpdpbusd zmm10, zmm30, zmm31", "vpdpbusd zmm11, zmm30, zmm31",
                    "vpdpbusd zmm12, zmm30, zmm31", "vpdpbusd zmm13, zmm30, zmm31", "vpdpbusd zmm14, zmm30, zmm31",
                    "vpdpbusd zmm15, zmm30, zmm31", "vpdpbusd zmm16, zmm30, zmm31", "vpdpbusd zmm17, zmm30, zmm31",
                    "vpdpbusd zmm18, zmm30, zmm31", "vpdpbusd zmm19, zmm30, zmm31", "vpdpbusd zmm20, zmm30, zmm31",
                    "vpdpbusd zmm21, zmm30, zmm31", "vpdpbusd zmm22, zmm30, zmm31", "vpdpbusd zmm23, zmm30, zmm31",
                    "dec {passes}",
                    "jnz 2b",
                    passes = inout(reg) PASSES => _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                    out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    options(nomem, nostack),
                );
            }
        }
    }
}
