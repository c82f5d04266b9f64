//! What a training run tells whoever watches it.

use serde::{Deserialize, Serialize};

use super::objective::PreferenceReport;
use crate::transport::Traffic;

/// Progress of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum TrainEvent {
    /// The held-out split is being evaluated.
    EvaluationStarted {
        /// Optimiser steps taken so far.
        step: usize,
        /// How many micro-batches it takes.
        micro_batches: usize,
    },
    /// The held-out split was evaluated.
    Evaluation(EvaluationReport),
    /// Prompts were answered after an evaluation.
    Answered {
        /// Optimiser steps taken so far.
        step: usize,
    },
    /// An optimiser step was taken.
    Step(StepReport),
    /// The run ended, and its adapter is saved where one was asked for.
    Finished {
        /// Optimiser steps taken.
        steps: usize,
        /// Whether it was stopped before its time.
        stopped: bool,
        /// The step whose adapters are the result, where that is not the last one.
        best: Option<usize>,
    },
}

/// One evaluation of the held-out split.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationReport {
    /// Optimiser steps taken before it.
    pub step: usize,
    /// Mean cross entropy of its targets in nats, or mean loss of its pairs.
    pub loss: f64,
    /// Wall time it took.
    pub seconds: f64,
    /// What the pairs of a preference came to.
    pub preference: Option<PreferenceReport>,
}

/// One optimiser step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Which one, from 1.
    pub step: usize,
    /// Mean cross entropy of its targets in nats, or mean loss of its pairs, before the parameters moved.
    pub loss: f64,
    /// Wall time it took.
    pub seconds: f64,
    /// Tokens that went through the model, padding included.
    pub tokens: usize,
    /// Targets that carried loss.
    pub loss_tokens: usize,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Norm of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// Bytes exchanged with workers during it.
    pub traffic: Traffic,
    /// What the pairs of a preference came to.
    pub preference: Option<PreferenceReport>,
}
