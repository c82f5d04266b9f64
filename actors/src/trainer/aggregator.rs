//! The actor that gathers the gradients of a step's micro-batches and hands the step to the optimiser.
//!
//! These are decrypted, and the owner's. Gradients that several devices of a worker have parts of are added there, as
//! ciphertexts ([`crate::worker::aggregator`]).

use actix::{Actor, ActorFutureExt, AtomicResponse, Context, Handler, Message, WrapFuture};

use super::accumulate::{Accumulation, MicroBatchGradient, Snapshot, StepSummary};
use super::adamw::AdamWConfig;
use super::config::TrainingConfig;
use crate::checkpoint::Checkpoint;
use crate::heavy::on_rayon;
use crate::lora::LoraAdapters;

/// Messages that may wait: every micro-batch in flight sends one and waits for its answer.
const MAILBOX: usize = 64;

/// Why a gradient or a step was refused. The parameters are as they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AggregatorError {
    /// No micro-batch of that place is awaited in this step.
    #[error("no gradient of micro-batch {index} is awaited in this step")]
    Unexpected {
        /// The micro-batch.
        index: usize,
    },
    /// The gradients are not those of the parameters.
    #[error("the gradients of micro-batch {index} have other sizes than the adapters")]
    Shape {
        /// The micro-batch.
        index: usize,
    },
    /// None of the step's positions carried loss.
    #[error("no token of the whole step carries loss; look at the data's maximum length and its roles")]
    NothingToLearn,
    /// The loss or the gradient overflowed.
    #[error("the loss or its gradient is not a finite number; try a lower learning rate")]
    NotFinite,
    /// A checkpoint is not of these parameters.
    #[error("the checkpoint has no tensor `{tensor}` of {size} values; it is of other adapters")]
    Checkpoint {
        /// What was looked for.
        tensor: String,
        /// Values that it should have.
        size: usize,
    },
    /// The parameters cannot be read or written.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An earlier step panicked, and the optimiser with it.
    #[error("the optimiser stopped after a panic; this is a bug, please report it with the log")]
    Stopped,
}

/// Averages the gradients of a step's micro-batches over their tokens, clips them and lets AdamW step.
pub struct GradientAggregator {
    /// Away while rayon adds or takes a step; lost if that panics.
    state: Option<Accumulation>,
}

impl GradientAggregator {
    /// For the parameters of these adapters, which it alone changes.
    pub fn new(adapters: &LoraAdapters, config: &TrainingConfig) -> Self {
        let TrainingConfig { betas, epsilon, weight_decay, max_gradient_norm, .. } = *config;
        let optimiser = AdamWConfig { betas, epsilon, weight_decay };
        let (parameters, learning) = (adapters.parameters(), adapters.learning());
        Self { state: Some(Accumulation::new(parameters, learning, optimiser, max_gradient_norm)) }
    }
}

impl GradientAggregator {
    /// The same, going on from the parameters and moments of a checkpoint made after `steps` steps.
    ///
    /// # Errors
    /// When it is of other parameters. These are as they were then.
    pub fn restored<S>(
        adapters: &LoraAdapters,
        config: &TrainingConfig,
        steps: u64,
        from: &mut Checkpoint<S>,
    ) -> Result<Self, AggregatorError> {
        let mut new = Self::new(adapters, config);
        new.state.as_mut().ok_or(AggregatorError::Stopped)?.restore(steps, from)?;
        Ok(new)
    }
}

impl Actor for GradientAggregator {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

/// Begins a step.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<(), AggregatorError>")]
pub struct BeginStep {
    /// Micro-batches that it sums over.
    pub micro_batches: usize,
    /// Its learning rate.
    pub learning_rate: f64,
}

impl Handler<BeginStep> for GradientAggregator {
    type Result = Result<(), AggregatorError>;

    fn handle(&mut self, step: BeginStep, _context: &mut Self::Context) -> Self::Result {
        let state = self.state.as_mut().ok_or(AggregatorError::Stopped)?;
        state.begin(step.micro_batches, step.learning_rate);
        Ok(())
    }
}

impl Message for MicroBatchGradient {
    type Result = Result<Option<StepSummary>, AggregatorError>;
}

/// Keeps the gradient; the last one of the step takes the step, and its answer says what it did.
impl Handler<MicroBatchGradient> for GradientAggregator {
    type Result = AtomicResponse<Self, Result<Option<StepSummary>, AggregatorError>>;

    fn handle(&mut self, micro_batch: MicroBatchGradient, _context: &mut Self::Context) -> Self::Result {
        let state = self.state.take();
        let work = async move {
            let Some(mut state) = state else { return (None, Err(AggregatorError::Stopped)) };
            let work = on_rayon(move || {
                let result = match state.add(micro_batch) {
                    Ok(true) => state.finish().map(Some),
                    Ok(false) => Ok(None),
                    Err(refused) => Err(refused),
                };
                (state, result)
            });
            match work.await {
                Ok((state, result)) => (Some(state), result),
                Err(_) => (None, Err(AggregatorError::Stopped)),
            }
        };
        AtomicResponse::new(Box::pin(work.into_actor(self).map(|(state, result), actor, _| {
            actor.state = state;
            result
        })))
    }
}

/// Keeps the parameters as those of the best evaluation so far, or goes back to them: then the answer says whether they
/// were kept. Both come between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Message)]
#[rtype(result = "Result<bool, AggregatorError>")]
pub(super) enum Best {
    /// They are better than any before.
    Keep,
    /// The run is over.
    Return,
}

impl Handler<Best> for GradientAggregator {
    type Result = Result<bool, AggregatorError>;

    fn handle(&mut self, best: Best, _context: &mut Self::Context) -> Self::Result {
        let state = self.state.as_mut().ok_or(AggregatorError::Stopped)?;
        match best {
            Best::Keep => state.keep_best().map(|()| true),
            Best::Return => state.return_to_best(),
        }
    }
}

/// Copies the parameters and the optimiser. It is answered between two steps, never within one.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<Snapshot, AggregatorError>")]
pub struct TakeSnapshot;

impl Handler<TakeSnapshot> for GradientAggregator {
    type Result = Result<Snapshot, AggregatorError>;

    fn handle(&mut self, _: TakeSnapshot, _context: &mut Self::Context) -> Self::Result {
        self.state.as_ref().ok_or(AggregatorError::Stopped)?.snapshot()
    }
}
