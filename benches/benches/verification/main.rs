//! The verification of products, on the products of a real model: what it costs, what the sketched step gains, how often rows
//! wrap, and what passes of products that are honest or forged.
//!
//! `cargo bench -p benches --bench verification -- MODEL DATA [cost|steps|honest|forged] [COUNT]`
//!
//! MODEL is a model's folder or file, DATA a JSONL file of text. Rows are those of one training step on some examples, of
//! every matrix in both directions, recorded while the plain backend computes it.
//!
//! - `cost`: seconds and memory of drawing the checks of all matrices, of checking all mask products, and of the checks of
//!   bodies beside encryption and decryption;
//! - `steps`: for each matrix of a layer and direction, how many bits the sketched step is finer than the provable one, and how
//!   many rows wrap once and more often, for several bounds;
//! - `honest`: COUNT honest products of eight rows: the largest noise, and how many were refused;
//! - `forged`: COUNT forged products of eight rows, by kind: how many were refused, and what the others did to a row; and a
//!   tenth as many forged mask products.

mod cost;
mod products;
mod record;
mod steps;
mod trials;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use protocol::model::Model;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [model, data, rest @ ..] = &arguments[..] else {
        bail!("a model and a file of text are needed: -- MODEL DATA [cost|steps|honest|forged] [COUNT]");
    };
    let model = Arc::new(Model::open(model)?);
    let what = rest.first().map_or("cost", String::as_str);
    let count = rest.get(1).map_or(Ok(1000), |count| count.parse()).context("COUNT is a number")?;
    let rows = record::rows_of_a_step(&model, Path::new(data))?;
    match what {
        "cost" => cost::measure(&model, &rows),
        "steps" => steps::measure(&model, &rows),
        "honest" => trials::honest(&model, &rows, count),
        "forged" => trials::forged(&model, &rows, count),
        other => bail!("`{other}` is none of cost, steps, honest, forged"),
    }
}

/// Processor time of this process so far, over all its threads.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec, which is all that the call writes.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "the process has a clock");
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}

/// Processor seconds that something takes, and what it gives.
fn timed<T>(act: impl FnOnce() -> T) -> (f64, T) {
    let before = processor_seconds();
    let result = act();
    (processor_seconds() - before, result)
}
