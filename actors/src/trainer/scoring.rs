//! What a micro-batch comes to under a run's objective: sums, and the weights of its sequences' gradients.

use std::sync::Mutex;

use super::objective::{Costs, Judged, Preference, PreferenceSum};
use super::saver::ReferenceCosts;
use super::{TrainError, TrainableModel};
use crate::data::{IGNORED, MicroBatch};
use crate::transformer::LlamaError;

/// What the terms of a micro-batch's loss add up to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Score {
    /// Their sum.
    pub(super) loss: f64,
    /// Their number: targets, or pairs.
    pub(super) terms: usize,
    /// What pairs came to.
    pub(super) preference: PreferenceSum,
}

impl Score {
    /// Together with another one.
    pub(super) fn and(mut self, other: &Self) -> Self {
        self.loss += other.loss;
        self.terms += other.terms;
        self.preference.add(&other.preference);
        self
    }
}

/// The objective of one step or evaluation, with what is known of the reference before it.
pub(super) struct Scoring<'a> {
    model: &'a TrainableModel,
    preference: Option<Preference>,
    known: ReferenceCosts,
    /// What the reference made of each micro-batch's pairs that were not known, in the order of the micro-batches: a pair
    /// that several have is known by the first, whichever was done sooner.
    found: Mutex<Vec<ReferenceCosts>>,
}

impl<'a> Scoring<'a> {
    /// `known` need hold no other pairs than those of the micro-batches, which are so many.
    pub(super) fn new(
        model: &'a TrainableModel,
        preference: Option<Preference>,
        known: ReferenceCosts,
        micro_batches: usize,
    ) -> Self {
        Self { model, preference, known, found: Mutex::new(vec![ReferenceCosts::new(); micro_batches]) }
    }

    /// What the reference makes of a micro-batch's pairs; nothing without one.
    pub(super) fn reference(&self, index: usize, batch: &MicroBatch) -> Result<Vec<[f64; 2]>, TrainError> {
        let Some(preference) = self.preference else { return Ok(Vec::new()) };
        if batch.lengths.len() != 2 * batch.numbers.len() {
            let why = "its sequences are no pairs, which this objective needs";
            return Err(LlamaError::Batch(why.into()).into());
        }
        if !preference.needs_reference() {
            return Ok(Vec::new());
        }
        let missing: Vec<usize> =
            (0..batch.numbers.len()).filter(|&pair| !self.known.contains_key(&batch.numbers[pair])).collect();
        let mut computed = Vec::new();
        if !missing.is_empty() {
            let sequences: Vec<usize> = missing.iter().flat_map(|pair| [2 * pair, 2 * pair + 1]).collect();
            let costs = self.model.llama.costs(&batch.only(&sequences), self.model.reference.as_ref(), false)?;
            computed =
                missing.iter().zip(costs.chunks_exact(2)).map(|(&pair, costs)| (pair, [costs[0], costs[1]])).collect();
            let found = computed.iter().map(|&(pair, costs)| (batch.numbers[pair], costs)).collect();
            if let Some(place) = self.found.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_mut(index) {
                *place = found;
            }
        }
        let mut computed = computed.into_iter().peekable();
        let of_pair = |(pair, number): (usize, &usize)| match computed.next_if(|&(missing, _)| missing == pair) {
            Some((_, costs)) => Some(costs),
            None => self.known.get(number).copied(),
        };
        let all: Option<Vec<[f64; 2]>> = batch.numbers.iter().enumerate().map(of_pair).collect();
        all.ok_or(TrainError::Lost)
    }

    /// What a micro-batch's sequences, which cost so much, come to, and the weights of their gradients: `None` where each
    /// counts as it is.
    pub(super) fn judge(&self, batch: &MicroBatch, costs: &[f64], reference: &[[f64; 2]]) -> (Score, Option<Vec<f64>>) {
        let Some(preference) = self.preference else {
            let score = Score { loss: costs.iter().sum(), terms: batch.loss_tokens(), ..Score::default() };
            return (score, None);
        };
        let targets: Vec<usize> = batch
            .sequences()
            .map(|rows| batch.targets[rows].iter().filter(|&&target| target != IGNORED).count())
            .collect();
        let (mut score, mut weights) = (Score::default(), Vec::with_capacity(costs.len()));
        for (pair, (costs, targets)) in costs.chunks_exact(2).zip(targets.chunks_exact(2)).enumerate() {
            let judged: Judged = preference.judge(&Costs {
                policy: [costs[0], costs[1]],
                reference: reference.get(pair).copied().unwrap_or_default(),
                targets: [targets[0], targets[1]],
            });
            score.loss += judged.loss;
            score.terms += 1;
            score.preference.judged(&judged);
            weights.extend(judged.weights);
        }
        (score, Some(weights))
    }

    /// What was found of the reference.
    pub(super) fn into_found(self) -> ReferenceCosts {
        let found = self.found.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut costs = ReferenceCosts::new();
        for (number, cost) in found.into_iter().flatten() {
            costs.entry(number).or_insert(cost);
        }
        costs
    }
}
