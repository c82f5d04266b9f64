//! `node bench step`: whole training steps with real processes over loopback, as in the demo, on text that fills every
//! sequence.
//!
//! The first step is not measured: it fills caches, and with encryption its products pay for what is done once a run.

use std::path::PathBuf;

use actors::data::HeldOut;
use actors::matmul::devices::GpuRequest;
use anyhow::{Context as _, ensure};
use indicatif::HumanBytes;
use serde::Serialize;
use serde_json::json;

use super::median;
use crate::config::{BackendChoice, Config, HeadChoice};
use crate::link::Route;
use crate::local::{LocalRun, write};
use crate::report::{Report, TimeBreakdown, WorkerReport};
use crate::roles::Start;

/// Words of an example for each token that it must fill: any tokenizer makes at least one token of a word.
const WORDS_A_TOKEN: usize = 1;
/// Words of the text.
const WORDS: [&str; 16] = [
    "river", "copper", "window", "seven", "lantern", "harbour", "winter", "paper", "thunder", "garden", "bridge",
    "silver", "morning", "letter", "stone", "orchard",
];

/// What is measured.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// A Hugging Face folder or a .gguf file.
    pub model: PathBuf,
    /// Worker processes.
    pub workers: usize,
    /// GPUs that each of them serves with, as its own flag has them.
    pub gpus: GpuRequest,
    /// Tokens of a step.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Micro-batches of a step, all in flight at once.
    pub micro_batches: usize,
    /// Where the head's products are computed with encryption.
    pub head: HeadChoice,
    /// Steps that are measured.
    pub steps: usize,
    /// Where base products are computed.
    pub backend: BackendChoice,
    /// What lies between the owner and each worker, besides this machine.
    pub route: Route,
    /// The owner's memory for the products of the masks, MiB; the rest goes to its file.
    pub mask_cache_mib: u64,
    /// Whether products of masks are kept for later runs, and those of earlier ones used.
    pub keep_masks: bool,
    /// Every process writes a trace beside this name.
    pub trace: Option<PathBuf>,
    /// The owner counts its processor time by parts.
    pub parts: bool,
    /// Print JSON.
    pub json: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct StepFigures {
    model: String,
    backend: String,
    parameter_sets: Vec<String>,
    tokens: u64,
    micro_batches: usize,
    #[serde(flatten)]
    route: Route,
    /// Wall-clock seconds of the step that warms up, and of each one after it.
    first_step_seconds: f64,
    step_seconds: Vec<f64>,
    /// Median of the latter.
    seconds_per_step: f64,
    ms_per_token: f64,
    bytes_up_per_token: u64,
    bytes_down_per_token: u64,
    /// What the first step moved more than the others: products that are made once a run.
    once_bytes_up: u64,
    once_bytes_down: u64,
    owner_peak_rss_bytes: u64,
    owner_cpu_seconds: f64,
    workers: Vec<WorkerReport>,
    /// Seconds of all steps, the first one included.
    phases: TimeBreakdown,
}

/// Runs owner and workers, and prints the figures.
///
/// # Errors
/// When the options do not fit each other, or a process fails.
pub async fn run(options: StepOptions) -> anyhow::Result<()> {
    let figures = figures(&options, measure(&options).await?.report)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        lines(&figures).iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// A run that has ended.
pub(super) struct Measured {
    pub(super) report: Report,
    /// Of all workers, from their start on; 0 without any, `None` where the system does not tell.
    pub(super) workers_cpu_seconds: Option<f64>,
}

/// Runs owner and workers, for one step more than is measured.
///
/// # Errors
/// Those of [`run`].
pub(super) async fn measure(options: &StepOptions) -> anyhow::Result<Measured> {
    let folder = tempfile::Builder::new().prefix("velum-bench-").tempdir().context("no temporary folder")?;
    let mut config = configuration(options)?;
    config.owner.out = folder.path().to_path_buf();
    let examples = (options.steps + 1) * options.tokens / options.sequence;
    config.owner.data = Some(write(folder.path(), "text.jsonl", &text(examples, options.sequence))?);
    let local = LocalRun {
        config,
        start: Start::Fresh,
        route: options.route,
        trace: options.trace.clone(),
        parts: options.parts,
        quiet: true,
    };
    let workers_cpu_seconds = local.run().await?;
    Ok(Measured { report: Report::read(folder.path())?, workers_cpu_seconds })
}

/// The owner's settings.
fn configuration(options: &StepOptions) -> anyhow::Result<Config> {
    let StepOptions { tokens, sequence, micro_batches, .. } = *options;
    ensure!(tokens.is_multiple_of(sequence), "--tokens {tokens} is not a multiple of --sequence {sequence}");
    let sequences = tokens / sequence;
    ensure!(
        sequences.is_multiple_of(micro_batches),
        "{sequences} sequences a step cannot be divided among --micro-batches {micro_batches}"
    );
    ensure!(
        options.route == Route::default() || options.backend == BackendChoice::Encrypted,
        "--link and --transport lie between an owner and its workers: --backend encrypted has some"
    );
    let mut config = Config { model: Some(options.model.clone()), ..Config::default() };
    config.owner.backend = options.backend;
    config.owner.head = options.head;
    config.owner.workers = options.workers;
    config.owner.mask_cache_mib = options.mask_cache_mib;
    // What is done once a run is measured, too: nothing may be left of an earlier one.
    config.owner.keep_masks = options.keep_masks;
    config.worker.gpus = options.gpus.to_string();
    config.data.max_tokens = sequence;
    config.data.held_out = HeldOut::Count(0);
    // Every sequence is full: a step has the tokens that were asked for.
    config.data.pad_to = 1;
    config.training.steps = Some(options.steps + 1);
    config.training.micro_batch = sequences / micro_batches;
    config.training.accumulation = micro_batches;
    config.training.in_flight = micro_batches;
    config.training.warmup_steps = Some(0);
    config.validate()?;
    Ok(config)
}

/// Examples that are each at least so many tokens long; every one is another sequence of words.
fn text(examples: usize, tokens: usize) -> String {
    let mut state = 1_u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        WORDS[(state >> 60) as usize]
    };
    let mut line = |_| {
        let words: Vec<&str> = (0..tokens * WORDS_A_TOKEN).map(|_| word()).collect();
        json!({ "text": words.join(" ") }).to_string() + "\n"
    };
    (0..examples.max(1)).map(&mut line).collect()
}

/// The report's figures, the first step apart.
fn figures(options: &StepOptions, report: Report) -> anyhow::Result<StepFigures> {
    let (first, steps) = report.steps.split_first().context("no step was taken")?;
    ensure!(steps.len() == options.steps, "{} of {} steps were taken", steps.len(), options.steps);
    let step_seconds: Vec<f64> = steps.iter().map(|step| step.seconds).collect();
    let tokens: u64 = steps.iter().map(|step| step.tokens).sum();
    ensure!(tokens == (options.tokens * options.steps) as u64, "the text does not fill its sequences: {tokens} tokens");
    let (up, down): (u64, u64) = steps.iter().fold((0, 0), |(up, down), s| (up + s.bytes_up, down + s.bytes_down));
    let count = steps.len() as u64;
    let seconds_per_step = median(&step_seconds);
    Ok(StepFigures {
        model: report.model,
        backend: report.backend,
        parameter_sets: report.parameter_sets.iter().map(ToString::to_string).collect(),
        tokens: first.tokens,
        micro_batches: options.micro_batches,
        route: options.route,
        first_step_seconds: first.seconds,
        step_seconds,
        seconds_per_step,
        ms_per_token: 1e3 * seconds_per_step / first.tokens as f64,
        bytes_up_per_token: up / tokens,
        bytes_down_per_token: down / tokens,
        once_bytes_up: first.bytes_up.saturating_sub(up / count),
        once_bytes_down: first.bytes_down.saturating_sub(down / count),
        owner_peak_rss_bytes: report.owner_peak_rss_bytes,
        owner_cpu_seconds: report.owner_cpu_seconds,
        workers: report.workers,
        phases: report.time,
    })
}

fn lines(figures: &StepFigures) -> Vec<String> {
    let every: Vec<String> = figures.step_seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
    let sets = figures.parameter_sets.join(", ");
    let phases = &figures.phases;
    let mut lines = vec![
        format!("{} on {}{}{sets}", figures.backend, figures.model, if sets.is_empty() { "" } else { ", " }),
        format!(
            "  a step            {:.2} s of {} tokens ({}; the first one {:.2})",
            figures.seconds_per_step,
            figures.tokens,
            every.join(", "),
            figures.first_step_seconds
        ),
        format!(
            "  per token         {:.2} ms, {} up, {} down",
            figures.ms_per_token,
            HumanBytes(figures.bytes_up_per_token),
            HumanBytes(figures.bytes_down_per_token)
        ),
        format!(
            "  once a run        {} up, {} down",
            HumanBytes(figures.once_bytes_up),
            HumanBytes(figures.once_bytes_down)
        ),
        format!(
            "  time              encrypt {:.1} s, network and workers {:.1} s, decrypt {:.1} s, owner's own {:.1} s",
            phases.encrypt_seconds, phases.transport_and_multiply_seconds, phases.decrypt_seconds, phases.own_seconds
        ),
        format!("  owner             {} of memory at its peak", HumanBytes(figures.owner_peak_rss_bytes)),
    ];
    lines.extend(figures.route.words().map(|words| format!("  link              {words}, to each worker")));
    lines.extend(figures.workers.iter().map(|worker| {
        let (peak, busy) = (HumanBytes(worker.peak_rss_bytes.unwrap_or(0)), worker.busy_seconds.unwrap_or(0.0));
        format!("  worker            {}, busy {busy:.1} s, {peak} at its peak", worker.serves)
    }));
    lines
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::link::Line;

    fn options() -> StepOptions {
        StepOptions {
            model: "model".into(),
            workers: 1,
            gpus: GpuRequest::None,
            tokens: 1024,
            sequence: 256,
            mask_cache_mib: 77,
            keep_masks: false,
            micro_batches: 2,
            head: HeadChoice::Auto,
            steps: 3,
            backend: BackendChoice::Encrypted,
            route: Route::default(),
            trace: None,
            parts: false,
            json: true,
        }
    }

    #[test]
    fn sequences_are_divided_among_micro_batches() {
        let config = configuration(&options()).unwrap();
        assert_eq!((config.training.micro_batch, config.training.accumulation), (2, 2));
        assert_eq!((config.training.in_flight, config.training.steps()), (2, 4));
        let refused = |change: fn(&mut StepOptions)| {
            let mut options = options();
            change(&mut options);
            configuration(&options).unwrap_err().to_string()
        };
        assert!(refused(|options| options.sequence = 300).contains("--sequence 300"));
        let linked = |options: &mut StepOptions| {
            (options.route.link, options.backend) = (Some(Line::default()), BackendChoice::Plain)
        };
        assert!(refused(linked).contains("--link"));
        assert!(refused(|options| options.micro_batches = 3).contains("--micro-batches 3"));
    }

    #[test]
    fn no_two_examples_are_alike() {
        let text = text(8, 32);
        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 8);
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), 8);
    }
}
