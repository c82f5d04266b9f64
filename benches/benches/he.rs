//! Speed of the owner's half of the scheme on one core: `cargo bench -p benches --bench he`.
//!
//! Masks, transforms, encryption, decryption, rotation and encoding, each by itself. A polynomial is 1,024 coefficients:
//! one of P24, four of P32. Encryption goes from rows of f32 to the planes that are sent, expansion and transform of the
//! masks included, which all blocks of a call share; decryption goes from the planes that come back to rows of f32, with
//! the mask product that is kept for a run. What is decrypted is random, so nothing is verified.
#![allow(clippy::disallowed_methods)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::buffer::Buffer;
use protocol::he::fft::Ring;
use protocol::he::mask::{expand, expand_planes};
use protocol::he::{
    MaskDomain, MaskProduct, MaskProductBuilder, MaskSeed, ParameterSet, Plaintext, Planes, Precision, ProductTile,
    encrypt,
};
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use protocol::quant::{LinearMeta, ProductCodec};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Inner and outer dimension of the product.
const FEATURES: usize = 2048;
/// Output columns of a tile, as a worker sends them.
const TILE_COLUMNS: usize = 256;
const SEED: MaskSeed = MaskSeed::from_bytes([5; 32]);
/// What a figure is measured for.
const PATIENCE: Duration = Duration::from_millis(600);

fn main() {
    // One thread, so that figures are per core.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("no pool was built before");
    for set in [ParameterSet::P24, ParameterSet::P32] {
        masks(set);
    }
    for size in [1024, 256] {
        transforms(size);
    }
    for tokens in [1024, 4096] {
        let planned = |body_bits, output_bits| Precision { body_bits, output_bits, ..whole(ParameterSet::P24) };
        for precision in [whole(ParameterSet::P24), planned(22, 10), planned(20, 12), whole(ParameterSet::P32)] {
            polynomials(precision, tokens);
        }
    }
    rotation(1024);
}

/// Whole bytes, with as many of the mask product as the planner has kept.
fn whole(set: ParameterSet) -> Precision {
    let standard = Precision::standard(set);
    Precision { mask_limbs: standard.mask_limbs.min(2 + u8::from(set != ParameterSet::P24)), ..standard }
}

/// Fastest of as many runs of `act` on a fresh `prepare()` as there is patience for, in seconds.
fn fastest<T, R>(mut prepare: impl FnMut() -> T, mut act: impl FnMut(T) -> R) -> f64 {
    let began = Instant::now();
    let mut best = f64::INFINITY;
    while began.elapsed() < PATIENCE || best.is_infinite() {
        let input = prepare();
        let start = Instant::now();
        let output = black_box(act(input));
        best = best.min(start.elapsed().as_secs_f64());
        drop(output);
    }
    best
}

fn domain(set: ParameterSet) -> MaskDomain {
    MaskDomain { set, product: LinearId { layer: 0, group: Group::Qkv }.along(Direction::Forward) }
}

fn masks(set: ParameterSet) {
    let domain = domain(set);
    let mut bytes = vec![0; 64 * domain.column_bytes()];
    let gigabytes = bytes.len() as f64 / 1e9;
    let keystream = fastest(|| (), |()| expand(&SEED, &domain, 0..64, black_box(&mut bytes)));
    let planes = fastest(|| (), |()| expand_planes(&SEED, &domain, 0..64));
    println!("{set} masks: keystream {:.2} GB/s, as planes {:.2} GB/s", gigabytes / keystream, gigabytes / planes);
}

fn transforms(size: usize) {
    const COUNT: usize = 64;
    let ring = Ring::of_size(size);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let coefficients: Vec<f64> = (0..size).map(|_| rng.random_range(-1.0..1.0)).collect();
    let mut working = vec![0.0; ring.working_numbers()];
    let mut polynomials = vec![coefficients; COUNT];
    let forward = fastest(
        || (),
        |()| {
            polynomials.iter_mut().for_each(|polynomial| {
                ring.forward(black_box(polynomial), &mut working);
                polynomial[0] = 1.0;
            })
        },
    );
    let inverse = fastest(
        || (),
        |()| polynomials.iter_mut().for_each(|polynomial| ring.inverse(black_box(polynomial), &mut working)),
    );
    let [forward, inverse] = [forward, inverse].map(|seconds| 1e6 * seconds / COUNT as f64);
    println!("N = {size}: forward transform {forward:.2} µs, inverse {inverse:.2} µs");
}

fn polynomials(precision: Precision, tokens: usize) {
    let set = precision.set;
    let domain = domain(set);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let rows: Vec<f32> = (0..tokens * FEATURES).map(|_| rng.random_range(-1.0..1.0)).collect();
    let steps = vec![1e6; tokens];
    let plaintext = Plaintext { rows: &rows, tokens, features: FEATURES, steps: &steps };
    let encrypt = || encrypt(&SEED, &domain, precision, plaintext).expect("the rows fit");
    let encryption = fastest(|| (), |()| encrypt());

    let mut tile = |rows, bits: u32, first_column| {
        let mut planes = Planes::zeros_of_bits(bits, rows, TILE_COLUMNS);
        rng.fill_bytes(planes.bytes_mut());
        ProductTile { first_column, rows: planes }
    };
    let mask_tiles: Vec<_> = (0..FEATURES)
        .step_by(TILE_COLUMNS)
        .map(|first| tile(set.mask_rows(), 8 * u32::from(precision.mask_limbs), first))
        .collect();
    let build = || -> Arc<MaskProduct> {
        let mut builder = MaskProductBuilder::new(precision, FEATURES).expect("a valid precision");
        mask_tiles.iter().for_each(|tile| builder.tile(tile).expect("a tile that fits"));
        Arc::new(builder.finish().expect("all tiles came").unchecked())
    };
    let masks = build();
    let loading = fastest(|| (), |()| build());

    let tiles: Vec<_> =
        (0..FEATURES).step_by(TILE_COLUMNS).map(|first| tile(tokens, precision.output_bits.into(), first)).collect();
    let ticket = || {
        let mut out = Buffer::scratch(tokens * FEATURES);
        out.fill(0.0);
        (encrypt().1.open(Arc::clone(&masks), precision, out).expect("a valid precision"), tiles.clone())
    };
    let decryption = fastest(ticket, |(mut decryption, tiles)| {
        tiles.into_iter().for_each(|tile| decryption.tile(tile).expect("a tile that fits"));
        decryption.finish().expect("all tiles came")
    });
    let per_polynomial = |seconds: f64| 1e6 * seconds / (FEATURES * tokens / 1024) as f64;
    println!(
        "{precision}, {tokens} tokens × {FEATURES}: encrypt {:.2} µs, decrypt {:.2} µs per polynomial; \
         mask product {:.2} µs per column of {}",
        per_polynomial(encryption),
        per_polynomial(decryption),
        1e6 * loading / FEATURES as f64,
        set.mask_rows(),
    );
}

fn rotation(tokens: usize) {
    let norm = 40.0 * (FEATURES as f64).sqrt();
    let meta = LinearMeta {
        shape: LinearShape { d_in: FEATURES, d_out: FEATURES },
        scales: vec![0.01; FEATURES],
        max_column_norm: norm,
        max_row_norm: norm,
        rms_column_norm: norm,
        rms_row_norm: norm,
        weight_error: 0.008,
    };
    let codec = ProductCodec::new(&meta, Direction::Forward, Precision::standard(ParameterSet::P32))
        .expect("consistent metadata");
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let rows: Vec<f32> = (0..tokens * FEATURES).map(|_| rng.random_range(-1.0..1.0)).collect();
    let prepare = || codec.prepare(&rows, tokens).expect("finite rows");
    let preparing = fastest(|| (), |()| prepare());
    let scales = prepare().scales;
    let mut out = rows.clone();
    let finishing = fastest(|| (), |()| codec.finish(&mut out, &scales).expect("rows of this shape"));
    let [preparing, finishing] = [preparing, finishing].map(|seconds| 1e9 * seconds / rows.len() as f64);
    println!("{tokens} tokens × {FEATURES}: rotate and encode {preparing:.2} ns a value, back {finishing:.2} ns");
}
