//! The whole model on a tiny random checkpoint.

#![allow(clippy::unwrap_used)]

mod continued;
mod families;

use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use protocol::buffer::Buffer;
use protocol::ids::{Direction, Group, LinearId, ProductId};

use super::*;
use crate::backend::{BackendError, PlainBackend, Product};
use crate::lora::{Layers, LoraConfig, NamedToken, Projection};
use crate::testing::{TinyModel, nudge};

const DRAW: Draw = Draw { seed: 5, step: 0, micro_batch: 0 };

/// Two sequences of different lengths, and padding.
fn batch() -> MicroBatch {
    let tokens: Vec<u32> = (0..14).map(|i| i * 11 % 50).collect();
    let mut targets: Vec<u32> = tokens.iter().skip(1).copied().chain([IGNORED]).collect();
    for position in [0, 6, 11, 12, 13] {
        targets[position] = IGNORED;
    }
    MicroBatch { lengths: vec![7, 5], multiple: 7, tokens, targets, numbers: Vec::new() }
}

fn adapters(model: &TinyModel, config: &LoraConfig) -> LoraAdapters {
    let adapters = LoraAdapters::new(model.config(), config, 3).unwrap();
    // B starts at zero, where A has no gradient: move away.
    for (i, var) in adapters.parameters().iter().enumerate() {
        nudge(var, i as u64, 0.3);
    }
    adapters
}

fn numbers(tokens: &[u32]) -> Vec<NamedToken> {
    tokens.iter().copied().map(NamedToken::Number).collect()
}

#[test]
fn gradients_of_the_adapters_are_finite_differences() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let norms = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    for (dropout, saved, tokens) in
        [(0.0, &[][..], &[22, 3, 33][..]), (0.3, &["norm"], &[]), (0.0, &["layers.1.input_layernorm"], &[])]
    {
        let (modules_to_save, trainable_token_indices) = (norms(saved), numbers(tokens));
        let config = LoraConfig {
            rank: 2,
            alpha: 3.0,
            dropout,
            modules_to_save,
            trainable_token_indices,
            ..LoraConfig::default()
        };
        let adapters = adapters(&tiny, &config);
        let loss = || llama.gradient(&batch(), &adapters, DRAW).unwrap().0;
        let gradients = llama.gradient(&batch(), &adapters, DRAW).unwrap().1;
        for (index, (var, gradient)) in adapters.parameters().into_iter().zip(gradients).enumerate() {
            // Along the gradient itself the change is largest, so rounding matters least.
            let gradient = Tensor::from_vec(gradient, var.shape(), &Device::Cpu).unwrap();
            let norm = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt());
            assert!(norm > 1e-4, "parameter {index} has no gradient");
            let (start, step) = (var.as_tensor().copy().unwrap(), 5e-3);
            let along = (gradient / norm).unwrap();
            var.set(&(&start + (&along * step).unwrap()).unwrap()).unwrap();
            let above = loss();
            var.set(&(&start - (&along * step).unwrap()).unwrap()).unwrap();
            let below = loss();
            var.set(&start).unwrap();
            let measured = (above - below) / (2.0 * step);
            assert!((measured / norm - 1.0).abs() < 0.01, "parameter {index}: {measured} for {norm}");
        }
    }
}

#[test]
fn fresh_adapters_change_nothing() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let fresh = LoraAdapters::new(tiny.config(), &LoraConfig { dropout: 0.5, ..LoraConfig::default() }, 3).unwrap();
    let plain = llama.evaluate(&batch(), None).unwrap();
    assert_eq!(llama.evaluate(&batch(), Some(&fresh)).unwrap(), plain);
    let moved = adapters(&tiny, &LoraConfig::default());
    assert!((llama.evaluate(&batch(), Some(&moved)).unwrap() - plain).abs() > 1e-3);
}

#[test]
fn padding_changes_no_loss() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let loss = llama.evaluate(&batch(), None).unwrap();
    let mut other = batch();
    (other.tokens[12], other.tokens[13]) = (1, 2);
    assert_eq!(llama.evaluate(&other, None).unwrap(), loss);
}

#[test]
fn sequences_side_by_side_learn_what_each_learns_alone() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let adapters = adapters(&tiny, &LoraConfig { rank: 2, ..LoraConfig::default() });
    let sequence = |n: u32| -> Vec<u32> { (0..3 + 17 * n % 40).map(|i| (i * i + 7 * n) % 50).collect() };
    let sequences: Vec<Vec<u32>> = (0..6).map(sequence).collect();
    let of = |sequences: &[Vec<u32>], multiple| {
        let targets = |tokens: &[u32]| tokens[1..].iter().copied().chain([IGNORED]).collect();
        MicroBatch::new(sequences.iter().map(|tokens| (&tokens[..], targets(tokens))), 3, multiple)
    };
    let (mut loss, mut sum) = (0.0, Vec::new());
    for alone in &sequences {
        let (one, gradients) = llama.gradient(&of(std::slice::from_ref(alone), 1), &adapters, DRAW).unwrap();
        loss += one;
        sum.resize_with(gradients.len(), Vec::new);
        for (sum, gradient) in sum.iter_mut().zip(gradients) {
            sum.resize(gradient.len(), 0.0);
            sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += f64::from(g));
        }
    }
    // Alone, exactly, and with so much padding that it is cut itself.
    for multiple in [1, 64, 1000] {
        let together = of(&sequences, multiple);
        assert!(together.tokens.len().is_multiple_of(multiple));
        let (found, gradients) = llama.gradient(&together, &adapters, DRAW).unwrap();
        assert!((found / loss - 1.0).abs() < 1e-5, "{found} for {loss}");
        for (index, (found, expected)) in gradients.iter().zip(&sum).enumerate() {
            let off: f64 = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
            let norm: f64 = expected.iter().map(|g| g * g).sum();
            assert!(off.sqrt() < 1e-5 * norm.sqrt(), "parameter {index}: off by {} of {}", off.sqrt(), norm.sqrt());
        }
    }
}

#[test]
fn no_gradient_is_asked_below_the_lowest_adapter() {
    struct Recording(PlainBackend, Mutex<Vec<ProductId>>);
    impl LinearBackend for Recording {
        fn apply(&self, product: ProductId, rows: Arc<Buffer>, n: usize) -> Result<Product, BackendError> {
            self.1.lock().unwrap().push(product);
            self.0.apply(product, rows, n)
        }
    }
    let tiny = TinyModel::new();
    let id = |layer, group| LinearId { layer, group };
    let all = Group::ALL.map(|group| id(1, group));
    let above = [Group::O, Group::GateUp, Group::Down];
    for (module, layers, norm, expected) in [
        (Projection::Q, Layers::All, [&above.map(|group| id(0, group))[..], &all].concat()),
        (Projection::Up, Layers::All, [&[id(0, Group::Down)][..], &all].concat()),
        (Projection::Down, Layers::All, all.to_vec()),
        (Projection::Q, Layers::Top(1), above.map(|group| id(1, group)).to_vec()),
        (Projection::Down, Layers::These([1].into()), vec![]),
    ]
    .map(|(module, layers, expected)| (module, layers, "", expected))
    .into_iter()
    .chain([
        (Projection::Down, Layers::Top(1), "layers.1.input_layernorm", all.to_vec()),
        (
            Projection::Down,
            Layers::Top(1),
            "layers.1.post_attention_layernorm",
            vec![id(1, Group::GateUp), id(1, Group::Down)],
        ),
        (Projection::Down, Layers::Top(1), "model.norm", vec![]),
        (
            Projection::Down,
            Layers::Top(1),
            "layers.0.input_layernorm",
            [Group::ALL.map(|group| id(0, group)), all].concat(),
        ),
    ]) {
        let backend = Arc::new(Recording(PlainBackend::new(&tiny.model).unwrap(), Mutex::default()));
        let llama = Llama::new(tiny.model.clone(), backend.clone()).unwrap();
        let modules_to_save = if norm.is_empty() { Vec::new() } else { vec![norm.to_owned()] };
        let config = LoraConfig { target_modules: vec![module], layers, modules_to_save, ..LoraConfig::default() };
        let adapters = LoraAdapters::new(tiny.config(), &config, 0).unwrap();
        llama.gradient(&batch(), &adapters, DRAW).unwrap();
        let mut asked: Vec<LinearId> =
            backend.1.lock().unwrap().iter().filter(|p| p.direction == Direction::Backward).map(|p| p.linear).collect();
        asked.sort();
        assert_eq!(asked, expected, "adapter on {module:?} of {:?}, {norm}", config.layers);
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    let llama = TinyModel::new().llama();
    let mut unknown = batch();
    unknown.tokens[3] = u32::MAX - 1;
    let (mut short, mut long, mut empty) = (batch(), batch(), batch());
    short.targets.pop();
    long.lengths.push(3);
    empty.lengths.push(0);
    for (spoiled, message) in
        [(unknown, "token 4294967294"), (short, "13 targets"), (long, "[7, 5, 3]"), (empty, "[7, 5, 0]")]
    {
        let error = llama.evaluate(&spoiled, None).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_backend_that_fails_or_answers_short_is_an_error() {
    struct Broken(Option<usize>);
    impl LinearBackend for Broken {
        fn apply(&self, product: ProductId, _: Arc<Buffer>, _: usize) -> Result<Product, BackendError> {
            let fail = || BackendError { product, why: "nobody is there".into() };
            self.0.map(|length| Product::of_owner(Buffer::zeroed(length))).ok_or_else(fail)
        }
    }
    let tiny = TinyModel::new();
    for (broken, message) in [(Broken(None), "nobody is there"), (Broken(Some(3)), "3 values")] {
        let llama = Llama::new(tiny.model.clone(), Arc::new(broken)).unwrap();
        let error = llama.evaluate(&batch(), None).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("layer 0 qkv"), "{error}");
    }
}

#[test]
fn the_backward_pass_starts_from_the_loss_that_evaluation_finds() {
    let tiny = TinyModel::new();
    let llama = tiny.llama();
    let adapters = adapters(&tiny, &LoraConfig::default());
    let (loss, gradients) = llama.gradient(&batch(), &adapters, DRAW).unwrap();
    assert_eq!(loss, llama.evaluate(&batch(), Some(&adapters)).unwrap());
    assert!(gradients.iter().map(Vec::len).eq(adapters.parameters().iter().map(|var| var.elem_count())));
}

#[test]
fn a_served_head_gives_the_loss_and_the_gradients_of_one_at_home() {
    let tiny = TinyModel::new();
    let served = Arc::new(PlainBackend::with_head(&tiny.model).unwrap());
    let served = Llama::new(tiny.model.clone(), served).unwrap();
    let adapters = adapters(&tiny, &LoraConfig::default());
    let (loss, gradients) = tiny.llama().gradient(&batch(), &adapters, DRAW).unwrap();
    let (of_served, same) = served.gradient(&batch(), &adapters, DRAW).unwrap();
    assert!((of_served / loss - 1.0).abs() < 1e-5, "{of_served} for {loss}");
    assert!((served.evaluate(&batch(), Some(&adapters)).unwrap() / loss - 1.0).abs() < 1e-5);
    for (index, (found, expected)) in same.iter().zip(&gradients).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
        let off = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
        assert!(off <= 1e-8 * norm(&mut expected.iter().copied()), "parameter {index}");
    }
}

/// A plain backend that is said to be as coarse as an encrypted one.
struct Coarse(PlainBackend);

impl LinearBackend for Coarse {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        self.0.apply(product, rows, tokens)
    }

    fn asks_workers(&self) -> bool {
        true
    }
}

#[test]
fn what_waits_for_the_way_back_is_rounded_where_products_are_coarse() {
    let tiny = TinyModel::new();
    let coarse = Arc::new(Coarse(PlainBackend::new(&tiny.model).unwrap()));
    let coarse = Llama::new(tiny.model.clone(), coarse).unwrap();
    let adapters = adapters(&tiny, &LoraConfig::default());
    let (loss, gradients) = tiny.llama().gradient(&batch(), &adapters, DRAW).unwrap();
    let (same, rounded) = coarse.gradient(&batch(), &adapters, DRAW).unwrap();
    assert_eq!(loss, same, "nothing is rounded on the way there");
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
    let off = norm(&mut rounded.iter().flatten().zip(gradients.iter().flatten()).map(|(a, b)| a - b));
    let whole = norm(&mut gradients.iter().flatten().copied());
    assert!(off > 0.0 && off.sqrt() < 2e-2 * whole.sqrt(), "{off} of {whole}");
}
