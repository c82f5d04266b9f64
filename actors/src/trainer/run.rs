//! The training loop, on a thread of its own.
//!
//! 1. Evaluate the held-out split.
//! 2. For each step draw its micro-batches, run several at once through the model and back, hand each one's gradients
//!    to the aggregator; the last one's answer is the step's summary.
//! 3. Evaluate again where the settings ask for it, and at the end; keep the adapters of the best evaluation where they are
//!    to be the result, and end early where evaluations have not become better for long.
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
use super::aggregator::{BeginStep, Best, GradientAggregator};
use super::events::{EvaluationReport, StepReport, TrainEvent};
use super::parallel::in_flight;
use super::saver::{ReferenceCosts, Saver, TrainState};
use super::scoring::{Score, Scoring};
use super::stopping;
use super::strands::Strands;
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
        let stopped = !self.is_over(&state);
        // One that is stopped goes on from its last step, and that is what it leaves.
        let best = if result.is_ok() && !stopped { self.return_to_best(&state)? } else { None };
        if result.is_ok() || state.steps > 0 {
            let saved = self.save();
            result.and(saved)?;
        } else {
            result?;
        }
        self.tell(TrainEvent::Finished { steps: state.steps, stopped, best });
        // An evaluation of earlier adapters says nothing about the ones that are saved.
        let evaluation_after = if stopped { None } else { state.evaluation(best.unwrap_or(state.steps)) };
        let evaluation_before = state.evaluation(0);
        Ok(TrainOutcome { steps: state.steps, stopped, evaluation_before, evaluation_after, best, model: self.model })
    }

    /// Whether all is done: the last step, or so many evaluations that were none better.
    fn is_over(&self, state: &TrainState) -> bool {
        let training = &self.config.training;
        let over = |patience| stopping::is_over(&state.evaluations, patience, training.early_stopping_threshold);
        state.steps >= training.steps() || training.early_stopping_patience.is_some_and(over)
    }

    /// Goes back to the adapters of the best evaluation, where they are to be the result; returns their step if it is not
    /// the last one.
    fn return_to_best(&self, state: &TrainState) -> Result<Option<usize>, TrainError> {
        if !self.config.training.loads_best() {
            return Ok(None);
        }
        let best = stopping::best(&state.evaluations).map(|best| best.step).filter(|&step| step != state.steps);
        match best {
            Some(step) if block_on(self.aggregator.send(Best::Return))?? => Ok(Some(step)),
            _ => Ok(None),
        }
    }

    fn train(&self, data: &mut dyn BatchSource) -> Result<(), TrainError> {
        let training = &self.config.training;
        let mut steps = self.saver.state().steps;
        loop {
            self.evaluate_if_due(steps)?;
            if self.is_over(&self.saver.state()) || self.stopping() {
                return Ok(());
            }
            let micro_batches = std::iter::from_fn(|| data.next_batch().transpose()).take(training.accumulation);
            let micro_batches = micro_batches.collect::<Result<Vec<MicroBatch>, _>>()?;
            if micro_batches.len() < training.accumulation {
                return Err(TrainError::DataEnded { step: steps + 1 });
            }
            let (report, references) = self.step(steps, &micro_batches)?;
            steps = report.step;
            self.saver.step_taken(report, references, data.position());
            self.tell(TrainEvent::Step(report));
            self.saver.after_step(Instant::now());
        }
    }

    /// Takes step `step`, counted from 0; what the reference made of pairs that were not known comes with its report.
    fn step(&self, step: usize, micro_batches: &[MicroBatch]) -> Result<(StepReport, ReferenceCosts), TrainError> {
        let _step = tracing::debug_span!(target: trace::FLIGHT, "step", step = step + 1).entered();
        let (started, traffic) = (Instant::now(), self.model.llama.traffic());
        let learning_rate = self.config.training.learning_rate_at(step);
        let strands = Strands::of(micro_batches, &self.model.llama, &self.config.training, true);
        let batches = &strands.batches;
        block_on(self.aggregator.send(BeginStep { micro_batches: batches.len(), learning_rate }))??;
        let scoring = self.scoring(batches, &self.saver.state().references.train);
        let answers = in_flight(batches.len(), strands.at_once, |index| {
            let draw = Draw { seed: self.config.training.seed, step: step as u64, micro_batch: index as u32 };
            let gradient = self.gradient(index, &strands, draw, &scoring)?;
            Ok::<_, TrainError>(block_on(self.aggregator.send(gradient))??)
        })?;
        let Some(StepSummary { loss, loss_tokens, gradient_norm, preference }) = answers.into_iter().flatten().next()
        else {
            return Err(TrainError::Lost);
        };
        // What micro-batches shared is wiped with the rest.
        drop(strands);
        buffer::wipe_idle();
        let report = StepReport {
            step: step + 1,
            loss,
            seconds: started.elapsed().as_secs_f64(),
            tokens: micro_batches.iter().map(|m| m.tokens.len()).sum(),
            loss_tokens,
            learning_rate,
            gradient_norm,
            traffic: self.model.llama.traffic().since(traffic),
            preference,
        };
        Ok((report, scoring.into_found()))
    }

    /// The objective for some micro-batches, of whose pairs the reference knows these.
    fn scoring(&self, batches: &[MicroBatch], references: &ReferenceCosts) -> Scoring<'_> {
        let numbers = batches.iter().flat_map(|batch| &batch.numbers);
        let known = numbers.filter_map(|number| Some((*number, *references.get(number)?))).collect();
        Scoring::new(&self.model, self.config.training.preference(), known, batches.len())
    }

    fn gradient(
        &self,
        index: usize,
        strands: &Strands<'_>,
        draw: Draw,
        scoring: &Scoring<'_>,
    ) -> Result<MicroBatchGradient, TrainError> {
        let _span = tracing::debug_span!(target: trace::WORK, "micro-batch", step = draw.step + 1, index).entered();
        let (batch, llama) = (&strands.batches[index], strands.way(index));
        let reference = scoring.reference(index, batch)?;
        let mut score = Score::default();
        let weigh = |costs: &[f64]| {
            let weights;
            (score, weights) = scoring.judge(batch, costs, &reference);
            weights
        };
        let noise = self.config.training.neftune_noise_alpha;
        let (_, gradients) = llama.weighted_gradient(batch, &self.model.adapters, draw, noise, weigh)?;
        let Score { loss, terms, preference } = score;
        Ok(MicroBatchGradient { index, loss, loss_tokens: batch.loss_tokens(), terms, preference, gradients })
    }

    /// Evaluates after `steps` steps, if that is wanted and was not done before the run was interrupted.
    fn evaluate_if_due(&self, steps: usize) -> Result<(), TrainError> {
        let (last, every) = (self.config.training.steps(), self.config.training.eval_every);
        let due = steps == 0 || steps == last || (every > 0 && steps.is_multiple_of(every));
        let known = self.saver.state().evaluation(steps).is_some();
        if due
            && !known
            && let Some((report, references)) = self.evaluate(steps)?
        {
            self.tell(TrainEvent::Evaluation(report));
            if let Some(answering) = &self.config.answering {
                answering(steps, &self.model.adapters)?;
                self.tell(TrainEvent::Answered { step: steps });
            }
            let best = stopping::best(&self.saver.state().evaluations).map_or(f64::INFINITY, |best| best.loss);
            if self.config.training.loads_best() && report.loss < best {
                block_on(self.aggregator.send(Best::Keep))??;
            }
            self.saver.evaluated(report, references);
        }
        Ok(())
    }

    /// Mean loss of the held-out split after `step` steps, and what the reference made of pairs that were not known; `None`
    /// without one, or when the run is being stopped.
    fn evaluate(&self, step: usize) -> Result<Option<(EvaluationReport, ReferenceCosts)>, TrainError> {
        let batches = &self.evaluation;
        let count = match self.config.training.eval_batches {
            0 => batches.len(),
            most => most.min(batches.len()),
        };
        let batches = &batches[..count];
        if batches.iter().all(|batch| batch.loss_tokens() == 0) {
            return Ok(None);
        }
        let started = Instant::now();
        let _evaluation = tracing::debug_span!(target: trace::FLIGHT, "evaluation", step).entered();
        self.tell(TrainEvent::EvaluationStarted { step, micro_batches: count });
        let strands = Strands::of(batches, &self.model.llama, &self.config.training, false);
        let batches = &strands.batches;
        let scoring = self.scoring(batches, &self.saver.state().references.evaluation);
        let scores = in_flight(batches.len(), strands.at_once, |index| {
            if self.stopping() {
                return Ok(None);
            }
            let _batch = tracing::debug_span!(target: trace::WORK, "evaluated micro-batch", index).entered();
            let batch = &batches[index];
            let reference = scoring.reference(index, batch)?;
            let costs = strands.way(index).costs(batch, Some(&self.model.adapters), true)?;
            Ok::<_, TrainError>(Some(scoring.judge(batch, &costs, &reference).0))
        })?;
        let Some(scores) = scores.into_iter().collect::<Option<Vec<Score>>>() else { return Ok(None) };
        drop(strands);
        buffer::wipe_idle();
        let Score { loss, terms, preference } = scores.iter().fold(Score::default(), Score::and);
        let (loss, seconds) = (loss / terms as f64, started.elapsed().as_secs_f64());
        let report = EvaluationReport { step, loss, seconds, preference: preference.report() };
        Ok(Some((report, scoring.into_found())))
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
