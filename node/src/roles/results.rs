//! What a run leaves behind: the adapter, the report, the plot.

use std::path::{Path, PathBuf};

use actors::files::{Readers, write_atomically};
use actors::owner::PhaseTimes;
use actors::owner::fleet::Presence;
use actors::owner::scheduler::WorkerRecord;
use actors::trainer::{self, StepReport, TrainState};
use anyhow::Context as _;
use protocol::he::ParameterSet;
use protocol::model::LlamaConfig;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::owner::Inputs;
use crate::config::BackendChoice;
use crate::report::{
    self, AnswersReport, CARD_FILE, Curves, EvaluationReport, Parts, Report, Sampler, TimeBreakdown, WorkerReport,
    adapter_card,
};

/// Name of the folder for the adapter in the folder for the results.
pub(super) const ADAPTER: &str = "adapter";

/// What a checkpoint keeps of the report beside steps and evaluations, so that a resumed run tells of all of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Spent {
    /// Where products were computed.
    pub(super) backend: String,
    time: TimeBreakdown,
    peak_rss_bytes: u64,
    cpu_seconds: f64,
    /// What was answered at the evaluations.
    #[serde(default)]
    answers: Vec<AnswersReport>,
}

impl Spent {
    /// By this process until now, of which so much by encrypted products.
    pub(super) fn now(backend: BackendChoice, phases: Option<PhaseTimes>, seconds: f64) -> Self {
        Self {
            backend: backend_name(backend).to_owned(),
            time: phases.map_or(TimeBreakdown { own_seconds: seconds, ..TimeBreakdown::default() }, |phases| {
                breakdown(phases, seconds)
            }),
            peak_rss_bytes: report::peak_rss_bytes(),
            cpu_seconds: report::cpu_seconds(),
            answers: Vec::new(),
        }
    }

    /// With what this process was answered.
    pub(super) fn with_answers(self, answers: Vec<AnswersReport>) -> Self {
        Self { answers, ..self }
    }

    /// Together with what was spent by earlier processes.
    pub(super) fn after(self, earlier: &Self) -> Self {
        Self {
            backend: self.backend,
            time: self.time.after(earlier.time),
            peak_rss_bytes: self.peak_rss_bytes.max(earlier.peak_rss_bytes),
            cpu_seconds: self.cpu_seconds + earlier.cpu_seconds,
            answers: [earlier.answers.as_slice(), &self.answers].concat(),
        }
    }

    /// What a checkpoint says; nothing where it says nothing.
    pub(super) fn from_notes(notes: &str) -> Self {
        serde_json::from_str(notes).unwrap_or_default()
    }

    pub(super) fn to_notes(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// The time of encrypted products within so many seconds; what is left is the owner's own.
fn breakdown(phases: PhaseTimes, seconds: f64) -> TimeBreakdown {
    let PhaseTimes { mask_seconds, encrypt_seconds, exchange_seconds, decrypt_seconds, .. } = phases;
    let elsewhere = mask_seconds + encrypt_seconds + exchange_seconds + decrypt_seconds;
    TimeBreakdown {
        mask_seconds,
        encrypt_seconds,
        transport_and_multiply_seconds: exchange_seconds,
        multiply_seconds: 0.0,
        decrypt_seconds,
        own_seconds: (seconds - elsewhere).max(0.0),
    }
}

/// The results of a run under way.
pub(super) struct Results {
    out: PathBuf,
    report: Report,
    /// What is written while the run lasts; `None` before it begins.
    curves: Option<Curves>,
    /// Processor seconds of this process when its last step was done.
    cpu_seconds: f64,
    /// What that was spent on, if it is counted.
    sampler: Option<Sampler>,
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
        Ok(Self { out: out.to_path_buf(), report, curves: None, cpu_seconds: 0.0, sampler: Sampler::start() })
    }

    /// Where the adapter belongs.
    pub(super) fn adapter(&self) -> PathBuf {
        self.out.join(ADAPTER)
    }

    /// Notes a step that was just done.
    pub(super) fn step(&mut self, step: &StepReport) {
        let cpu_seconds = report::cpu_seconds();
        let since = cpu_seconds - self.cpu_seconds;
        let parts = self.sampler.as_mut().map(|sampler| sampler.since_last(since));
        self.past_step(step, Some(since), parts);
        self.cpu_seconds = cpu_seconds;
        self.follow();
    }

    fn past_step(&mut self, step: &StepReport, owner_cpu_seconds: Option<f64>, owner_parts: Option<Parts>) {
        self.report.steps.push(report::StepReport {
            step: number(step.step),
            loss: step.loss,
            seconds: step.seconds,
            tokens: step.tokens as u64,
            loss_tokens: Some(step.loss_tokens as u64),
            learning_rate: Some(step.learning_rate),
            gradient_norm: Some(step.gradient_norm),
            bytes_up: step.traffic.up,
            bytes_down: step.traffic.down,
            owner_cpu_seconds,
            owner_parts,
            rewards: step.preference.map(Into::into),
        });
    }

    /// Notes an evaluation that was just done.
    pub(super) fn evaluation(&mut self, evaluation: &trainer::EvaluationReport) {
        self.past_evaluation(evaluation);
        self.follow();
    }

    fn past_evaluation(&mut self, evaluation: &trainer::EvaluationReport) {
        let trainer::EvaluationReport { step, loss, preference, .. } = *evaluation;
        self.report.evaluations.push(EvaluationReport {
            step: number(step),
            loss,
            rewards: preference.map(Into::into),
        });
    }

    /// Takes over what an interrupted run had reached.
    pub(super) fn resume(&mut self, state: &TrainState) {
        state.history.iter().for_each(|step| self.past_step(step, None, None));
        state.evaluations.iter().for_each(|evaluation| self.past_evaluation(evaluation));
    }

    /// Notes the step whose adapters are the result, where it is not the last one.
    pub(super) fn finished(&mut self, best: Option<usize>) {
        self.report.best_step = best.map(number);
    }

    /// Begins what is written while the run lasts.
    pub(super) fn begin(&mut self) {
        self.curves = Some(Curves::new(&self.out, &self.report));
        self.follow();
    }

    fn follow(&mut self) {
        if let Some(curves) = &mut self.curves {
            curves.follow(&self.report);
        }
    }

    /// Notes what the workers did for a model.
    pub(super) fn workers(&mut self, workers: &[WorkerRecord], model: &LlamaConfig) {
        let worker = |record: &WorkerRecord| WorkerReport {
            peer_id: record.peer.to_string(),
            layers: record.layers.clone(),
            serves: model.in_words(&record.layers),
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

    /// Writes `report.json` and `loss.svg`, with what was spent in all, and the card of the adapter if there is one.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn write(mut self, spent: Spent) -> anyhow::Result<Report> {
        self.report.eval_loss_before = self.report.evaluations.first().map(|evaluation| evaluation.loss);
        // An evaluation of earlier adapters, of a run that was stopped since, says nothing about those that are saved.
        let result = self.report.best_step.or(self.report.steps.last().map(|step| step.step));
        let last = self.report.evaluations.iter().rfind(|evaluation| Some(evaluation.step) == result);
        self.report.eval_loss_after = last.map(|evaluation| evaluation.loss);
        self.report.owner_peak_rss_bytes = spent.peak_rss_bytes;
        self.report.owner_cpu_seconds = spent.cpu_seconds;
        self.report.time = spent.time;
        self.report.answers = spent.answers;
        self.report.time.multiply_seconds +=
            self.report.workers.iter().filter_map(|worker| worker.busy_seconds).sum::<f64>();
        self.report.write(&self.out)?;
        if self.adapter().is_dir() {
            let card = adapter_card(&self.report);
            write_atomically(&self.adapter().join(CARD_FILE), card.as_bytes(), Readers::Owner)?;
        }
        Ok(self.report)
    }
}

fn number(step: usize) -> u32 {
    u32::try_from(step).unwrap_or(u32::MAX)
}

fn backend_name(backend: BackendChoice) -> &'static str {
    match backend {
        BackendChoice::Encrypted => "encrypted",
        BackendChoice::Plain => "plain",
    }
}

/// A report of a run that has not begun.
///
/// # Errors
/// When the data cannot be read again.
pub(super) fn empty_report(model: &str, inputs: &Inputs, parameter_sets: Vec<ParameterSet>) -> anyhow::Result<Report> {
    let Inputs { config, digest, training, held_out, data_seed, .. } = inputs;
    let settings = json!({"training": config.training, "data": config.data, "encryption": config.encryption});
    Ok(Report {
        velum_version: env!("CARGO_PKG_VERSION").to_owned(),
        model: model.to_owned(),
        model_digest: digest.to_string(),
        backend: backend_name(config.owner.backend).to_owned(),
        parameter_sets,
        seed: config.training.seed,
        data_seed: *data_seed,
        data_digest: Some(training.digest()?),
        held_out_digest: (held_out.units() > 0).then(|| held_out.digest()).transpose()?,
        settings: Some(settings),
        best_step: None,
        eval_loss_before: None,
        eval_loss_after: None,
        evaluations: Vec::new(),
        answers: Vec::new(),
        steps: Vec::new(),
        time: TimeBreakdown::default(),
        workers: Vec::new(),
        owner_peak_rss_bytes: 0,
        owner_cpu_seconds: 0.0,
    })
}
