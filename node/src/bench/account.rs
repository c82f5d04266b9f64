//! `node bench account`: what an owner spends when strangers do its products, beside what it would spend training alone.
//!
//! People hand work to strangers to be spared it, so this is the first figure of all: the owner's processor seconds of a step
//! with encryption over those of the same step in plain text, both measured here, each with processes of its own. What is
//! done once a run (weights read, checks drawn, masks asked for and checked) stands beside it and not in it.
//!
//! Of a published configuration that is too large to be run here, the account is projected from one layer (`projection`).

use std::path::{Path, PathBuf};

use actors::matmul::devices::GpuRequest;
use anyhow::{Context as _, bail, ensure};
use indicatif::HumanBytes;
use protocol::model::synthetic::KnownModel;
use serde::Serialize;

use super::step::{Measured, StepOptions, measure};
use super::{median, projection};
use crate::config::{BackendChoice, HeadChoice, OwnerConfig};
use crate::link::{Line, Route, Transport};
use crate::report::Parts;

/// Seconds and bytes are given for so many tokens.
const TOKENS: f64 = 1024.0;

/// Whose account.
#[derive(Clone, Debug)]
pub enum Subject {
    /// That of a model: a Hugging Face folder or a .gguf file.
    Model(PathBuf),
    /// That of a published configuration, projected.
    Shape(KnownModel),
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct AccountOptions {
    /// Whose account.
    pub subject: Subject,
    /// Worker processes.
    pub workers: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Micro-batches of a step, all in flight at once.
    pub micro_batches: usize,
    /// Where the head's products are computed with encryption.
    pub head: HeadChoice,
    /// Steps of each kind that are measured.
    pub steps: usize,
    /// What lies between the owner and each worker, besides this machine.
    pub route: Route,
    /// Print JSON.
    pub json: bool,
}

/// What was measured. Seconds are those of processors unless they say wall, for 1,024 tokens unless they say once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Account {
    pub(super) model: String,
    pub(super) tokens_per_step: u64,
    /// What carries the connections between the owner and the workers.
    pub(super) transport: Transport,
    /// The owner's seconds with encryption over those in plain text.
    pub(super) account: f64,
    pub(super) owner_cpu_seconds: f64,
    pub(super) plain_cpu_seconds: f64,
    /// What the owner's are spent on, of a run of its own in which they are counted; where the system tells.
    pub(super) owner_parts: Option<Parts>,
    /// Of all workers, where the system tells.
    pub(super) worker_cpu_seconds: Option<f64>,
    pub(super) bytes_up_per_token: f64,
    pub(super) bytes_down_per_token: f64,
    pub(super) owner_peak_rss_bytes: u64,
    pub(super) plain_peak_rss_bytes: u64,
    pub(super) wall_seconds: f64,
    pub(super) plain_wall_seconds: f64,
    /// Of the owner until its first step was done, less those of another step.
    pub(super) once_owner_cpu_seconds: f64,
    pub(super) once_bytes_down: u64,
    /// The owner's seconds and those in plain text that no layer takes but the head, the loss and the optimiser; of a
    /// projection alone.
    pub(super) outside_layers: Option<[f64; 2]>,
    /// The link between the owner and each worker, if all this was measured over one.
    pub(super) link: Option<LinkFigures>,
}

/// What a link costs a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct LinkFigures {
    #[serde(flatten)]
    line: Line,
    /// For 1,024 tokens, over links of the same rate without delay: what passes the bytes on is the same.
    wall_seconds_without_delay: f64,
    /// Round trips that a whole step waits for: by so much the delay made the median step longer, in delays. It is a
    /// difference of two measurements, and below nothing where they differ by chance alone; `None` of a link without delay.
    round_trips: Option<f64>,
}

/// Runs owner and workers with encryption, first for what is done once, then an owner without either, and prints the account.
/// With a link, all of this is over it, and once more over the same link without its delay.
///
/// # Errors
/// When the options do not fit each other, or a process fails.
pub async fn run(options: AccountOptions) -> anyhow::Result<()> {
    let account = match &options.subject {
        Subject::Model(model) => measured(&options, model, OwnerConfig::default().mask_cache_mib).await?,
        Subject::Shape(shape) => projected(&options, *shape).await?,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&account)?);
    } else {
        lines(&account).iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// The account of a published configuration, from models of one layer and of two.
async fn projected(options: &AccountOptions, shape: KnownModel) -> anyhow::Result<Account> {
    ensure!(
        options.route == Route::default(),
        "a projection is measured over loopback and TCP alone: give --model beside --link and --transport"
    );
    let mut accounts = Vec::new();
    for layers in projection::MEASURED {
        let folder = tempfile::Builder::new().prefix("velum-shape-").tempdir().context("no temporary folder")?;
        let path = folder.path().to_path_buf();
        tokio::task::spawn_blocking(move || projection::write(shape, layers, &path)).await??;
        // The products of masks of so few layers would all lie in memory, and those of the whole model would not.
        accounts.push(measured(options, &folder.path().join("model"), 0).await?);
    }
    let [one, two] = &accounts[..] else { bail!("{} models were measured", accounts.len()) };
    Ok(projection::project(shape, one, two, OwnerConfig::default().mask_cache_mib << 20))
}

/// The account of a model whose owner has so much memory for the products of masks.
async fn measured(options: &AccountOptions, model: &Path, mask_cache_mib: u64) -> anyhow::Result<Account> {
    let AccountOptions { workers, tokens, sequence, micro_batches, head, steps, route, json, .. } = *options;
    let encrypted = StepOptions {
        model: model.to_path_buf(),
        workers,
        gpus: GpuRequest::None,
        tokens,
        sequence,
        micro_batches,
        head,
        steps,
        backend: BackendChoice::Encrypted,
        route,
        mask_cache_mib,
        keep_masks: false,
        trace: None,
        parts: false,
        json,
    };
    let plain = StepOptions {
        backend: BackendChoice::Plain,
        head: HeadChoice::Auto,
        route: Route::default(),
        ..encrypted.clone()
    };
    let first = measure(&StepOptions { steps: 0, ..encrypted.clone() }).await?;
    let near = match route.link {
        Some(line) => {
            let near = StepOptions { route: Route { link: Some(line.without_delay()), ..route }, ..encrypted.clone() };
            Some((line, measure(&near).await?))
        }
        None => None,
    };
    let counted = measure(&StepOptions { parts: true, ..encrypted.clone() }).await?;
    let (encrypted, plain) = (measure(&encrypted).await?, measure(&plain).await?);
    let mut account = account(&first, &encrypted, &plain)?;
    account.transport = route.transport;
    account.owner_parts = parts(&counted);
    account.link = near.map(|(line, near)| link_figures(line, &encrypted, &near)).transpose()?;
    Ok(account)
}

/// The account of a run with encryption, one that ended after its first step, and one in plain text.
fn account(first: &Measured, encrypted: &Measured, plain: &Measured) -> anyhow::Result<Account> {
    let (owner, alone) = (Spent::of(encrypted)?, Spent::of(plain)?);
    let start = encrypted.report.steps.first().context("no step was taken")?;
    let each = TOKENS / owner.tokens;
    // Of a model so small that a worker's start takes longer than all its products, the difference may be anything.
    let workers = encrypted.workers_cpu_seconds.zip(first.workers_cpu_seconds);
    let workers = workers.map(|(all, once)| ((all - once) / owner.steps).max(0.0));
    let to_first_step = start.owner_cpu_seconds.context("the first step's processor time is not known")?;
    Ok(Account {
        model: encrypted.report.model.clone(),
        tokens_per_step: start.tokens,
        transport: Transport::default(),
        account: owner.cpu_seconds / alone.cpu_seconds,
        owner_cpu_seconds: each * owner.cpu_seconds,
        plain_cpu_seconds: each * alone.cpu_seconds,
        owner_parts: None,
        worker_cpu_seconds: workers.map(|seconds| each * seconds),
        bytes_up_per_token: owner.bytes_up / owner.tokens,
        bytes_down_per_token: owner.bytes_down / owner.tokens,
        owner_peak_rss_bytes: encrypted.report.owner_peak_rss_bytes,
        plain_peak_rss_bytes: plain.report.owner_peak_rss_bytes,
        wall_seconds: each * owner.wall_seconds,
        plain_wall_seconds: each * alone.wall_seconds,
        once_owner_cpu_seconds: to_first_step - owner.cpu_seconds,
        once_bytes_down: start.bytes_down.saturating_sub(owner.bytes_down as u64),
        outside_layers: None,
        link: None,
    })
}

/// The parts of the owner's processor time: means over all steps but the first.
fn parts(counted: &Measured) -> Option<Parts> {
    let (_, steps) = counted.report.steps.split_first()?;
    let tokens: u64 = steps.iter().map(|step| step.tokens).sum();
    let each = TOKENS / tokens as f64;
    steps
        .iter()
        .try_fold(Parts::default(), |sum, step| Some(sum.with(&step.owner_parts?, |sum, part| sum + each * part)))
}

/// What the delay of a link costs, from a run over it and one over the same without its delay.
fn link_figures(line: Line, far: &Measured, near: &Measured) -> anyhow::Result<LinkFigures> {
    let (far, near) = (Spent::of(far)?, Spent::of(near)?);
    let delay = line.round_trip.as_secs_f64();
    Ok(LinkFigures {
        line,
        wall_seconds_without_delay: TOKENS / near.tokens * near.wall_seconds,
        round_trips: (delay > 0.0).then(|| (far.wall_seconds - near.wall_seconds) / delay),
    })
}

/// What a step costs, all but the first one: medians of seconds, means of bytes.
struct Spent {
    steps: f64,
    tokens: f64,
    cpu_seconds: f64,
    wall_seconds: f64,
    bytes_up: f64,
    bytes_down: f64,
}

impl Spent {
    fn of(measured: &Measured) -> anyhow::Result<Self> {
        let (_, steps) = measured.report.steps.split_first().context("no step was taken")?;
        let cpu: Option<Vec<f64>> = steps.iter().map(|step| step.owner_cpu_seconds).collect();
        let wall: Vec<f64> = steps.iter().map(|step| step.seconds).collect();
        let count = steps.len() as f64;
        Ok(Self {
            steps: count,
            tokens: steps.iter().map(|step| step.tokens as f64).sum::<f64>() / count,
            cpu_seconds: median(&cpu.context("a step's processor time is not known")?),
            wall_seconds: median(&wall),
            bytes_up: steps.iter().map(|step| step.bytes_up as f64).sum::<f64>() / count,
            bytes_down: steps.iter().map(|step| step.bytes_down as f64).sum::<f64>() / count,
        })
    }
}

fn lines(account: &Account) -> Vec<String> {
    let bytes = |bytes: f64| HumanBytes(bytes as u64);
    let mut lines = vec![
        format!(
            "the account of {}: {:.2} (an owner's processor seconds over those of training in plain text alone)",
            account.model, account.account
        ),
        "for 1,024 tokens".into(),
        format!(
            "  owner             {:.2} core-s, {:.2} s by the clock",
            account.owner_cpu_seconds, account.wall_seconds
        ),
        match &account.owner_parts {
            Some(parts) => format!(
                "    of which        own f32 {:.2}, keystream {:.2}, transforms {:.2}, arithmetic {:.2}, sketch {:.2}, transport \
                 {:.2}, other {:.2}",
                parts.own_f32,
                parts.keystream,
                parts.transforms,
                parts.arithmetic,
                parts.sketch,
                parts.transport,
                parts.other
            ),
            None => "    of which        not told by this system".into(),
        },
        format!(
            "  plain             {:.2} core-s, {:.2} s by the clock",
            account.plain_cpu_seconds, account.plain_wall_seconds
        ),
        match account.worker_cpu_seconds {
            Some(seconds) => format!("  workers           {seconds:.2} core-s"),
            None => "  workers           not told by this system".into(),
        },
        format!(
            "a token             {} up, {} down",
            bytes(account.bytes_up_per_token),
            bytes(account.bytes_down_per_token)
        ),
        format!(
            "once a run          {:.1} core-s of the owner's, {} down",
            account.once_owner_cpu_seconds,
            HumanBytes(account.once_bytes_down)
        ),
        format!(
            "memory at its peak  {} owner, {} plain",
            HumanBytes(account.owner_peak_rss_bytes),
            HumanBytes(account.plain_peak_rss_bytes)
        ),
    ];
    lines.extend(account.outside_layers.map(|[owner, plain]| {
        format!("outside the layers  {owner:.2} core-s owner, {plain:.2} plain: head, loss and optimiser")
    }));
    lines.extend(account.link.as_ref().map(|link| {
        let waits = link.round_trips.map(|trips| format!(", a step waits for {trips:.0} round trips"));
        let (waits, without) = (waits.unwrap_or_default(), link.wall_seconds_without_delay);
        format!("link                {}: {without:.2} s by the clock without delay{waits}", link.line)
    }));
    lines.extend((account.transport == Transport::Quic).then(|| "transport           QUIC".into()));
    lines
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::report::{Report, StepReport, TimeBreakdown};

    /// A run whose steps took these processor seconds, at 2,048 tokens each, and whose workers took so many in all.
    fn measured(cpu: &[Option<f64>], workers_cpu_seconds: f64) -> Measured {
        let step = |(at, &owner_cpu_seconds): (usize, &Option<f64>)| StepReport {
            step: at as u32 + 1,
            loss: 1.0,
            seconds: 2.0 * (at + 1) as f64,
            tokens: 2048,
            loss_tokens: None,
            learning_rate: None,
            gradient_norm: None,
            bytes_up: 4096,
            bytes_down: if at == 0 { 1_000_000 } else { 8192 },
            owner_cpu_seconds,
            owner_parts: None,
            rewards: None,
        };
        let report = Report {
            velum_version: String::new(),
            model: "tiny".into(),
            model_digest: String::new(),
            backend: "encrypted".into(),
            parameter_sets: Vec::new(),
            seed: 0,
            data_seed: 0,
            data_digest: None,
            held_out_digest: None,
            settings: None,
            best_step: None,
            eval_loss_before: None,
            eval_loss_after: None,
            answers: Vec::new(),
            evaluations: Vec::new(),
            steps: cpu.iter().enumerate().map(step).collect(),
            time: TimeBreakdown::default(),
            workers: Vec::new(),
            owner_peak_rss_bytes: 77,
            owner_cpu_seconds: 0.0,
        };
        Measured { report, workers_cpu_seconds: Some(workers_cpu_seconds) }
    }

    #[test]
    fn the_first_step_is_apart_and_figures_are_for_as_many_tokens() {
        let first = measured(&[Some(9.0)], 5.0);
        let encrypted = measured(&[Some(9.5), Some(3.0), Some(2.0), Some(4.0)], 11.0);
        let plain = measured(&[Some(7.0), Some(12.0), Some(12.0), Some(13.0)], 0.0);
        let account = account(&first, &encrypted, &plain).unwrap();
        assert_eq!((account.account, account.tokens_per_step), (0.25, 2048));
        assert_eq!((account.owner_cpu_seconds, account.plain_cpu_seconds), (1.5, 6.0));
        assert_eq!((account.worker_cpu_seconds, account.wall_seconds), (Some(1.0), 3.0));
        assert_eq!((account.bytes_up_per_token, account.bytes_down_per_token), (2.0, 4.0));
        assert_eq!((account.once_owner_cpu_seconds, account.once_bytes_down), (6.5, 1_000_000 - 8192));
        assert!(lines(&account)[0].contains("0.25"));
    }

    #[test]
    fn a_delay_is_counted_in_round_trips() {
        // Steps take 2, 4, 6, 8 s.
        let (far, near) = (measured(&[Some(1.0); 4], 0.0), measured(&[Some(1.0); 2], 0.0));
        let figures = |line: &str| link_figures(line.parse().unwrap(), &far, &near).unwrap();
        assert_eq!((figures("20ms").round_trips, figures("20ms").wall_seconds_without_delay), (Some(100.0), 2.0));
        assert_eq!(figures("0ms,1gbit").round_trips, None);
        let json = serde_json::to_value(figures("20ms,8mbit")).unwrap();
        assert_eq!((json["round_trip_ms"].as_f64(), json["bytes_per_second"].as_u64()), (Some(20.0), Some(1_000_000)));
    }

    #[test]
    fn a_step_without_its_processor_time_gives_no_account() {
        let whole = measured(&[Some(1.0), Some(1.0)], 0.0);
        assert!(account(&whole, &measured(&[Some(1.0), None], 0.0), &whole).is_err());
        assert!(account(&whole, &measured(&[], 0.0), &whole).is_err());
    }
}
