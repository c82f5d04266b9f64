//! Every operation against candle's primitive operations and their gradients.

#![allow(clippy::unwrap_used)]

use candle_core::{D, DType, Device, Result, Tensor, Var};
use proptest::prelude::*;
use protocol::ids::LinearShape;
use protocol::model::{Activation, ModelError, Rope};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::rows::{ROWS, block};
use super::sequences::Sequence;
use super::*;
use crate::data::IGNORED;
use crate::lora::{Draw, Dropout, Projection, Slot, Values};

fn random(seed: u64, shape: &[usize]) -> Var {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(-1.5f32..1.5)).collect::<Vec<_>>();
    Var::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn norm(values: impl IntoIterator<Item = f32>) -> f32 {
    values.into_iter().map(|x| x * x).sum::<f32>().sqrt()
}

fn assert_close(what: &str, ours: &[f32], reference: &Tensor) {
    assert_close_beside(what, ours, reference, 1e-3);
}

/// The same, where what was added up to the reference had this size at least.
fn assert_close_beside(what: &str, ours: &[f32], reference: &Tensor, terms: f32) {
    let reference = values(reference);
    assert_eq!(ours.len(), reference.len(), "{what}: size");
    let error = norm(ours.iter().zip(&reference).map(|(a, b)| a - b));
    let size = norm(reference.iter().copied()).max(terms);
    assert!(error <= 2e-5 * size, "{what}: off by {error} of {size}");
}

/// The gradients that candle finds for `out` weighted by `weights`, one for each variable.
fn gradients(out: &Tensor, weights: &Tensor, vars: &[&Var]) -> Vec<Tensor> {
    let gradients = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| gradients.get(var).unwrap().clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rms_norm(rows in 1usize..6, features in 1usize..80, seed in 0u64..1000) {
        let (x, weight) = (random(seed, &[rows, features]), random(seed + 1, &[features]));
        let root = ((x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-2).unwrap()).sqrt().unwrap();
        let reference = x.broadcast_div(&root).unwrap().broadcast_mul(&weight.detach()).unwrap();
        let weight_var = weight;
        let weight = values(&weight_var);
        let rms = RmsNorm { weight: &weight, eps: 1e-2 };
        let mut y = vec![0.0; rows * features];
        rms.forward(&values(&x), &mut y);
        assert_close("value", &y, &reference);

        let (dy, past) = (random(seed + 2, &[rows, features]), random(seed + 3, &[rows, features]));
        let trained = x.broadcast_div(&root).unwrap().broadcast_mul(weight_var.as_tensor()).unwrap();
        let dweight = gradients(&trained, &dy, &[&weight_var]).remove(0);
        // What rows and features give cancels out, where there are one or two of them.
        let terms = norm(values(&dy)) / 16.0;
        let found = rms.gradient_of_weight(&values(&x), &values(&dy));
        assert_close_beside("gradient of the weight", &found, &dweight, terms);
        let dx = gradients(&reference, &dy, &[&x]).remove(0);
        let mut gradient = values(&dy);
        rms.backward(&values(&x), None, &mut gradient);
        assert_close_beside("gradient", &gradient, &dx, terms);
        let mut gradient = values(&dy);
        rms.backward(&values(&x), Some(&values(&past)), &mut gradient);
        assert_close("gradient with another", &gradient, &(dx + past.as_tensor()).unwrap());
    }

    #[test]
    fn gates(rows in 1usize..6, features in 1usize..50, seed in 0u64..1000) {
        let both = random(seed, &[rows, 2 * features]);
        let (gate, up) = (both.narrow(1, 0, features).unwrap(), both.narrow(1, features, features).unwrap());
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let activated = match activation {
                Activation::Silu => candle_nn::ops::silu(&gate).unwrap(),
                Activation::GeluTanh => gate.gelu().unwrap(),
            };
            let reference = activated.mul(&up).unwrap();
            let mut out = vec![0.0; rows * features];
            gates::forward(activation, features, &values(&both), &mut out);
            assert_close("value", &out, &reference);

            let dout = random(seed + 1, &[rows, features]);
            let (mut dboth, mut again) = (values(&both), values(&dout));
            gates::backward(activation, features, &mut dboth, &mut again);
            assert_close("value again", &again, &reference);
            assert_close("gradient", &dboth, &gradients(&reference, &dout, &[&both])[0]);
        }
    }
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

/// Attention by primitive operations, sequence by sequence; `qkv` is not turned yet, and turns if there are frequencies.
fn attention_by_definition(
    qkv: &Tensor,
    attention: &CausalAttention,
    frequencies: Option<&[f32]>,
    window: usize,
) -> Result<Tensor> {
    let one = |sequence: Sequence| {
        let qkv = qkv.narrow(0, sequence.first, sequence.length)?;
        sequence_by_definition(&qkv, attention, frequencies, window)
    };
    Tensor::cat(&attention.sequences.iter().map(one).collect::<Result<Vec<_>>>()?, 0)
}

fn sequence_by_definition(
    qkv: &Tensor,
    attention: &CausalAttention,
    frequencies: Option<&[f32]>,
    window: usize,
) -> Result<Tensor> {
    let Heads { queries: heads, keys: kv_heads, features: d, scale, cap } = attention.heads;
    let (batch, length) = (1, qkv.dim(0)?);
    let part = |first: usize, count: usize| qkv.narrow(1, first * d, count * d)?.reshape((batch, length, count, d));
    let turned = |x: Tensor| match frequencies {
        Some(frequencies) => turned_by_definition(&x, frequencies),
        None => Ok(x),
    };
    let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
    let repeated = |x: Tensor| {
        let x = x.reshape((batch, length, kv_heads, 1, d))?;
        x.broadcast_as((batch, length, kv_heads, heads / kv_heads, d))?.reshape((batch, length, heads, d))
    };
    let q = by_head(turned(part(0, heads)?)?)?;
    let k = by_head(repeated(turned(part(heads, kv_heads)?)?)?)?;
    let v = by_head(repeated(part(heads + kv_heads, kv_heads)?)?)?;
    let mut scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * f64::from(scale))?;
    if let Some(cap) = cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let unseen = |i: usize| i % length > i / length || i % length + window <= i / length;
    let hidden: Vec<f32> = (0..length * length).map(|i| if unseen(i) { -1e9 } else { 0.0 }).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(hidden, (1, 1, length, length), &Device::Cpu)?)?;
    let out = candle_nn::ops::softmax(&scores, 3)?.matmul(&v)?;
    out.transpose(1, 2)?.reshape((batch * length, heads * d))
}

#[test]
fn attention_of_grouped_heads_over_several_blocks() {
    let rope = Rope::plain(100.0, 6);
    for (lengths, heads, kv_heads, rotated, window, cap) in [
        (vec![70, 70], 4, 2, true, 1000, None),
        (vec![128], 3, 3, true, 1000, Some(0.7)),
        (vec![1], 2, 1, true, 1, None),
        (vec![65, 1, 3, 33], 2, 1, true, 33, None),
        (vec![2, 100, 64], 4, 2, false, 10, Some(1.5)),
        (vec![40], 2, 2, false, 1, None),
    ] {
        let tables = RopeTables::new(&rope, &lengths);
        let (sequences, tokens) = (Sequences::new(&lengths), lengths.iter().sum::<usize>());
        let heads_of = Heads { queries: heads, keys: kv_heads, features: 6, scale: 0.5, cap };
        let attention = CausalAttention { sequences, heads: heads_of };
        let layer = LayerAttention { rope: rotated.then_some(&tables), window };
        let qkv = random(4, &[tokens, attention.heads.width()]);
        let frequencies = rope.frequencies(1);
        let frequencies = rotated.then_some(&frequencies[..]);
        let reference = attention_by_definition(&qkv, &attention, frequencies, window).unwrap();
        let mut turned = values(&qkv);
        let (first, second) = turned.split_at_mut(tokens / 2 * attention.heads.width());
        attention.turn_rows(layer, 0, first);
        attention.turn_rows(layer, tokens / 2, second);
        let attended = attention.forward(layer, &turned);
        assert_close("value", &attended.rows, &reference);
        let dout = random(5, reference.dims());
        attention.backward(layer, &mut turned, &attended, &values(&dout));
        assert_close("gradient", &turned, &gradients(&reference, &dout, &[&qkv])[0]);
    }
}

/// A head in memory.
struct Matrix {
    values: Vec<f32>,
    features: usize,
}

impl HeadRows for Matrix {
    fn vocabulary(&self) -> usize {
        self.values.len() / self.features
    }

    fn read(&self, first: usize, out: &mut [f32]) -> std::result::Result<(), ModelError> {
        out.copy_from_slice(&self.values[first * self.features..][..out.len()]);
        Ok(())
    }
}

#[test]
fn loss_in_blocks_of_any_size_and_without_targets() {
    // More tokens than go through the head together, and logits that grow and fall from block to block.
    let (tokens, features, vocabulary) = (600, 8, 1029);
    let (hidden, head) = (random(5, &[tokens, features]), random(6, &[vocabulary, features]));
    let slope = Tensor::arange(0f32, vocabulary as f32, &Device::Cpu).unwrap().reshape((vocabulary, 1)).unwrap();
    let head = head.broadcast_mul(&(slope * 0.01).unwrap().sin().unwrap().affine(3.0, 0.5).unwrap()).unwrap();
    let head_values = Matrix { values: values(&head), features };
    let targets: Vec<u32> = (0..tokens as u32).map(|i| if i % 13 == 1 { IGNORED } else { i * 7 % 1029 }).collect();
    let lossy: Vec<u32> = (0..tokens as u32).filter(|i| i % 13 != 1).collect();
    let kept = Tensor::new(lossy.clone(), &Device::Cpu).unwrap();
    let labels: Vec<u32> = lossy.iter().map(|&i| targets[i as usize]).collect();
    let labels = Tensor::new(labels, &Device::Cpu).unwrap();
    let logits = hidden.index_select(&kept, 0).unwrap().matmul(&head.detach().t().unwrap()).unwrap();
    for cap in [None, Some(2.5f32)] {
        let logits = match cap.map(f64::from) {
            Some(cap) => ((&logits / cap).unwrap().tanh().unwrap() * cap).unwrap(),
            None => logits.clone(),
        };
        let reference = (candle_nn::loss::cross_entropy(&logits, &labels).unwrap() * lossy.len() as f64).unwrap();
        let dhidden = reference.backward().unwrap().get(&hidden).unwrap().clone();
        let reference = f64::from(reference.to_scalar::<f32>().unwrap());
        for block in [1, 3, 8, 256, 5000] {
            let (head, targets) = (&head_values, &targets[..]);
            let slices = || LocalHead { head, block };
            let ours = HeadLoss { head, slices: slices(), features, targets, cap, differentiable: true };
            let Losses { of_tokens: losses, gradient, .. } = ours.compute(&values(&hidden)).unwrap();
            let loss: f64 = losses.iter().sum();
            assert!(losses.iter().zip(targets).all(|(&loss, &target)| (loss == 0.0) == (target == IGNORED)));
            assert!((loss / reference - 1.0).abs() < 1e-5, "{loss} for {reference}");
            assert_close("gradient", &gradient.unwrap(), &dhidden);
            let same = HeadLoss { slices: slices(), differentiable: false, ..ours }.compute(&values(&hidden)).unwrap();
            assert!(same.of_tokens == losses && same.gradient.is_none());
        }
    }
    let nothing = vec![IGNORED; tokens];
    let slices = LocalHead::new(&head_values);
    let ours = HeadLoss { head: &head_values, slices, features, targets: &nothing, cap: None, differentiable: true };
    let Losses { of_tokens: losses, gradient, .. } = ours.compute(&values(&hidden)).unwrap();
    assert_eq!(losses, vec![0.0; tokens]);
    assert!(gradient.unwrap().iter().all(|&g| g == 0.0));
}

#[test]
fn adapters_on_two_of_three_slices() {
    let shape = LinearShape { d_in: 210, d_out: 214 };
    let tokens = ROWS + 6;
    let slots = [
        Slot { projection: Projection::Q, offset: 0, d_out: 200, rank: 3, scaling: 0.7, row: 0, up: 0 },
        Slot { projection: Projection::V, offset: 210, d_out: 4, rank: 5, scaling: 1.3, row: 3, up: 600 },
    ];
    let (x, a, b) = (random(8, &[tokens, 210]), random(9, &[3 + 5, 210]), random(10, &[200 * 3 + 4 * 5]));
    let (base, dy) = (random(7, &[tokens, 214]), random(11, &[tokens, 214]));
    for rate in [0.0, 0.4] {
        let draw = Draw { seed: 1, step: 1, micro_batch: 0 };
        let dropout = |slot: u8| Dropout::new(rate, draw, 0, slot);
        let adapter = Adapter {
            slots: &slots,
            shape,
            a: Values::of(&a).unwrap(),
            b: Values::of(&b).unwrap(),
            dropout: (rate > 0.0).then(|| vec![dropout(0), dropout(1)]),
        };
        let part = |number: usize| {
            let Slot { d_out, rank, scaling, row, up, .. } = slots[number];
            let factors = Tensor::from_vec(dropout(number as u8).of_tokens(tokens, 210), (tokens, 210), &Device::Cpu)?;
            let up = b.narrow(0, up, d_out * rank)?.reshape((d_out, rank))?;
            let down = a.narrow(0, row, rank)?;
            (x.as_tensor() * factors)?.matmul(&down.t()?)?.matmul(&up.t()?)? * f64::from(scaling)
        };
        let untouched = Tensor::zeros((tokens, 10), DType::F32, &Device::Cpu).unwrap();
        let parts = Tensor::cat(&[part(0).unwrap(), untouched, part(1).unwrap()], 1).unwrap();
        let reference = (base.as_tensor() + parts).unwrap();

        let (x_values, dy_values, width) = (values(&x), values(&dy), adapter.width());
        let (mut low, mut y) = (vec![0.0; tokens * width], values(&base));
        for first in [0, ROWS] {
            let rows = first..tokens.min(first + ROWS);
            let low = &mut low[rows.start * width..rows.end * width];
            adapter.down_rows(first, block(&x_values, 210, first), low);
            adapter.up_rows(low, &mut y[rows.start * 214..rows.end * 214]);
        }
        assert_close("value", &y, &reference);

        let expected = gradients(&reference, &dy, &[&x, &a, &b]);
        let mut dx = vec![0.25; x_values.len()];
        let dlow = adapter.backward(&dy_values, Some(&mut dx));
        dx.iter_mut().for_each(|dx| *dx -= 0.25);
        assert_close("gradient of the input", &dx, &expected[0]);
        assert_eq!(adapter.backward(&dy_values, None)[..], dlow[..]);
        let AdapterGradient { a, b } = adapter.gradient(&x_values, &low, &dy_values, &dlow);
        assert_close("gradient of A", &a, &expected[1]);
        assert_close("gradient of B", &b, &expected[2]);
    }
}
