//! Training: the settings, the loop, and the actor that turns micro-batch gradients into optimiser steps.

mod config;
mod schedule;

pub use config::{InvalidSetting, TrainingConfig};
pub use schedule::Schedule;
