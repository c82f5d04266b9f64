//! From the gradients of a step's micro-batches to new adapters: sum, average, clip, step.
//!
//! Micro-batches finish in any order, but floating-point sums depend on theirs, so they are added in the order of
//! the data: a run's losses do not depend on which worker was faster. Only those that come before their turn wait.

use candle_core::{Tensor, Var};
use rayon::prelude::*;

use super::AggregatorError;
use super::adamw::{AdamW, AdamWConfig, Moments};
use super::objective::{PreferenceReport, PreferenceSum};
use crate::checkpoint::{self, Checkpoint};
use crate::lora::Learning;
use crate::trace;

/// What one micro-batch contributes to its step.
#[derive(Debug)]
pub struct MicroBatchGradient {
    /// Its place among the step's micro-batches.
    pub index: usize,
    /// Sum of its targets' cross entropies in nats, or of its pairs' losses.
    pub loss: f64,
    /// Targets that carry loss.
    pub loss_tokens: usize,
    /// What that sum is over: its targets, or its pairs.
    pub terms: usize,
    /// What its pairs came to.
    pub preference: PreferenceSum,
    /// Gradient of that sum for every parameter, row-major, in the order of the parameters.
    pub gradients: Vec<Vec<f32>>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSummary {
    /// Mean cross entropy of the step's targets before it, in nats, or mean loss of its pairs.
    pub loss: f64,
    /// Targets that carried loss.
    pub loss_tokens: usize,
    /// Norm of the mean gradient over all adapters, before it was clipped.
    pub gradient_norm: f64,
    /// What its pairs came to; `None` if it had none.
    pub preference: Option<PreferenceReport>,
}

/// What a checkpoint keeps of every parameter: its value and its moments.
const NAMES: [&str; 3] = ["parameter", "first-moment", "second-moment"];
/// And its value after the best evaluation, where that is wanted.
const BEST: &str = "best";

fn name(kind: &str, index: usize) -> String {
    format!("{kind}.{index}")
}

/// The parameters and the optimiser after some step.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Which one, from 1; 0 before the first.
    pub steps: u64,
    /// Copies of them all.
    pub tensors: Vec<checkpoint::Tensor>,
}

/// Numbers in the tensors of a snapshot, for so many trained values, at most.
pub fn snapshot_values(trained: usize) -> usize {
    (NAMES.len() + 1).saturating_mul(trained)
}

/// Parameters, optimiser and the step under way.
pub(super) struct Accumulation {
    parameters: Vec<Var>,
    /// How each of them learns.
    learning: Vec<Learning>,
    /// Their values after the best evaluation so far, if they are kept.
    best: Option<Vec<Vec<f32>>>,
    optimiser: AdamW,
    max_gradient_norm: f64,
    learning_rate: f64,
    /// What came before its turn; taken once it is added.
    waiting: Vec<Option<MicroBatchGradient>>,
    /// Micro-batches that are added.
    added: usize,
    sum: Sum,
}

/// The first micro-batches of a step together.
#[derive(Default)]
struct Sum {
    loss: f64,
    loss_tokens: usize,
    terms: usize,
    preference: PreferenceSum,
    gradients: Vec<Vec<f32>>,
}

impl Sum {
    fn add(&mut self, micro_batch: MicroBatchGradient) {
        self.loss += micro_batch.loss;
        self.loss_tokens += micro_batch.loss_tokens;
        self.terms += micro_batch.terms;
        self.preference.add(&micro_batch.preference);
        if self.gradients.is_empty() {
            self.gradients = micro_batch.gradients;
            return;
        }
        self.gradients.par_iter_mut().zip(micro_batch.gradients).for_each(|(sum, gradient)| {
            sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
        });
    }
}

impl Accumulation {
    pub(super) fn new(
        parameters: Vec<Var>,
        learning: Vec<Learning>,
        optimiser: AdamWConfig,
        max_gradient_norm: f64,
    ) -> Self {
        let optimiser = AdamW::new(optimiser, parameters.iter().map(|var| var.elem_count()));
        let (waiting, sum) = (Vec::new(), Sum::default());
        Self {
            parameters,
            learning,
            best: None,
            optimiser,
            max_gradient_norm,
            learning_rate: 0.0,
            waiting,
            added: 0,
            sum,
        }
    }

    /// Begins a step of so many micro-batches; what an unfinished one had gathered is forgotten.
    pub(super) fn begin(&mut self, micro_batches: usize, learning_rate: f64) {
        self.waiting = (0..micro_batches).map(|_| None).collect();
        (self.added, self.sum) = (0, Sum::default());
        self.learning_rate = learning_rate;
    }

    /// Adds a contribution as soon as all before it are; `true` when it was the last one to arrive.
    pub(super) fn add(&mut self, micro_batch: MicroBatchGradient) -> Result<bool, AggregatorError> {
        let index = micro_batch.index;
        if !micro_batch.gradients.iter().map(Vec::len).eq(self.parameters.iter().map(|var| var.elem_count())) {
            return Err(AggregatorError::Shape { index });
        }
        match self.waiting.get_mut(index) {
            Some(place @ None) if index >= self.added => *place = Some(micro_batch),
            _ => return Err(AggregatorError::Unexpected { index }),
        }
        while let Some(next) = self.waiting.get_mut(self.added).and_then(Option::take) {
            self.sum.add(next);
            self.added += 1;
        }
        Ok(self.added == self.waiting.len())
    }

    /// Copies of the parameters and of the optimiser's moments, and how many steps they have seen.
    pub(super) fn snapshot(&self) -> Result<Snapshot, AggregatorError> {
        let (steps, moments) = self.optimiser.state();
        let mut tensors = Vec::with_capacity(3 * moments.len());
        for (index, (var, Moments { first, second })) in self.parameters.iter().zip(moments).enumerate() {
            let values = [var.flatten_all()?.to_vec1::<f32>()?, first.clone(), second.clone()];
            let named = NAMES.into_iter().zip(values);
            tensors.extend(named.map(|(kind, values)| checkpoint::Tensor { name: name(kind, index), values }));
        }
        let best = self.best.iter().flatten().enumerate();
        tensors
            .extend(best.map(|(index, values)| checkpoint::Tensor { name: name(BEST, index), values: values.clone() }));
        Ok(Snapshot { steps, tensors })
    }

    /// Keeps the parameters as those of the best evaluation so far.
    pub(super) fn keep_best(&mut self) -> Result<(), AggregatorError> {
        let values = self.parameters.iter().map(|var| var.flatten_all()?.to_vec1::<f32>());
        self.best = Some(values.collect::<candle_core::Result<_>>()?);
        Ok(())
    }

    /// Goes back to the parameters of the best evaluation, if they were kept; says whether they were.
    pub(super) fn return_to_best(&mut self) -> Result<bool, AggregatorError> {
        let Some(best) = &self.best else { return Ok(false) };
        for (var, values) in self.parameters.iter().zip(best) {
            var.set(&Tensor::from_vec(values.clone(), var.shape(), var.device())?)?;
        }
        Ok(true)
    }

    /// Takes the tensors of [`Self::snapshot`] out of a checkpoint and goes on from them.
    pub(super) fn restore<S>(&mut self, steps: u64, from: &mut Checkpoint<S>) -> Result<(), AggregatorError> {
        let mut take = |kind, index, size| match from.take(&name(kind, index)) {
            Some(values) if values.len() == size => Ok(values),
            _ => Err(AggregatorError::Checkpoint { tensor: name(kind, index), size }),
        };
        let mut restored = Vec::with_capacity(self.parameters.len());
        for (index, var) in self.parameters.iter().enumerate() {
            let [value, first, second] = NAMES.map(|kind| take(kind, index, var.elem_count()));
            restored.push((
                Tensor::from_vec(value?, var.shape(), var.device())?,
                Moments { first: first?, second: second? },
            ));
        }
        let best = self.parameters.iter().enumerate().map(|(index, var)| match from.take(&name(BEST, index)) {
            Some(values) if values.len() != var.elem_count() => {
                Err(AggregatorError::Checkpoint { tensor: name(BEST, index), size: var.elem_count() })
            }
            values => Ok(values),
        });
        self.best = best.collect::<Result<Option<Vec<_>>, _>>()?;
        let mut moments = Vec::with_capacity(restored.len());
        for (var, (value, moment)) in self.parameters.iter().zip(restored) {
            var.set(&value)?;
            moments.push(moment);
        }
        self.optimiser.restore(steps, moments);
        Ok(())
    }

    /// Takes the step, once every micro-batch has arrived.
    pub(super) fn finish(&mut self) -> Result<StepSummary, AggregatorError> {
        let _optimiser = tracing::debug_span!(target: trace::WORK, "optimiser").entered();
        self.waiting.clear();
        let Sum { loss, loss_tokens, terms, preference, gradients: sum } = std::mem::take(&mut self.sum);
        if loss_tokens == 0 || terms == 0 {
            return Err(AggregatorError::NothingToLearn);
        }
        let squares = |values: &Vec<f32>| values.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        // Collected before they are added, so that the order does not depend on the threads.
        let squares: Vec<f64> = sum.par_iter().map(squares).collect();
        let mean = 1.0 / terms as f64;
        let gradient_norm = squares.iter().sum::<f64>().sqrt() * mean;
        if !(gradient_norm.is_finite() && loss.is_finite()) {
            return Err(AggregatorError::NotFinite);
        }
        let clip = match self.max_gradient_norm {
            limit if limit > 0.0 && gradient_norm > limit => limit / gradient_norm,
            _ => 1.0,
        };
        self.optimiser.begin_step();
        for (index, ((var, learning), gradient)) in self.parameters.iter().zip(&self.learning).zip(&sum).enumerate() {
            let learning = Learning { rate: self.learning_rate * learning.rate, ..*learning };
            let mut values = var.flatten_all()?.to_vec1::<f32>()?;
            self.optimiser.update(index, &mut values, gradient, learning, mean * clip);
            var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        }
        Ok(StepSummary { loss: loss * mean, loss_tokens, gradient_norm, preference: preference.report() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Device;

    use super::*;

    const PLAIN: AdamWConfig = AdamWConfig { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.0 };

    fn accumulation(limit: f64) -> (Accumulation, Var) {
        let var = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        (Accumulation::new(vec![var.clone()], vec![Learning { rate: 1.0, decays: true }], PLAIN, limit), var)
    }

    fn of(index: usize, loss: f64, terms: usize, gradients: Vec<Vec<f32>>) -> MicroBatchGradient {
        MicroBatchGradient { index, loss, loss_tokens: terms, terms, preference: PreferenceSum::default(), gradients }
    }

    fn gradient(index: usize, values: [f32; 3], terms: usize) -> MicroBatchGradient {
        of(index, 2.0 * terms as f64, terms, vec![values.into()])
    }

    #[test]
    fn averages_over_tokens_in_the_order_of_the_data() {
        let results = [[0, 1, 2], [2, 0, 1]].map(|order| {
            let (mut step, var) = accumulation(0.0);
            step.begin(3, 0.1);
            for (n, index) in order.into_iter().enumerate() {
                let values = [[1e8f32, 0.0, 3.0], [1.0, 0.0, 1.0], [-1e8, 0.0, 0.0]][index];
                assert_eq!(step.add(gradient(index, values, index + 1)).unwrap(), n == 2);
            }
            let summary = step.finish().unwrap();
            assert_eq!((summary.loss, summary.loss_tokens), (2.0, 6));
            (summary, var.to_vec1::<f32>().unwrap())
        });
        assert_eq!(results[0], results[1]);
        let (summary, values) = &results[0];
        // 1e8 + 1 − 1e8 is 0 in f32 in this order, so the third parameter's mean gradient of 4/6 is all.
        assert!((summary.gradient_norm - 4.0 / 6.0).abs() < 1e-6);
        assert!((values[2] - 2.9).abs() < 1e-5 && values[1] == 2.0 && values[0] == 1.0);
    }

    #[test]
    fn clips_by_the_norm_over_everything() {
        // With Adam the first step's size does not depend on the gradient's, so the moments are looked at.
        let (mut step, _) = accumulation(0.5);
        step.begin(1, 0.1);
        assert!(step.add(gradient(0, [30.0, 0.0, 40.0], 10)).unwrap());
        assert!((step.finish().unwrap().gradient_norm - 5.0).abs() < 1e-6);
        let first = &step.optimiser.state().1[0].first;
        assert!((first[0] - 0.1 * 0.3).abs() < 1e-6 && (first[2] - 0.1 * 0.4).abs() < 1e-6);
    }

    #[test]
    fn each_parameter_has_its_own_rate() {
        let vars = [1f32, 1.0].map(|value| Var::new(&[value], &Device::Cpu).unwrap());
        let learning = [(1.0, true), (16.0, false)].map(|(rate, decays)| Learning { rate, decays });
        let decaying = AdamWConfig { weight_decay: 0.5, ..PLAIN };
        let mut step = Accumulation::new(vars.to_vec(), learning.to_vec(), decaying, 0.0);
        step.begin(1, 1e-3);
        let gradients = vec![vec![2.0], vec![2.0]];
        assert!(step.add(of(0, 1.0, 1, gradients)).unwrap());
        step.finish().unwrap();
        // Adam's first step is the rate itself, and half of it is what decays.
        for (var, moved) in vars.iter().zip([1.5e-3, 16e-3]) {
            assert!((var.to_vec1::<f32>().unwrap()[0] - (1.0 - moved)).abs() < 1e-6);
        }
    }

    #[test]
    fn refuses_what_does_not_belong() {
        let (mut step, var) = accumulation(1.0);
        assert!(matches!(step.add(gradient(0, [1.0; 3], 1)), Err(AggregatorError::Unexpected { index: 0 })));
        step.begin(2, 0.1);
        assert!(!step.add(gradient(1, [1.0; 3], 1)).unwrap());
        assert!(matches!(step.add(gradient(1, [1.0; 3], 1)), Err(AggregatorError::Unexpected { index: 1 })));
        assert!(matches!(step.add(gradient(2, [1.0; 3], 1)), Err(AggregatorError::Unexpected { index: 2 })));
        assert!(matches!(step.add(of(0, 0.0, 1, vec![vec![0.0; 2]])), Err(AggregatorError::Shape { index: 0 })));
        assert!(step.add(gradient(0, [f32::NAN; 3], 1)).unwrap());
        assert!(matches!(step.finish(), Err(AggregatorError::NotFinite)));
        step.begin(1, 0.1);
        assert!(step.add(of(0, 0.0, 0, vec![vec![0.0; 3]])).unwrap());
        assert!(matches!(step.finish(), Err(AggregatorError::NothingToLearn)));
        assert_eq!(var.to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0], "a refused step changed the parameters");
    }
}
