//! The training loop, on a thread of its own.
//!
//! 1. Evaluate the held-out split.
//! 2. For each step draw its micro-batches, run several at once through the model and back, hand each one's gradients
//!    to the aggregator; the last one's answer is the step's summary.
//! 3. Evaluate again where the settings ask for it, and at the end.
//! 4. Make a checkpoint and save the adapter, whatever ended the run.
//!
//! Checkpoints are made between two steps ([`super::saver`]). A run that goes on from one does what is left of this.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use actix::Addr;
use futures::executor::block_on;
use protocol::buffer;
use tokio::sync::mpsc;

use super::accumulate::{MicroBatchGradient, StepSummary};
use super::aggregator::{BeginStep, GradientAggregator};
use super::events::{EvaluationReport, StepReport, TrainEvent};
use super::flight;
use super::parallel::in_flight;
use super::saver::Saver;
use super::{TrainError, TrainOutcome, TrainableModel, TrainerConfig};
use crate::adapter;
use crate::data::{BatchSource, MicroBatch};
use crate::lora::Draw;
use crate::trace;

/// A run under way.
pub(super) struct Run {
    pub(super) config: TrainerConfig,
    pub(super) model: Arc<TrainableModel>,
    /// The held-out split.
    pub(super) evaluation: Vec<MicroBatch>,
    pub(super) aggregator: Addr<GradientAggregator>,
    pub(super) saver: Arc<Saver>,
    pub(super) events: mpsc::Sender<TrainEvent>,
    pub(super) stop: Arc<AtomicBool>,
}

impl Run {
    /// The whole run, from where its state says. What was learnt is saved even where the run fails, as soon as one step
    /// was taken.
    pub(super) fn go(self, data: &mut dyn BatchSource) -> Result<TrainOutcome, TrainError> {
        let result = self.train(data);
        self.saver.save_or_warn();
        let state = self.saver.state().clone();
        if result.is_ok() || state.steps > 0 {
            let saved = self.save();
            result.and(saved)?;
        } else {
            result?;
        }
        let stopped = state.steps < self.config.training.steps();
        self.tell(TrainEvent::Finished { steps: state.steps, stopped });
        // An evaluation of earlier adapters says nothing about the ones that are saved.
        let evaluation_after = if stopped { None } else { state.evaluation(state.steps) };
        let evaluation_before = state.evaluation(0);
        Ok(TrainOutcome { steps: state.steps, stopped, evaluation_before, evaluation_after, model: self.model })
    }

    fn train(&self, data: &mut dyn BatchSource) -> Result<(), TrainError> {
        let training = &self.config.training;
        let mut steps = self.saver.state().steps;
        loop {
            self.evaluate_if_due(steps)?;
            if steps >= training.steps() || self.stopping() {
                return Ok(());
            }
            let micro_batches: Vec<MicroBatch> =
                std::iter::from_fn(|| data.next_batch()).take(training.accumulation).collect();
            if micro_batches.len() < training.accumulation {
                return Err(TrainError::DataEnded { step: steps + 1 });
            }
            let report = self.step(steps, &micro_batches)?;
            steps = report.step;
            self.saver.step_taken(report, data.position());
            self.tell(TrainEvent::Step(report));
            self.saver.after_step(Instant::now());
        }
    }

    /// Takes step `step`, counted from 0.
    fn step(&self, step: usize, micro_batches: &[MicroBatch]) -> Result<StepReport, TrainError> {
        let _step = tracing::debug_span!(target: trace::FLIGHT, "step", step = step + 1).entered();
        let (started, traffic) = (Instant::now(), self.model.llama.traffic());
        let learning_rate = self.config.training.learning_rate_at(step);
        block_on(self.aggregator.send(BeginStep { micro_batches: micro_batches.len(), learning_rate }))??;
        let answers = in_flight(micro_batches.len(), self.at_once(), |index| {
            let draw = Draw { seed: self.config.training.seed, step: step as u64, micro_batch: index as u32 };
            let gradient = self.gradient(index, &micro_batches[index], draw)?;
            Ok::<_, TrainError>(block_on(self.aggregator.send(gradient))??)
        })?;
        let Some(StepSummary { loss, loss_tokens, gradient_norm }) = answers.into_iter().flatten().next() else {
            return Err(TrainError::Lost);
        };
        buffer::wipe_idle();
        Ok(StepReport {
            step: step + 1,
            loss,
            seconds: started.elapsed().as_secs_f64(),
            tokens: micro_batches.iter().map(|m| m.tokens.len()).sum(),
            loss_tokens,
            learning_rate,
            gradient_norm,
            traffic: self.model.llama.traffic().since(traffic),
        })
    }

    /// Micro-batches that are computed at once.
    fn at_once(&self) -> usize {
        match self.config.training.in_flight {
            0 => flight::planned(self.model.llama.round_trip()),
            given => given,
        }
    }

    fn gradient(&self, index: usize, batch: &MicroBatch, draw: Draw) -> Result<MicroBatchGradient, TrainError> {
        let span = tracing::debug_span!(target: trace::WORK, "micro-batch", step = draw.step + 1, index);
        let (loss, gradients) = span.in_scope(|| self.model.llama.gradient(batch, &self.model.adapters, draw))?;
        Ok(MicroBatchGradient { index, loss, loss_tokens: batch.loss_tokens(), gradients })
    }

    /// Evaluates after `steps` steps, if that is wanted and was not done before the run was interrupted.
    fn evaluate_if_due(&self, steps: usize) -> Result<(), TrainError> {
        let (last, every) = (self.config.training.steps(), self.config.training.eval_every);
        let due = steps == 0 || steps == last || (every > 0 && steps.is_multiple_of(every));
        let known = self.saver.state().evaluation(steps).is_some();
        if due
            && !known
            && let Some(report) = self.evaluate(steps)?
        {
            self.tell(TrainEvent::Evaluation(report));
            self.saver.evaluated(report);
        }
        Ok(())
    }

    /// Mean loss of the held-out split after `step` steps; `None` without one, or when the run is being stopped.
    fn evaluate(&self, step: usize) -> Result<Option<EvaluationReport>, TrainError> {
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
        let losses = in_flight(count, self.at_once(), |index| {
            if self.stopping() {
                return Ok(None);
            }
            let _batch = tracing::debug_span!(target: trace::WORK, "evaluated micro-batch", index).entered();
            let adapters = Some(&self.model.adapters);
            Ok::<_, TrainError>(Some(self.model.llama.evaluate(&batches[index], adapters)?))
        })?;
        let Some(losses) = losses.into_iter().collect::<Option<Vec<f64>>>() else { return Ok(None) };
        buffer::wipe_idle();
        let loss = losses.iter().sum::<f64>() / loss_tokens as f64;
        Ok(Some(EvaluationReport { step, loss, seconds: started.elapsed().as_secs_f64() }))
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
