//! `metrics.jsonl`: a line for each step and each evaluation, on the disk as soon as it is done.
//!
//! The report of a run that goes on is the only source of what the file holds: a process begins by writing all of it anew,
//! which mends what an earlier one left in the middle of a line or wrote of steps after its last checkpoint. After a
//! failure, such as a full disk, it does so again.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use actors::files::{Readers, write_atomically};
use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{EvaluationReport, Report, StepReport};

/// File name in the output folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// What a report has to tell at a moment: a step, or an evaluation after one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Entry<'a> {
    /// A step.
    Step(&'a StepReport),
    /// An evaluation.
    Evaluation(&'a EvaluationReport),
}

impl Report {
    /// Steps and evaluations in the order in which they were done, but for the first ones of each.
    pub(super) fn entries(&self, (steps, evaluations): (usize, usize)) -> Vec<Entry<'_>> {
        let steps = self.steps.iter().skip(steps).map(|step| (step.step, Entry::Step(step)));
        let evaluations = self.evaluations.iter().skip(evaluations);
        let evaluations = evaluations.map(|evaluation| (evaluation.step, Entry::Evaluation(evaluation)));
        let mut entries: Vec<_> = steps.chain(evaluations).collect();
        // The sort is stable: a step comes before the evaluation after it.
        entries.sort_by_key(|&(step, _)| step);
        entries.into_iter().map(|(_, entry)| entry).collect()
    }
}

impl Entry<'_> {
    /// As a line: a step's fields as the report has them, and those of an evaluation with `eval_` before their names.
    fn line(self) -> anyhow::Result<Vec<u8>> {
        let mut line = match self {
            Self::Step(step) => serde_json::to_vec(step)?,
            Self::Evaluation(evaluation) => serde_json::to_vec(&prefixed(evaluation)?)?,
        };
        line.push(b'\n');
        Ok(line)
    }
}

fn prefixed(evaluation: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    let Value::Object(fields) = serde_json::to_value(evaluation)? else { return Ok(Map::new()) };
    let named = fields.into_iter().map(|(name, value)| match name.as_str() {
        "step" => (name, value),
        _ => (format!("eval_{name}"), value),
    });
    Ok(named.collect())
}

/// The file of a run under way.
pub(super) struct Metrics {
    path: PathBuf,
    /// `None` before it is written anew.
    file: Option<File>,
    /// Steps and evaluations that it holds.
    written: (usize, usize),
}

impl Metrics {
    /// That of a folder; what it holds is replaced at the first [`Self::follow`].
    pub(super) fn new(out: &Path) -> Self {
        Self { path: out.join(METRICS_FILE), file: None, written: (0, 0) }
    }

    /// Makes the file hold what the report does.
    ///
    /// # Errors
    /// When it cannot be written. The next call writes all of it anew.
    pub(super) fn follow(&mut self, report: &Report) -> anyhow::Result<()> {
        let file = self.file.take();
        self.file = Some(self.extended(file, report)?);
        self.written = (report.steps.len(), report.evaluations.len());
        Ok(())
    }

    fn extended(&self, file: Option<File>, report: &Report) -> anyhow::Result<File> {
        let lines = |from| -> anyhow::Result<Vec<u8>> {
            let lines: anyhow::Result<Vec<_>> = report.entries(from).into_iter().map(Entry::line).collect();
            Ok(lines?.concat())
        };
        let cannot = || format!("{} cannot be written", self.path.display());
        let Some(mut file) = file else {
            write_atomically(&self.path, &lines((0, 0))?, Readers::Usual)?;
            return OpenOptions::new().append(true).open(&self.path).with_context(cannot);
        };
        file.write_all(&lines(self.written)?).with_context(cannot)?;
        file.sync_data().with_context(cannot)?;
        Ok(file)
    }
}
