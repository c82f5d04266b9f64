//! Training: the settings, the loop, and the actor that turns micro-batch gradients into optimiser steps.
//!
//! [`Trainer::launch`] starts two actors. The [`GradientAggregator`] owns the optimiser and is the only one that
//! changes the adapters. The [`Trainer`] owns a thread with the training loop, which blocks on base products and
//! so must not be an actor's; whoever launched it reads its progress from a bounded channel and may stop it. The [`Saver`]
//! makes checkpoints of both, and a run that is given one goes on from there: with the same data, settings and products
//! it computes bit for bit what it would have computed without the interruption.

mod accumulate;
mod adamw;
mod aggregator;
mod config;
mod events;
mod flight;
mod objective;
mod parallel;
mod run;
mod saver;
mod schedule;
mod scoring;
mod stopping;
mod strands;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use actix::{Actor, ActorContext, Addr, Context, Handler, MailboxError, Message};
use protocol::model::Model;
use tokio::sync::{mpsc, oneshot};

use self::run::Run;
use crate::adapter::AdapterError;
use crate::backend::LinearBackend;
use crate::checkpoint::Checkpoint;
use crate::data::{BatchSource, DataError, MicroBatch};
use crate::generation::GenerationError;
use crate::lora::LoraAdapters;
use crate::transformer::{Llama, LlamaError, Prefix};

pub use self::accumulate::{MicroBatchGradient, Snapshot, StepSummary, snapshot_values};
pub use self::adamw::{AdamW, AdamWConfig, Moments};
pub use self::aggregator::{AggregatorError, BeginStep, GradientAggregator, TakeSnapshot};
pub use self::config::{InvalidSetting, TrainingConfig};
pub use self::events::{EvaluationReport, StepReport, TrainEvent};
pub use self::objective::{Costs, Judged, Objective, Preference, PreferenceReport, PreferenceSum, Reference};
pub use self::saver::{CheckpointTarget, ReferenceCosts, References, Saver, TrainState};
pub use self::schedule::{Schedule, Timing};

/// Events that may wait for whoever reads them; then training waits too.
const EVENTS: usize = 64;
/// The training thread itself only coordinates; its micro-batches have their own.
const STACK_BYTES: usize = 8 << 20;

/// Why training ended early. The adapter of the last finished step is saved all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting cannot be.
    #[error(transparent)]
    Setting(#[from] InvalidSetting),
    /// A pass through the model failed.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// The optimiser refused a step.
    #[error(transparent)]
    Aggregator(#[from] AggregatorError),
    /// The adapter cannot be saved.
    #[error("the adapter cannot be saved: {0}")]
    Adapter(#[from] AdapterError),
    /// The training data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// There were not enough micro-batches.
    #[error("the training data ended before step {step}")]
    DataEnded {
        /// The step that could not be made, from 1.
        step: usize,
    },
    /// An actor is gone.
    #[error("the gradient aggregator does not answer: {0}")]
    Mailbox(#[from] MailboxError),
    /// A step ended without its summary.
    #[error("a step ended without a summary; this is a bug, please report it with the log")]
    Lost,
    /// Prompts of an evaluation cannot be answered.
    #[error("a held-out prompt cannot be answered: {0}")]
    Generation(#[from] GenerationError),
    /// A thread could not be started.
    #[error("a training thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
    /// The training thread panicked.
    #[error("training panicked; this is a bug, please report it with the log")]
    Panicked,
}

impl From<candle_core::Error> for TrainError {
    fn from(error: candle_core::Error) -> Self {
        Self::Llama(error.into())
    }
}

/// Has prompts answered after so many steps with the adapters as they are then. Called on the training thread, which waits.
pub type Answering = Arc<dyn Fn(usize, &LoraAdapters) -> Result<(), GenerationError> + Send + Sync>;

/// A run's settings.
pub struct TrainerConfig {
    /// Hyper-parameters.
    pub training: TrainingConfig,
    /// Where the adapter is saved when the run ends; `None` leaves that to the caller.
    pub adapter: Option<AdapterTarget>,
    /// Where checkpoints go; `None` makes none.
    pub checkpoints: Option<CheckpointTarget>,
    /// What is done with the adapters as they are after each evaluation; `None` does nothing.
    pub answering: Option<Answering>,
    /// What the run goes on from; `None` begins it. Whoever gives it has made sure that it is of this run.
    pub resume: Option<Checkpoint<TrainState>>,
}

impl TrainerConfig {
    /// A new run that leaves nothing on the disk.
    pub fn new(training: TrainingConfig) -> Self {
        Self { training, adapter: None, checkpoints: None, answering: None, resume: None }
    }
}

/// Where an adapter goes.
#[derive(Clone, Debug)]
pub struct AdapterTarget {
    /// A folder, created where it does not exist.
    pub folder: PathBuf,
    /// Name of the base model, written into the adapter's configuration.
    pub base_model: String,
}

/// The owner's half of a model and the adapters that are trained.
pub struct TrainableModel {
    /// The model.
    pub llama: Llama,
    /// Its adapters; only the aggregator changes them.
    pub adapters: LoraAdapters,
    /// The adapters of DPO's reference; `None` is the model without any.
    pub reference: Option<LoraAdapters>,
}

impl TrainableModel {
    /// A model with new adapters.
    ///
    /// # Errors
    /// When a setting cannot be or the model cannot be read.
    pub fn new(
        model: Arc<Model>,
        backend: Arc<dyn LinearBackend>,
        config: &TrainingConfig,
    ) -> Result<Self, TrainError> {
        config.validate()?;
        config.lora.values(model.config())?;
        let adapters = LoraAdapters::new(model.config(), &config.lora, config.seed)?;
        adapters.set_norms(|norm, _| Ok::<_, LlamaError>(model.norm(norm)?.unwrap_or_default()))?;
        adapters.set_tokens(|tokens| Ok::<_, LlamaError>(model.embed(tokens)?))?;
        Ok(Self { llama: Llama::new(model, backend)?, adapters, reference: None })
    }

    /// The same with the values of other adapters of the same modules and ranks, such as those of an earlier run.
    ///
    /// # Errors
    /// When they are of others.
    pub fn starting_from(self, adapters: &LoraAdapters, config: &TrainingConfig) -> Result<Self, TrainError> {
        self.adapters.set(adapters)?;
        let compared = config.objective == Objective::Dpo && config.reference.unwrap_or_default() == Reference::Start;
        let reference = compared.then(|| {
            let copy = LoraAdapters::new(self.llama.config(), self.adapters.config(), config.seed)?;
            copy.set(adapters)?;
            Ok::<_, TrainError>(copy)
        });
        Ok(Self { reference: reference.transpose()?, ..self })
    }

    /// The same, which keeps what enters the lowest adapted layer.
    pub fn with_prefix(self, prefix: Prefix) -> Self {
        Self { llama: self.llama.with_prefix(prefix), ..self }
    }
}

/// What is trained and evaluated on.
pub struct TrainingData {
    /// Micro-batches in the order in which they are learnt from.
    pub train: Box<dyn BatchSource>,
    /// The held-out split; may be empty.
    pub evaluation: Vec<MicroBatch>,
}

/// How a run ended.
pub struct TrainOutcome {
    /// Optimiser steps taken.
    pub steps: usize,
    /// Whether it was stopped before its time.
    pub stopped: bool,
    /// Mean loss of the held-out split before the first step.
    pub evaluation_before: Option<f64>,
    /// The same with the adapters that are the result; `None` when the run was stopped.
    pub evaluation_after: Option<f64>,
    /// The step whose adapters are the result, where that is not the last one.
    pub best: Option<usize>,
    /// The model with its trained adapters.
    pub model: Arc<TrainableModel>,
}

/// A run under way.
pub struct TrainHandle {
    /// Its progress. It ends when the run has; who does not read it stops the run at some point.
    pub events: mpsc::Receiver<TrainEvent>,
    stop: StopHandle,
    saver: Arc<Saver>,
    ended: oneshot::Receiver<Result<TrainOutcome, TrainError>>,
}

impl TrainHandle {
    /// What stops the run from elsewhere, such as a signal handler.
    pub fn stopper(&self) -> StopHandle {
        self.stop.clone()
    }

    /// What makes a checkpoint from elsewhere, such as a signal handler.
    pub fn saver(&self) -> Arc<Saver> {
        Arc::clone(&self.saver)
    }

    /// Waits for the end of the run; events that nobody read are dropped.
    ///
    /// # Errors
    /// Why the run failed.
    pub async fn join(self) -> Result<TrainOutcome, TrainError> {
        drop(self.events);
        self.ended.await.unwrap_or(Err(TrainError::Panicked))
    }
}

/// Stops a run.
#[derive(Clone)]
pub struct StopHandle(Arc<AtomicBool>);

impl StopHandle {
    /// Lets the run finish its current step, save its adapter and end.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Owns the training thread: when the actor stops, as it does with its system, the run ends after its current step.
pub struct Trainer {
    stop: StopHandle,
}

impl Trainer {
    /// Starts a run. Must be called within an actix system.
    ///
    /// # Errors
    /// When a setting cannot be, the checkpoint is of other adapters, or the thread cannot be started.
    pub fn launch(
        mut config: TrainerConfig,
        model: TrainableModel,
        data: TrainingData,
    ) -> Result<TrainHandle, TrainError> {
        config.training.validate()?;
        if let Some(epochs) = config.training.epochs {
            let why = format!("is {epochs}, and has to be turned into steps of the examples first");
            return Err(InvalidSetting { field: "epochs", why }.into());
        }
        let (sender, events) = mpsc::channel(EVENTS);
        let (end, ended) = oneshot::channel();
        let stop = StopHandle(Arc::new(AtomicBool::new(false)));
        let TrainingData { mut train, evaluation } = data;
        let (aggregator, state) = match config.resume.take() {
            Some(mut checkpoint) => {
                let steps = checkpoint.state.steps as u64;
                train.seek(checkpoint.state.position);
                let restored = GradientAggregator::restored(&model.adapters, &config.training, steps, &mut checkpoint)?;
                (restored, checkpoint.state)
            }
            None => (GradientAggregator::new(&model.adapters, &config.training), TrainState::new(train.position())),
        };
        let aggregator = aggregator.start();
        let saver = Arc::new(Saver::new(config.checkpoints.take(), aggregator.clone(), state));
        let (model, run_saver, run_stop) = (Arc::new(model), saver.clone(), stop.0.clone());
        let run = Run { config, model, evaluation, aggregator, saver: run_saver, events: sender, stop: run_stop };
        let trainer = Self { stop: stop.clone() }.start();
        let work = move || {
            let running = Running(trainer);
            let result = run.go(train.as_mut());
            drop(running);
            // Nobody waits for it any more: the adapter was saved all the same.
            let _ = end.send(result);
        };
        thread::Builder::new().name("trainer".into()).stack_size(STACK_BYTES).spawn(work)?;
        Ok(TrainHandle { events, stop, saver, ended })
    }
}

/// Tells the actor that its thread is done, however it ends.
struct Running(Addr<Trainer>);

impl Drop for Running {
    fn drop(&mut self) {
        // The actor may be gone already, with the system.
        let _ = self.0.try_send(Ended);
    }
}

impl Actor for Trainer {
    type Context = Context<Self>;

    fn stopped(&mut self, _context: &mut Self::Context) {
        self.stop.stop();
    }
}

/// The training thread is done.
#[derive(Message)]
#[rtype(result = "()")]
struct Ended;

impl Handler<Ended> for Trainer {
    type Result = ();

    fn handle(&mut self, _: Ended, context: &mut Self::Context) {
        context.stop();
    }
}
