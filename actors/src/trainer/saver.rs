//! What makes a run's checkpoints.
//!
//! The parameters belong to the aggregator, and what else a run is made of is noted by its thread after every step. A
//! checkpoint needs both of the same step, also where it is asked for while the next one is under way: then the copy that
//! the aggregator gives is compared with the note, and whichever is older is asked for again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use actix::Addr;
use futures::executor::block_on;
use serde::{Deserialize, Serialize};

use super::accumulate::Snapshot;
use super::aggregator::{GradientAggregator, TakeSnapshot};
use super::events::{EvaluationReport, StepReport};
use crate::checkpoint::{Checkpoint, CheckpointConfig, CheckpointError, Identity, Store};
use crate::data::Position;

/// Time for the training thread to note a step that the optimiser has taken: it does nothing else in between.
const NOTING: Duration = Duration::from_secs(10);
/// Copies that are asked for before it is given up: each is in vain only if a whole step passed meanwhile.
const COPIES: usize = 100;

/// Where a run is, but for its parameters. What is random in it follows from its settings, the step and the position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimiser steps taken, which is also the place in the schedule of the learning rate.
    pub steps: usize,
    /// The next example to take.
    pub position: Position,
    /// Every step so far.
    pub history: Vec<StepReport>,
    /// Every evaluation so far.
    pub evaluations: Vec<EvaluationReport>,
    /// What DPO's reference makes of the pairs that were met so far.
    pub references: References,
    /// What whoever launched the run wants to find again.
    pub notes: String,
}

/// Cross entropies by the reference of a pair's two sequences, in nats, by the pair's number in its data set.
pub type ReferenceCosts = BTreeMap<usize, [f64; 2]>;

/// What the reference makes of each pair: it does not learn, so that this is computed once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct References {
    /// Of the pairs that are trained on.
    pub train: ReferenceCosts,
    /// Of those that are held out.
    pub evaluation: ReferenceCosts,
}

impl TrainState {
    /// Of a run that has not begun.
    pub(super) fn new(position: Position) -> Self {
        Self {
            steps: 0,
            position,
            history: Vec::new(),
            evaluations: Vec::new(),
            references: References::default(),
            notes: String::new(),
        }
    }

    /// The loss of the held-out split after so many steps, where it is known.
    pub(super) fn evaluation(&self, steps: usize) -> Option<f64> {
        self.evaluations.iter().find(|evaluation| evaluation.step == steps).map(|evaluation| evaluation.loss)
    }
}

/// Where checkpoints go, and when.
#[derive(Clone)]
pub struct CheckpointTarget {
    /// Their folder.
    pub store: Store,
    /// When they are made.
    pub config: CheckpointConfig,
    /// Which run they belong to.
    pub identity: Identity,
    /// Says what [`TrainState::notes`] is to hold; called for every checkpoint, on whichever thread makes it.
    pub notes: Arc<dyn Fn() -> String + Send + Sync>,
}

/// See the module's documentation.
pub struct Saver {
    target: Option<CheckpointTarget>,
    aggregator: Addr<GradientAggregator>,
    state: Mutex<TrainState>,
    noted: Condvar,
    saved: Mutex<Saved>,
}

/// The last checkpoint.
struct Saved {
    /// Steps and evaluations that it holds.
    holds: (usize, usize),
    path: Option<PathBuf>,
    when: Instant,
    /// The last attempt failed, so that the next step tries again.
    failing: bool,
}

impl Saver {
    pub(super) fn new(
        target: Option<CheckpointTarget>,
        aggregator: Addr<GradientAggregator>,
        state: TrainState,
    ) -> Self {
        // What a run begins with is on the disk already, or nothing.
        let holds = (state.steps, state.evaluations.len());
        let saved = Saved { holds, path: None, when: Instant::now(), failing: false };
        Self { target, aggregator, state: Mutex::new(state), noted: Condvar::new(), saved: Mutex::new(saved) }
    }

    /// Where the run is.
    pub(super) fn state(&self) -> MutexGuard<'_, TrainState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a step was taken, what the reference made of its pairs, and what comes after it.
    pub(super) fn step_taken(&self, report: StepReport, references: ReferenceCosts, position: Position) {
        let mut state = self.state();
        state.references.train.extend(references);
        state.history.push(report);
        (state.steps, state.position) = (report.step, position);
        self.noted.notify_all();
    }

    /// Notes an evaluation, which took too long to be made again: it is saved.
    pub(super) fn evaluated(&self, report: EvaluationReport, references: ReferenceCosts) {
        let mut state = self.state();
        state.references.evaluation.extend(references);
        state.evaluations.push(report);
        drop(state);
        self.save_or_warn();
    }

    /// Makes a checkpoint of the step that was taken if it is time for one.
    pub(super) fn after_step(&self, now: Instant) {
        let Some(CheckpointTarget { config, .. }) = &self.target else { return };
        let due = {
            let steps = self.state().steps;
            let saved = self.saved();
            saved.failing || config.is_due(steps, now.saturating_duration_since(saved.when))
        };
        if due {
            self.save_or_warn();
        }
    }

    /// The same, whatever time it is; a checkpoint that cannot be written is no reason to end a run.
    pub fn save_or_warn(&self) {
        let failed_before = self.saved().failing;
        match self.save() {
            Ok(_) if failed_before => tracing::info!("checkpoints can be written again"),
            Ok(_) => {}
            Err(error) if failed_before => tracing::debug!("{error}"),
            Err(error) => tracing::warn!("{error}; it is tried again after every step, and older ones stay"),
        }
    }

    /// Makes a checkpoint of the last finished step, unless there is one already, also while the next step is under way.
    /// Blocks. Returns the file; `None` where nothing is to be saved.
    ///
    /// # Errors
    /// When it cannot be written. Older ones are still there then.
    pub fn save(&self) -> Result<Option<PathBuf>, CheckpointError> {
        let Some(target) = &self.target else { return Ok(None) };
        let mut saved = self.saved();
        let result = self.write(target, &mut saved);
        saved.failing = result.is_err();
        result
    }

    fn write(&self, target: &CheckpointTarget, saved: &mut Saved) -> Result<Option<PathBuf>, CheckpointError> {
        let holds = |state: &TrainState| (state.steps, state.evaluations.len());
        if holds(&self.state()) == saved.holds {
            return Ok(saved.path.clone());
        }
        let started = Instant::now();
        let (Snapshot { tensors, .. }, mut state) = self.of_one_step()?;
        state.notes = (target.notes)();
        let checkpoint = Checkpoint { identity: target.identity.clone(), state, tensors };
        let path = target.store.save(checkpoint.state.steps, &checkpoint)?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(path = %path.display(), seconds, "a checkpoint was written");
        *saved =
            Saved { holds: holds(&checkpoint.state), path: Some(path.clone()), when: Instant::now(), failing: false };
        Ok(Some(path))
    }

    /// Parameters and state after the same step.
    fn of_one_step(&self) -> Result<(Snapshot, TrainState), CheckpointError> {
        let fail = |why: &dyn ToString| CheckpointError::State(why.to_string());
        for _ in 0..COPIES {
            let snapshot = block_on(self.aggregator.send(TakeSnapshot)).map_err(|error| fail(&error))?;
            let snapshot = snapshot.map_err(|error| fail(&error))?;
            let behind = |state: &mut TrainState| (state.steps as u64) < snapshot.steps;
            let waited = self.noted.wait_timeout_while(self.state(), NOTING, behind);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.steps as u64 == snapshot.steps {
                return Ok((snapshot, state.clone()));
            }
        }
        Err(fail(&"the optimiser and the run's thread disagree about the step"))
    }

    fn saved(&self) -> MutexGuard<'_, Saved> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
