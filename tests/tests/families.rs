//! Each family of models over a real worker: what the tiny models of `tests/families` learn encrypted is what they learn in
//! the plain. That the plain is right is a matter of the transformer's own tests.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use tests::{PLAIN, Run, SETTINGS};

/// Two steps: the second one's loss shows the gradients of the first.
const STEPS: [&str; 2] = ["--steps", "2"];

fn follows(family: &str) {
    let run = Run::with(SETTINGS, 1);
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("families").join(family);
    for file in ["config.json", "model.safetensors"] {
        fs::copy(made.join(file), run.model.join(file)).unwrap();
    }
    let (worker, address) = run.worker(1, &[]);
    run.owner_over(&[&address], "encrypted", &STEPS).finish().succeeded();
    run.train("plain", &[&PLAIN[..], &STEPS].concat());
    run.assert_follows("encrypted", "plain");
    let (found, expected) = (run.losses("encrypted"), run.losses("plain"));
    println!("{family}: {found:?} beside {expected:?}");
    worker.interrupt();
    worker.finish().succeeded();
}

#[test]
fn llama_with_biases() {
    follows("llama-biases");
}

#[test]
fn mistral() {
    follows("mistral");
}

#[test]
fn qwen_2() {
    follows("qwen2");
}

#[test]
fn qwen_3() {
    follows("qwen3");
}

#[test]
fn smollm_3() {
    follows("smollm3");
}

#[test]
fn olmo_2() {
    follows("olmo2");
}

#[test]
fn phi_3() {
    follows("phi3");
}

#[test]
fn gemma_2() {
    follows("gemma2");
}

#[test]
fn gemma_3() {
    follows("gemma3");
}

#[test]
fn gemma_3_with_images() {
    follows("gemma3-images");
}
