//! What a run leaves behind: the adapter, the report, the plot.

use std::path::{Path, PathBuf};

use actors::owner::PhaseTimes;
use actors::owner::fleet::Presence;
use actors::owner::scheduler::WorkerRecord;
use actors::trainer::StepReport;
use anyhow::Context as _;
use protocol::he::ParameterSet;

use crate::config::BackendChoice;
use crate::report::{self, EvaluationReport, Report, TimeBreakdown, WorkerReport};

/// Name of the folder for the adapter in the folder for the results.
pub(super) const ADAPTER: &str = "adapter";

/// The results of a run under way.
pub(super) struct Results {
    out: PathBuf,
    report: Report,
}

impl Results {
    /// Creates the folder for the results and checks that it can be written, before hours are spent.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn create(out: &Path, report: Report) -> anyhow::Result<Self> {
        std::fs::create_dir_all(out).with_context(|| format!("the folder {} cannot be created", out.display()))?;
        tempfile::NamedTempFile::new_in(out)
            .with_context(|| format!("the folder {} cannot be written", out.display()))?;
        Ok(Self { out: out.to_path_buf(), report })
    }

    /// Where the adapter belongs.
    pub(super) fn adapter(&self) -> PathBuf {
        self.out.join(ADAPTER)
    }

    pub(super) fn step(&mut self, step: &StepReport) {
        self.report.steps.push(report::StepReport {
            step: number(step.step),
            loss: step.loss,
            seconds: step.seconds,
            tokens: step.tokens as u64,
            bytes_up: step.traffic.up,
            bytes_down: step.traffic.down,
        });
    }

    pub(super) fn evaluation(&mut self, step: usize, loss: f64) {
        self.report.evaluations.push(EvaluationReport { step: number(step), loss });
    }

    /// Notes where the time went, evaluations included, and what the workers did.
    pub(super) fn encrypted(&mut self, phases: PhaseTimes, seconds: f64, workers: &[WorkerRecord]) {
        let multiply_seconds = workers.iter().filter_map(|worker| Some(worker.health.as_ref()?.busy_seconds)).sum();
        let PhaseTimes { mask_seconds, encrypt_seconds, exchange_seconds, decrypt_seconds, .. } = phases;
        let elsewhere = mask_seconds + encrypt_seconds + exchange_seconds + decrypt_seconds;
        self.report.time = TimeBreakdown {
            mask_seconds,
            encrypt_seconds,
            transport_and_multiply_seconds: exchange_seconds,
            multiply_seconds,
            decrypt_seconds,
            own_seconds: (seconds - elsewhere).max(0.0),
        };
        let worker = |record: &WorkerRecord| WorkerReport {
            peer_id: record.peer.to_string(),
            layers: record.layers.clone(),
            device: record.device.clone(),
            calls: record.products,
            busy_seconds: record.health.as_ref().map(|health| health.busy_seconds),
            peak_rss_bytes: record.health.as_ref().map(|health| health.peak_rss_bytes),
            state: match &record.presence {
                Presence::Here => "serving".into(),
                Presence::Gone(_) => "gone".into(),
                Presence::Banned(why) => format!("banned: {why}"),
            },
        };
        self.report.workers = workers.iter().map(worker).collect();
    }

    /// All of the run's time is the owner's own.
    pub(super) fn plain(&mut self, seconds: f64) {
        self.report.time.own_seconds = seconds;
    }

    /// Writes `report.json` and `loss.svg`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn write(mut self) -> anyhow::Result<Report> {
        self.report.eval_loss_before = self.report.evaluations.first().map(|evaluation| evaluation.loss);
        // An evaluation of earlier adapters, of a run that was stopped since, says nothing about those that are saved.
        let steps = self.report.steps.last().map(|step| step.step);
        let last = self.report.evaluations.last().filter(|last| Some(last.step) == steps);
        self.report.eval_loss_after = last.map(|evaluation| evaluation.loss);
        self.report.owner_peak_rss_bytes = report::peak_rss_bytes();
        self.report.owner_cpu_seconds = report::cpu_seconds();
        self.report.write(&self.out)?;
        Ok(self.report)
    }
}

fn number(step: usize) -> u32 {
    u32::try_from(step).unwrap_or(u32::MAX)
}

/// A report of a run that has not begun.
pub(super) fn empty_report(
    model: &Path,
    digest: String,
    backend: BackendChoice,
    parameter_sets: Vec<ParameterSet>,
    seed: u64,
) -> Report {
    let backend = match backend {
        BackendChoice::Encrypted => "encrypted",
        BackendChoice::Plain => "plain",
    };
    let name = model.file_stem().unwrap_or(model.as_os_str());
    Report {
        velum_version: env!("CARGO_PKG_VERSION").to_owned(),
        model: name.to_string_lossy().into_owned(),
        model_digest: digest,
        backend: backend.to_owned(),
        parameter_sets,
        seed,
        eval_loss_before: None,
        eval_loss_after: None,
        evaluations: Vec::new(),
        steps: Vec::new(),
        time: TimeBreakdown::default(),
        workers: Vec::new(),
        owner_peak_rss_bytes: 0,
        owner_cpu_seconds: 0.0,
    }
}
