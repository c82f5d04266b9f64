//! What a person sees of a run while it lasts: a bar on a terminal, a line per step elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use actors::trainer::{EvaluationReport, PreferenceReport, StepReport, TrainState};
use actors::transport::Traffic;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::output;

/// What preferences came to, behind a loss.
fn rewards(report: &PreferenceReport) -> String {
    format!("  reward margin {:.3} ({:.0} % right)", report.margin(), 100.0 * report.accuracy)
}

/// The display of one run.
pub(crate) struct Progress {
    bar: ProgressBar,
    plain: bool,
    steps: usize,
    evaluation: Option<f64>,
}

impl Progress {
    /// A display for a run whose length is not known yet.
    pub(crate) fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let bar = if plain { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let template = "{spinner} step {pos}/{len} [{bar:30}] {elapsed} (about {eta} left)  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, plain, steps: 0, evaluation: None }
    }

    /// The run has so many steps.
    pub(crate) fn begin(&mut self, steps: usize) {
        self.steps = steps;
        self.bar.set_length(steps as u64);
    }

    /// A line that stays.
    pub(crate) fn note(&self, line: &str) {
        if self.plain {
            output::note(line);
        } else {
            self.bar.println(line);
        }
    }

    /// What is being done before the first step; on a terminal only, where it does not stay.
    pub(crate) fn status(&self, text: impl Into<String>) {
        self.bar.set_message(text.into());
    }

    /// The run goes on from there.
    pub(crate) fn resume(&mut self, state: &TrainState) {
        self.evaluation = state.evaluations.last().map(|evaluation| evaluation.loss);
        self.bar.set_position(state.steps as u64);
    }

    /// A step is done.
    pub(crate) fn step(&mut self, line: &StepReport) {
        let rate = if line.seconds > 0.0 { line.tokens as f64 / line.seconds } else { 0.0 };
        let mut text = format!("loss {:.4}", line.loss);
        if let Some(loss) = self.evaluation {
            text.push_str(&format!("  eval {loss:.4}"));
        }
        if let Some(preference) = &line.preference {
            text.push_str(&rewards(preference));
        }
        text.push_str(&format!("  {rate:.0} tokens/s"));
        if line.traffic != Traffic::default() {
            let Traffic { up, down } = line.traffic;
            text.push_str(&format!("  {} up, {} down", HumanBytes(up), HumanBytes(down)));
        }
        if self.plain {
            output::note(format_args!("step {}/{}  {text}", line.step, self.steps));
        }
        self.bar.set_position(line.step as u64);
        self.bar.set_message(text);
    }

    /// An evaluation is done.
    pub(crate) fn evaluation(&mut self, EvaluationReport { step, loss, preference, .. }: &EvaluationReport) {
        self.evaluation = Some(*loss);
        let rewards = preference.as_ref().map(rewards).unwrap_or_default();
        self.note(&format!("evaluation after {step} steps: loss {loss:.4}{rewards}"));
    }

    /// The run is over, perhaps before its last step, and these are the adapters that it leaves.
    pub(crate) fn ended(&self, steps: usize, best: Option<usize>) {
        if steps < self.steps {
            self.note(&format!("no evaluation was better for long: the run ends after step {steps} of {}", self.steps));
        }
        if let Some(best) = best {
            self.note(&format!("the adapter is that of step {best}, whose evaluation was the best"));
        }
    }

    /// The run is over.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
