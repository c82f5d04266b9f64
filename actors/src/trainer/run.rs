//! The training loop, on a thread of its own.
//!
//! 1. Evaluate the held-out split.
//! 2. For each step draw its micro-batches, run several at once through the model and back, hand each one's gradients
//!    to the aggregator; the last one's answer is the step's summary.
//! 3. Evaluate again where the settings ask for it, and at the end.
//! 4. Save the adapter, whatever ended the run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use actix::Addr;
use futures::executor::block_on;
use tokio::sync::mpsc;

use super::accumulate::{MicroBatchGradient, StepSummary};
use super::aggregator::{BeginStep, GradientAggregator};
use super::events::{StepReport, TrainEvent};
use super::parallel::in_flight;
use super::{TrainError, TrainOutcome, TrainableModel, TrainerConfig};
use crate::adapter;
use crate::data::MicroBatch;
use crate::lora::Draw;
use crate::trace;

/// A run under way.
pub(super) struct Run {
    pub(super) config: TrainerConfig,
    pub(super) model: Arc<TrainableModel>,
    /// The held-out split.
    pub(super) evaluation: Vec<MicroBatch>,
    pub(super) aggregator: Addr<GradientAggregator>,
    pub(super) events: mpsc::Sender<TrainEvent>,
    pub(super) stop: Arc<AtomicBool>,
}

impl Run {
    /// The whole run. The adapter is saved even where the run fails, as soon as one step was taken.
    pub(super) fn go(self, data: impl Iterator<Item = MicroBatch>) -> Result<TrainOutcome, TrainError> {
        let mut outcome = TrainOutcome {
            steps: 0,
            stopped: false,
            evaluation_before: None,
            evaluation_after: None,
            model: self.model.clone(),
        };
        let result = self.train(data, &mut outcome);
        if result.is_ok() || outcome.steps > 0 {
            let saved = self.save();
            result.and(saved)?;
        } else {
            result?;
        }
        self.tell(TrainEvent::Finished { steps: outcome.steps, stopped: outcome.stopped });
        Ok(outcome)
    }

    fn train(&self, mut data: impl Iterator<Item = MicroBatch>, outcome: &mut TrainOutcome) -> Result<(), TrainError> {
        let (steps, eval_every) = (self.config.training.steps, self.config.training.eval_every);
        outcome.evaluation_before = self.evaluate(0)?;
        while outcome.steps < steps && !self.stopping() {
            let micro_batches: Vec<MicroBatch> = data.by_ref().take(self.config.training.accumulation).collect();
            if micro_batches.len() < self.config.training.accumulation {
                return Err(TrainError::DataEnded { step: outcome.steps + 1 });
            }
            self.step(outcome.steps, &micro_batches)?;
            outcome.steps += 1;
            let last = outcome.steps == steps;
            if last || (eval_every > 0 && outcome.steps.is_multiple_of(eval_every)) {
                outcome.evaluation_after = self.evaluate(outcome.steps)?;
            }
        }
        outcome.stopped = outcome.steps < steps;
        if outcome.stopped {
            // An evaluation of earlier adapters says nothing about the ones that are saved.
            outcome.evaluation_after = None;
        }
        Ok(())
    }

    /// Takes step `step`, counted from 0.
    fn step(&self, step: usize, micro_batches: &[MicroBatch]) -> Result<(), TrainError> {
        let _step = tracing::debug_span!(target: trace::FLIGHT, "step", step = step + 1).entered();
        let (started, traffic) = (Instant::now(), self.model.llama.traffic());
        let learning_rate = self.config.training.learning_rate_at(step);
        block_on(self.aggregator.send(BeginStep { micro_batches: micro_batches.len(), learning_rate }))??;
        let answers = in_flight(micro_batches.len(), self.config.training.in_flight, |index| {
            let draw = Draw { seed: self.config.training.seed, step: step as u64, micro_batch: index as u32 };
            let gradient = self.gradient(index, &micro_batches[index], draw)?;
            Ok::<_, TrainError>(block_on(self.aggregator.send(gradient))??)
        })?;
        let Some(StepSummary { loss, loss_tokens, gradient_norm }) = answers.into_iter().flatten().next() else {
            return Err(TrainError::Lost);
        };
        self.tell(TrainEvent::Step(StepReport {
            step: step + 1,
            loss,
            seconds: started.elapsed().as_secs_f64(),
            tokens: micro_batches.iter().map(|m| m.tokens.len()).sum(),
            loss_tokens,
            learning_rate,
            gradient_norm,
            traffic: self.model.llama.traffic().since(traffic),
        }));
        Ok(())
    }

    fn gradient(&self, index: usize, batch: &MicroBatch, draw: Draw) -> Result<MicroBatchGradient, TrainError> {
        let span = tracing::debug_span!(target: trace::WORK, "micro-batch", step = draw.step + 1, index);
        let (loss, gradients) = span.in_scope(|| self.model.llama.gradient(batch, &self.model.adapters, draw))?;
        Ok(MicroBatchGradient { index, loss, loss_tokens: batch.loss_tokens(), gradients })
    }

    /// Mean loss of the held-out split after `step` steps; `None` without one, or when the run is being stopped.
    fn evaluate(&self, step: usize) -> Result<Option<f64>, TrainError> {
        let batches = &self.evaluation;
        let count = match self.config.training.eval_batches {
            0 => batches.len(),
            most => most.min(batches.len()),
        };
        let loss_tokens: usize = batches[..count].iter().map(MicroBatch::loss_tokens).sum();
        if loss_tokens == 0 {
            return Ok(None);
        }
        let started = Instant::now();
        let _evaluation = tracing::debug_span!(target: trace::FLIGHT, "evaluation", step).entered();
        self.tell(TrainEvent::EvaluationStarted { step, micro_batches: count });
        let losses = in_flight(count, self.config.training.in_flight, |index| {
            if self.stopping() {
                return Ok(None);
            }
            let _batch = tracing::debug_span!(target: trace::WORK, "evaluated micro-batch", index).entered();
            let adapters = Some(&self.model.adapters);
            Ok::<_, TrainError>(Some(self.model.llama.evaluate(&batches[index], adapters)?))
        })?;
        let Some(losses) = losses.into_iter().collect::<Option<Vec<f64>>>() else { return Ok(None) };
        let loss = losses.iter().sum::<f64>() / loss_tokens as f64;
        self.tell(TrainEvent::Evaluation { step, loss, seconds: started.elapsed().as_secs_f64() });
        Ok(Some(loss))
    }

    fn save(&self) -> Result<(), TrainError> {
        match &self.config.adapter {
            Some(target) => Ok(adapter::save(&target.folder, &self.model.adapters, &target.base_model)?),
            None => Ok(()),
        }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits for room in the channel; nobody listening is no reason to stop training.
    fn tell(&self, event: TrainEvent) {
        let _ = self.events.blocking_send(event);
    }
}
