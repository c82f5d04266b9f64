//! Every operation against candle's primitive operations and their gradients.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use candle_core::{D, DType, Device, Result, Tensor, Var};
use protocol::model::{Direction, Group, LinearId, LinearShape};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::*;
use crate::backend::{BackendError, LinearBackend};
use crate::buffer::Buffer;
use crate::data::IGNORED;
use crate::lora::{Draw, Dropout, Projection, Slot};

fn random(seed: u64, shape: &[usize]) -> Var {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(-1.5f32..1.5)).collect::<Vec<_>>();
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn assert_close(what: &str, ours: &Tensor, reference: &Tensor) {
    assert_eq!(ours.dims(), reference.dims(), "{what}: shape");
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (error, size) = (norm(&(ours - reference).unwrap()), norm(reference));
    assert!(error <= 2e-5 * size.max(1e-3), "{what}: off by {error} of {size}");
}

/// Compares values and the gradients of a random weighting of the outputs with respect to every variable.
fn compare(vars: &[&Var], ours: impl Fn() -> Result<Tensor>, reference: impl Fn() -> Result<Tensor>) {
    let (ours, reference) = (ours().unwrap(), reference().unwrap());
    assert_close("value", &ours, &reference);
    let weights = random(99, ours.dims());
    let gradients = |out: &Tensor| (out * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (ours, reference) = (gradients(&ours), gradients(&reference));
    for (i, var) in vars.iter().enumerate() {
        assert_close(&format!("gradient of argument {i}"), ours.get(var).unwrap(), reference.get(var).unwrap());
    }
}

#[test]
fn rms_norm() {
    let (x, weight) = (random(1, &[5, 37]), random(2, &[37]));
    let values: Vec<f32> = weight.to_vec1().unwrap();
    compare(
        &[&x],
        || x.apply_op1(RmsNorm { weight: values.clone().into(), eps: 1e-2 }),
        || {
            let root = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-2)?.sqrt()?;
            x.broadcast_div(&root)?.broadcast_mul(&weight.detach())
        },
    );
}

#[test]
fn swiglu() {
    let both = random(3, &[4, 26]);
    compare(
        &[&both],
        || both.apply_op1(SwiGlu { features: 13 }),
        || candle_nn::ops::silu(&both.narrow(1, 0, 13)?)?.mul(&both.narrow(1, 13, 13)?),
    );
}

/// `x·cos + rotate_half(x)·sin`, as Hugging Face writes it; `x` is `batch × length × heads × head_dim`.
fn turned_by_definition(x: &Tensor, frequencies: &[f32]) -> Result<Tensor> {
    let (_, length, _, d) = x.dims4()?;
    let positions = Tensor::arange(0f32, length as f32, &Device::Cpu)?.reshape((length, 1))?;
    let angles = positions.matmul(&Tensor::new(frequencies, &Device::Cpu)?.reshape((1, d / 2))?)?;
    let angles = Tensor::cat(&[&angles, &angles], 1)?.reshape((1, length, 1, d))?;
    let (low, high) = (x.narrow(3, 0, d / 2)?, x.narrow(3, d / 2, d / 2)?);
    let half_turned = Tensor::cat(&[high.neg()?, low], 3)?;
    x.broadcast_mul(&angles.cos()?)? + half_turned.broadcast_mul(&angles.sin()?)?
}

#[test]
fn attention_of_grouped_heads_over_several_blocks() {
    let (batch, length, heads, kv_heads, d) = (2, 70, 4, 2, 6);
    let frequencies = [1.0f32, 0.3, 0.05];
    let qkv = random(4, &[batch * length, (heads + 2 * kv_heads) * d]);
    let rope = Arc::new(RopeTable::new(&frequencies, length));
    compare(
        &[&qkv],
        || qkv.apply_op1(CausalAttention { batch, length, heads, kv_heads, head_dim: d, rope: rope.clone() }),
        || {
            let part =
                |first: usize, count: usize| qkv.narrow(1, first * d, count * d)?.reshape((batch, length, count, d));
            let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
            let repeated = |x: Tensor| {
                let x = x.reshape((batch, length, kv_heads, 1, d))?;
                x.broadcast_as((batch, length, kv_heads, heads / kv_heads, d))?.reshape((batch, length, heads, d))
            };
            let q = by_head(turned_by_definition(&part(0, heads)?, &frequencies)?)?;
            let k = by_head(repeated(turned_by_definition(&part(heads, kv_heads)?, &frequencies)?)?)?;
            let v = by_head(repeated(part(heads + kv_heads, kv_heads)?)?)?;
            let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * (d as f64).sqrt().recip())?;
            let hidden: Vec<f32> =
                (0..length * length).map(|i| if i % length > i / length { -1e9 } else { 0.0 }).collect();
            let scores = scores.broadcast_add(&Tensor::from_vec(hidden, (1, 1, length, length), &Device::Cpu)?)?;
            let out = candle_nn::ops::softmax(&scores, 3)?.matmul(&v)?;
            out.transpose(1, 2)?.reshape((batch * length, heads * d))
        },
    );
}

#[test]
fn loss_in_chunks_of_any_size_and_without_targets() {
    let (tokens, features, vocabulary) = (11, 8, 29);
    let (hidden, head) = (random(5, &[tokens, features]), random(6, &[vocabulary, features]));
    let head_values: Arc<[f32]> = head.flatten_all().unwrap().to_vec1::<f32>().unwrap().into();
    let targets: Vec<u32> = (0..tokens as u32).map(|i| if i % 3 == 1 { IGNORED } else { i * 7 % 29 }).collect();
    let lossy: Vec<u32> = (0..tokens as u32).filter(|i| i % 3 != 1).collect();
    let kept = Tensor::new(lossy.clone(), &Device::Cpu).unwrap();
    let labels: Vec<u32> = lossy.iter().map(|&i| targets[i as usize]).collect();
    let labels = Tensor::new(labels, &Device::Cpu).unwrap();
    for chunk in [1, 3, 8, 100] {
        compare(
            &[&hidden],
            || hidden.apply_op1(HeadLoss::new(head_values.clone(), features, targets.clone(), true).with_chunk(chunk)),
            || {
                let logits = hidden.index_select(&kept, 0)?.matmul(&head.detach().t()?)?;
                candle_nn::loss::cross_entropy(&logits, &labels)? * lossy.len() as f64
            },
        );
    }
    let nothing = HeadLoss::new(head_values, features, vec![IGNORED; tokens], true);
    let loss = hidden.apply_op1(nothing).unwrap();
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
    let gradient = loss.backward().unwrap().get(&hidden).unwrap().clone();
    assert_eq!(gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
}

/// Multiplies by one matrix and remembers which ways it was asked.
struct Recording {
    weights: Tensor,
    asked: Mutex<Vec<Direction>>,
}

impl LinearBackend for Recording {
    fn apply(
        &self,
        _linear: LinearId,
        direction: Direction,
        rows: Arc<Buffer>,
        tokens: usize,
    ) -> std::result::Result<Buffer, BackendError> {
        self.asked.lock().unwrap().push(direction);
        let rows = Tensor::from_slice(&rows, (tokens, rows.len() / tokens), &Device::Cpu).unwrap();
        let weights = match direction {
            Direction::Forward => self.weights.clone(),
            Direction::Backward => self.weights.t().unwrap(),
        };
        Ok(rows.matmul(&weights).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().into())
    }
}

#[test]
fn product_with_adapters_on_two_of_three_slices() {
    let shape = LinearShape { d_in: 10, d_out: 14 };
    let (tokens, rank) = (6, 3);
    let slots: Arc<[Slot]> = [
        Slot { projection: Projection::Q, offset: 0, d_out: 6, column: 0 },
        Slot { projection: Projection::V, offset: 10, d_out: 4, column: 6 },
    ]
    .into();
    let weights = random(7, &[10, 14]).detach();
    let (x, a, b) = (random(8, &[tokens, 10]), random(9, &[2 * rank, 10]), random(10, &[10 * rank]));
    let linear = LinearId { layer: 0, group: Group::Qkv };
    for rate in [0.0, 0.4] {
        let backend = Arc::new(Recording { weights: weights.clone(), asked: Mutex::default() });
        let draw = Draw { seed: 1, step: 1, micro_batch: 0 };
        let dropout = |slot: u8| Dropout::new(rate, draw, 0, slot);
        let product = |input_gradient| AdaptedProduct {
            base: BaseProduct { backend: backend.clone(), linear, shape },
            adapter: Adapter {
                slots: slots.clone(),
                rank,
                scaling: 0.7,
                dropout: (rate > 0.0).then(|| vec![dropout(0), dropout(1)]),
            },
            input_gradient,
        };
        compare(
            &[&x, &a, &b],
            || x.apply_op3(&a, &b, product(true)),
            || {
                let part = |slot: usize, first: usize, d_out: usize| {
                    let factors =
                        Tensor::from_vec(dropout(slot as u8).factors(tokens, 10), (tokens, 10), &Device::Cpu)?;
                    let up = b.narrow(0, first * rank, d_out * rank)?.reshape((d_out, rank))?;
                    let down = a.narrow(0, slot * rank, rank)?;
                    (x.as_tensor() * factors)?.matmul(&down.t()?)?.matmul(&up.t()?)? * 0.7
                };
                let untouched = Tensor::zeros((tokens, 4), DType::F32, &Device::Cpu)?;
                x.matmul(&weights)? + Tensor::cat(&[part(0, 0, 6)?, untouched, part(1, 6, 4)?], 1)?
            },
        );
        assert_eq!(*backend.asked.lock().unwrap(), [Direction::Forward, Direction::Backward]);

        let y = x.detach().apply_op3(&a, &b, product(false)).unwrap();
        y.sum_all().unwrap().backward().unwrap();
        let asked = backend.asked.lock().unwrap().clone();
        assert_eq!(asked[2..], [Direction::Forward], "the gradient of an input that nobody trains was asked for");
    }
}

#[test]
fn a_backend_that_fails_or_answers_short_is_an_error() {
    struct Broken(Option<usize>);
    impl LinearBackend for Broken {
        fn apply(
            &self,
            linear: LinearId,
            direction: Direction,
            _: Arc<Buffer>,
            _: usize,
        ) -> std::result::Result<Buffer, BackendError> {
            let fail = || BackendError { linear, direction, why: "nobody is there".into() };
            self.0.map(Buffer::zeroed).ok_or_else(fail)
        }
    }
    let x = random(11, &[2, 4]);
    for (broken, message) in [(Broken(None), "nobody is there"), (Broken(Some(3)), "3 values")] {
        let linear = LinearId { layer: 3, group: Group::O };
        let base = BaseProduct { backend: Arc::new(broken), linear, shape: LinearShape { d_in: 4, d_out: 4 } };
        let error = x.apply_op1(base).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("layer 3 o"), "{error}");
    }
}
