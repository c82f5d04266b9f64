//! What a training run leaves behind for its owner besides the adapter: `report.json`, `loss.svg`, and the figures
//! about this process that go into them; and while it lasts `metrics.jsonl` and TensorBoard's event files.
//!
//! The first two appear whole or not at all, so that a run that is killed while it writes leaves the last good ones.

mod card;
mod curves;
mod events;
mod metrics;
mod parts;
mod plot;
mod process;

use std::ops::Range;
use std::path::Path;

use actors::files::{Readers, write_atomically};
use actors::trainer::PreferenceReport;
use anyhow::Context;
use protocol::he::ParameterSet;
use serde::{Deserialize, Deserializer, Serialize};

pub use card::{CARD_FILE, adapter_card};
pub use curves::Curves;
pub use events::{EVENTS_FOLDER, remove_events};
pub use metrics::METRICS_FILE;
pub use parts::{PARTS_VARIABLE, Parts, Sampler};
pub use plot::loss_svg;
pub use process::{available_memory_bytes, cpu_seconds, cpu_seconds_of, peak_rss_bytes, peak_rss_bytes_of};

/// File name of the report in the output folder.
pub const REPORT_FILE: &str = "report.json";
/// File name of the plot in the output folder.
pub const PLOT_FILE: &str = "loss.svg";

/// All that a run measured, as `report.json` holds it. A loss that is not finite is `null` there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this program.
    pub velum_version: String,
    /// Name of the model, for people.
    pub model: String,
    /// Digest of the model in hexadecimal: what owner and workers agree on.
    pub model_digest: String,
    /// `encrypted` or `plain`.
    pub backend: String,
    /// Parameter sets in use, cheapest first; none with the plain backend.
    pub parameter_sets: Vec<ParameterSet>,
    /// Seed of adapters, dropout and of what is held out.
    pub seed: u64,
    /// Seed of the order of the data.
    pub data_seed: u64,
    /// Digest of the tokens trained on, and of what is learnt of them.
    #[serde(default)]
    pub data_digest: Option<String>,
    /// The same of what is held out; `None` where nothing is.
    #[serde(default)]
    pub held_out_digest: Option<String>,
    /// `[training]`, `[data]` and `[encryption]` as the run followed them.
    #[serde(default)]
    pub settings: Option<serde_json::Value>,
    /// The step of the best evaluation, where its adapters are the result and it is not the last one.
    #[serde(default)]
    pub best_step: Option<u32>,
    /// Mean loss per token on the held-out examples before the first step; `None` without held-out examples.
    pub eval_loss_before: Option<f64>,
    /// The same with the adapters that are the result.
    pub eval_loss_after: Option<f64>,
    /// Every evaluation, the first and the last included.
    pub evaluations: Vec<EvaluationReport>,
    /// What held-out prompts were answered at the evaluations, if they were (`eval.generate`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<AnswersReport>,
    /// Every optimiser step.
    pub steps: Vec<StepReport>,
    /// Where the seconds of all steps went.
    pub time: TimeBreakdown,
    /// The workers that served since the run was last resumed; empty with the plain backend.
    pub workers: Vec<WorkerReport>,
    /// Largest resident memory of the owner's process, bytes.
    pub owner_peak_rss_bytes: u64,
    /// User and system time of the owner's process, seconds over all cores.
    pub owner_cpu_seconds: f64,
}

/// One optimiser step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u32,
    /// Mean training loss per scored token.
    #[serde(deserialize_with = "loss")]
    pub loss: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Tokens that went through the model, scored or not.
    pub tokens: u64,
    /// Tokens that were scored; `None` in reports of earlier versions, as are the next two.
    #[serde(default)]
    pub loss_tokens: Option<u64>,
    /// Its learning rate.
    #[serde(default)]
    pub learning_rate: Option<f64>,
    /// Norm of the mean gradient over all that is trained, before it was clipped.
    #[serde(default)]
    pub gradient_norm: Option<f64>,
    /// Bytes sent to workers.
    pub bytes_up: u64,
    /// Bytes received from workers.
    pub bytes_down: u64,
    /// Processor seconds of the owner since the step before, or since it started: with those of an evaluation or a
    /// checkpoint that came between. Of a step before a resumption it is not known.
    #[serde(default)]
    pub owner_cpu_seconds: Option<f64>,
    /// The same by part of the work, where the owner was told to count it ([`PARTS_VARIABLE`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_parts: Option<Parts>,
    /// What its pairs came to, if the run prefers answers.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
}

/// The loss on the held-out examples after some number of steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationReport {
    /// Steps done before it; 0 is the untouched model.
    pub step: u32,
    /// Mean loss per scored token.
    #[serde(deserialize_with = "loss")]
    pub loss: f64,
    /// What its pairs came to, if the run prefers answers.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
}

/// Answers to held-out prompts after some number of steps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswersReport {
    /// Steps done before; 0 is the untouched model.
    pub step: u32,
    /// The same prompts each time.
    pub answers: Vec<AnswerReport>,
}

/// A held-out prompt and what was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerReport {
    /// The prompt as the model reads it.
    pub prompt: String,
    /// What the data have as its answer.
    pub expected: String,
    /// What the model wrote.
    pub answer: String,
}

/// What the pairs of a preferred answer and another one came to, on average.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    /// Reward of the preferred answer.
    pub rewards_chosen: f64,
    /// Reward of the other one.
    pub rewards_rejected: f64,
    /// The difference.
    pub rewards_margin: f64,
    /// Share of the pairs whose preferred answer is rewarded more.
    pub rewards_accuracy: f64,
}

impl From<PreferenceReport> for Rewards {
    fn from(report: PreferenceReport) -> Self {
        Self {
            rewards_chosen: report.rewards_chosen,
            rewards_rejected: report.rewards_rejected,
            rewards_margin: report.margin(),
            rewards_accuracy: report.accuracy,
        }
    }
}

/// Seconds of the run by activity. With several micro-batches in flight the activities overlap, so that their sum may
/// exceed the wall clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeBreakdown {
    /// Waiting for the products of the masks, once for each matrix and direction.
    pub mask_seconds: f64,
    /// Encoding and encryption.
    pub encrypt_seconds: f64,
    /// From handing a ciphertext to the transport until its product is back whole.
    pub transport_and_multiply_seconds: f64,
    /// The part of the former in which workers multiplied, as they say themselves.
    pub multiply_seconds: f64,
    /// Decryption and decoding.
    pub decrypt_seconds: f64,
    /// The owner's own arithmetic: norms, attention, adapters, head, loss, optimiser.
    pub own_seconds: f64,
}

/// What one worker did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Its libp2p peer id.
    pub peer_id: String,
    /// Layers that it served; slices of the head are counted on, after the last layer.
    pub layers: Range<u16>,
    /// The same in words.
    #[serde(default)]
    pub serves: String,
    /// The device that computed, as the worker names it.
    pub device: String,
    /// Products of it that the owner used.
    pub calls: u64,
    /// Seconds that it spent in products, as it says itself; `None` if it did not answer any more.
    pub busy_seconds: Option<f64>,
    /// Its process's largest resident memory in bytes, as it says itself; `None` if it did not answer any more.
    pub peak_rss_bytes: Option<u64>,
    /// What became of it: `serving`, `gone`, or `banned: ` and why.
    pub state: String,
}

impl TimeBreakdown {
    /// Together with what was spent before.
    #[must_use]
    pub fn after(self, earlier: Self) -> Self {
        Self {
            mask_seconds: self.mask_seconds + earlier.mask_seconds,
            encrypt_seconds: self.encrypt_seconds + earlier.encrypt_seconds,
            transport_and_multiply_seconds: self.transport_and_multiply_seconds
                + earlier.transport_and_multiply_seconds,
            multiply_seconds: self.multiply_seconds + earlier.multiply_seconds,
            decrypt_seconds: self.decrypt_seconds + earlier.decrypt_seconds,
            own_seconds: self.own_seconds + earlier.own_seconds,
        }
    }
}

impl Report {
    /// Writes `report.json` and `loss.svg` into the existing folder `out`.
    ///
    /// # Errors
    /// When a file cannot be written; the message names it. A file that was there before is then still there.
    pub fn write(&self, out: &Path) -> anyhow::Result<()> {
        let mut json = serde_json::to_vec_pretty(self).context("report.json")?;
        json.push(b'\n');
        write_atomically(&out.join(REPORT_FILE), &json, Readers::Usual)?;
        let training: Vec<_> = self.steps.iter().map(|step| (step.step, step.loss)).collect();
        let evaluation: Vec<_> = self.evaluations.iter().map(|eval| (eval.step, eval.loss)).collect();
        let title = format!("{} ({} backend)", self.model, self.backend);
        let plot = loss_svg(&title, &training, &evaluation)?;
        Ok(write_atomically(&out.join(PLOT_FILE), plot.as_bytes(), Readers::Usual)?)
    }

    /// Reads the report in the folder `out`.
    ///
    /// # Errors
    /// When there is none or it is not a report.
    pub fn read(out: &Path) -> anyhow::Result<Self> {
        let path = out.join(REPORT_FILE);
        let json = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("{} is not a report", path.display()))
    }
}

/// JSON has no NaN: a loss that is not finite is written as `null` and read back as NaN.
fn loss<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests;
