//! Speed of the owner's half of the scheme on one core: masks, encryption, decryption, per polynomial of `N` tokens.

#![allow(missing_docs)] // of the function that criterion_group! makes

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protocol::he::mask::{expand, expand_planes};
use protocol::he::{MaskDomain, MaskSeed, ParameterSet, Plaintext, Planes, Precision, ProductTile, encrypt};
use protocol::model::{Direction, Group, LinearId};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FEATURES: usize = 512;
const SEED: MaskSeed = MaskSeed::from_bytes([5; 32]);

fn domain(set: ParameterSet) -> MaskDomain {
    MaskDomain { set, linear: LinearId { layer: 0, group: Group::Qkv }, direction: Direction::Forward }
}

fn masks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mask");
    for set in [ParameterSet::P24, ParameterSet::P32] {
        let domain = domain(set);
        let mut bytes = vec![0; FEATURES * domain.column_bytes()];
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("keystream/{set}"), |bencher| {
            bencher.iter(|| expand(&SEED, &domain, 0..FEATURES, black_box(&mut bytes)));
        });
        group.bench_function(format!("planes/{set}"), |bencher| {
            bencher.iter(|| expand_planes(&SEED, &domain, 0..FEATURES));
        });
    }
    group.finish();
}

/// One secret, so that an element of the throughput is one polynomial.
fn polynomials(criterion: &mut Criterion) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut group = criterion.benchmark_group("polynomial");
    group.throughput(Throughput::Elements(FEATURES as u64));
    for set in [ParameterSet::P24, ParameterSet::P32] {
        let tokens = set.polynomial_size();
        let rows: Vec<f32> = (0..tokens * FEATURES).map(|_| rng.random_range(-1.0..1.0)).collect();
        let steps = vec![1e6; tokens];
        let plaintext = Plaintext { rows: &rows, tokens, features: FEATURES, steps: &steps };
        let encrypt = || encrypt(&SEED, &domain(set), plaintext).expect("the rows fit");
        group.bench_function(format!("encrypt/{set}"), |bencher| bencher.iter(encrypt));

        let precision = Precision::standard(set);
        let mut planes = |rows| {
            let mut planes = Planes::zeros(usize::from(precision.output_limbs), rows, FEATURES);
            rng.fill_bytes(planes.bytes_mut());
            planes
        };
        let tile = ProductTile { first_column: 0, mask: planes(set.mask_rows()), body: planes(tokens) };
        let mut out = vec![0.0; tokens * FEATURES];
        group.bench_function(format!("decrypt/{precision}"), |bencher| {
            bencher.iter_batched(
                || encrypt().1.open(precision, FEATURES).expect("a valid precision"),
                |mut decryption| decryption.tile(&tile, &mut out).expect("a tile that fits"),
                criterion::BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn configuration() -> Criterion {
    // One thread, so that figures are per core.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("no pool was built before");
    Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(2))
}

criterion_group! {
    name = benches;
    config = configuration();
    targets = masks, polynomials
}
criterion_main!(benches);
