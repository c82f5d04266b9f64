//! The published scheme beside this project's on the same product: seconds a token and bytes a value.
//!
//! `cargo bench -p benches --bench paper [-- D_IN D_OUT]`, 2048 × 2048 unless told otherwise. The published scheme gets
//! one token, since its cost is per token (tens of seconds on two cores); ours gets 1 and 1,024, with the mask product of
//! the run at hand, whose bytes are told apart.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use actors::matmul::{PackedLinear, Product, Rows, best_kernel, tile_columns};
use protocol::baseline::PaperScheme;
use protocol::baseline::{ColumnPacked, Scheme};
use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskSeed, ParameterSet, Planes, Precision, ProductTile};
use protocol::ids::{Direction, LinearShape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

fn main() {
    let sizes: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (d_in, d_out) = match sizes[..] {
        [d_in, d_out] => (d_in, d_out),
        _ => (2048, 2048),
    };
    let shape = LinearShape { d_in, d_out };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // A bell of standard deviation 30, as int8 weights are once they are rotated.
    let weight = |rng: &mut ChaCha8Rng| (0..6).map(|_| rng.random_range(-21..=21)).sum();
    let weights: Vec<i8> = (0..d_in * d_out).map(|_| weight(&mut rng)).collect();

    println!("{d_in} × {d_out}, {} threads, kernel {}", rayon::current_num_threads(), best_kernel().name());
    println!(
        "{:8} {:>6} {:>13} {:>13} {:>13} {:>13} {:>9} {:>9} {:>11}",
        "scheme", "tokens", "encrypt s/tok", "multiply", "decrypt", "total s/tok", "B/val up", "B/val dn", "rel. error"
    );
    for set in [ParameterSet::P24, ParameterSet::P32] {
        let ours = with_kernel(Precision::standard(set), &weights, shape);
        println!("{}: {:.1} MB of mask product, once per run", ours.name(), ours.mask_bytes() as f64 / 1e6);
        report(&ours, &weights, shape, 1);
        report(&ours, &weights, shape, 1024);
    }
    report(&PaperScheme::new(&weights, shape), &weights, shape, 1);
}

/// Our scheme over this machine's fastest kernel. A worker keeps its weights packed and an owner the mask product, so
/// packing and the product of the masks are not counted.
fn with_kernel(
    precision: Precision,
    weights: &[i8],
    shape: LinearShape,
) -> ColumnPacked<impl Fn(&Planes) -> Vec<ProductTile>> {
    let packed = Arc::new(PackedLinear::new(shape, weights).expect("the weights have this shape"));
    let for_masks = Arc::clone(&packed);
    let masks = move |seed: &MaskSeed, domain: &MaskDomain| {
        let column_bytes = domain.column_bytes();
        let mut keystream = vec![0; shape.d_in * column_bytes];
        keystream.par_chunks_mut(16 * column_bytes).enumerate().for_each(|(chunk, bytes)| {
            expand(seed, domain, 16 * chunk..16 * chunk + bytes.len() / column_bytes, bytes);
        });
        let rows = Rows::Masks { keystream: &keystream, rows: precision.set.mask_rows() };
        multiply(&for_masks, precision.set.limbs(), 8 * u32::from(precision.mask_limbs), rows)
    };
    let body = move |body: &Planes| multiply(&packed, body.limbs(), precision.output_bits.into(), Rows::Body(body));
    ColumnPacked::with_products(precision, weights, shape, masks, body).expect("the mask product fits")
}

/// All tiles of one product.
fn multiply(weights: &PackedLinear, limbs: usize, output_bits: u32, rows: Rows<'_>) -> Vec<ProductTile> {
    let weights = weights.along(Direction::Forward);
    let tiles = Mutex::new(Vec::new());
    let product = Product { weights, limbs, output_bits, rows };
    best_kernel()
        .multiply(&product, tile_columns(weights.outer()), &|tile| {
            tiles.lock().expect("no thread panics with the lock").push(tile);
            std::ops::ControlFlow::Continue(())
        })
        .expect("the operands fit");
    tiles.into_inner().expect("no thread panicked with the lock")
}

/// Runs a product (after one that warms up, unless it takes seconds) and prints a line about it.
fn report(scheme: &impl Scheme, weights: &[i8], shape: LinearShape, tokens: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let rows: Vec<f32> = (0..tokens * shape.d_in).map(|_| rng.random_range(-1.0..1.0)).collect();
    let run = || {
        let began = Instant::now();
        let (request, ticket) = scheme.encrypt(&rows, tokens).expect("the rows can be encrypted");
        let encrypted = began.elapsed();
        let answer = scheme.multiply(&request);
        let multiplied = began.elapsed();
        let out = scheme.decrypt(ticket, &answer).expect("the answer fits");
        let times = [encrypted, multiplied - encrypted, began.elapsed() - multiplied];
        (times, scheme.request_bytes(&request), scheme.answer_bytes(&answer), out)
    };
    let mut best = run();
    for _ in 0..4 {
        if best.0.iter().sum::<Duration>() < Duration::from_secs(2) {
            let again = run();
            if again.0.iter().sum::<Duration>() < best.0.iter().sum() {
                best = again;
            }
        }
    }
    let (times, up, down, out) = best;
    let [encrypt, multiply, decrypt] = times.map(|time| time.as_secs_f64() / tokens as f64);
    println!(
        "{:8} {tokens:>6} {encrypt:>13.3e} {multiply:>13.3e} {decrypt:>13.3e} {:>13.3e} {:>9.2} {:>9.2} {:>10.2} %",
        scheme.name(),
        encrypt + multiply + decrypt,
        up as f64 / (tokens * shape.d_in) as f64,
        down as f64 / (tokens * shape.d_out) as f64,
        100.0 * relative_error(&rows, weights, shape, &out),
    );
}

/// `‖out − rows·W‖ / ‖rows·W‖` over the first rows.
fn relative_error(rows: &[f32], weights: &[i8], shape: LinearShape, out: &[f32]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, out) in rows.chunks_exact(shape.d_in).zip(out.chunks_exact(shape.d_out)).take(16) {
        let mut exact = vec![0.0f64; shape.d_out];
        for (&x, weights) in row.iter().zip(weights.chunks_exact(shape.d_out)) {
            for (sum, &weight) in exact.iter_mut().zip(weights) {
                *sum += f64::from(x) * f64::from(weight);
            }
        }
        for (exact, &value) in exact.iter().zip(out) {
            error += (f64::from(value) - exact).powi(2);
            norm += exact.powi(2);
        }
    }
    (error / norm).sqrt()
}
