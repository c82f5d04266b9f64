//! What the demo says at its end, read from the report that the owner wrote.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;

use crate::output;
use crate::report::{AnswerReport, PLOT_FILE, REPORT_FILE, Report};

/// Prints what came out of the run in `out` on these data.
///
/// # Errors
/// When there is no report.
pub(super) fn print(out: &Path, data: &[PathBuf]) -> anyhow::Result<()> {
    let report = Report::read(out)?;
    for line in lines(&report, out).into_iter().chain(conversation(&report, &questions(data))) {
        output::print(line);
    }
    Ok(())
}

fn lines(report: &Report, out: &Path) -> Vec<String> {
    let mut lines = vec![String::new(), format!("{} on {}", report.backend, report.model)];
    if let (Some(before), Some(after)) = (report.eval_loss_before, report.eval_loss_after) {
        lines.push(format!("  evaluation loss   {before:.4} before, {after:.4} after {} steps", report.steps.len()));
    }
    let tokens: u64 = report.steps.iter().map(|step| step.tokens).sum();
    if tokens > 0 {
        let seconds: f64 = report.steps.iter().map(|step| step.seconds).sum();
        let bytes: u64 = report.steps.iter().map(|step| step.bytes_up + step.bytes_down).sum();
        lines.push(format!(
            "  per token         {:.2} ms, {}",
            1e3 * seconds / tokens as f64,
            HumanBytes(bytes / tokens)
        ));
    }
    let time = &report.time;
    lines.push(format!(
        "  time              masks {:.1} s, encrypt {:.1} s, network and workers {:.1} s, decrypt {:.1} s, owner's own {:.1} s",
        time.mask_seconds, time.encrypt_seconds, time.transport_and_multiply_seconds, time.decrypt_seconds, time.own_seconds
    ));
    lines.push(format!("  owner             {} of memory at its peak", HumanBytes(report.owner_peak_rss_bytes)));
    for worker in &report.workers {
        let known = match (worker.busy_seconds, worker.peak_rss_bytes) {
            (Some(busy), Some(peak)) => format!(" in {busy:.1} s, {} at its peak", HumanBytes(peak)),
            _ => format!("; {}", worker.state),
        };
        lines.push(format!("  {}  {}, {} products{known}", worker.peer_id, worker.serves, worker.calls));
    }
    let path = |name: &str| out.join(name).display().to_string();
    lines.push(format!("  results           {}, {}, {}", path("adapter"), path(PLOT_FILE), path(REPORT_FILE)));
    lines
}

/// The prompts of the data by their completions, where its records are such pairs.
fn questions(data: &[PathBuf]) -> HashMap<String, String> {
    let text: String = data.iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let pair = |line: &str| -> Option<(String, String)> {
        let record: serde_json::Value = serde_json::from_str(line).ok()?;
        let field = |name: &str| record.get(name)?.as_str().map(str::to_owned);
        Some((field("completion")?, field("prompt")?))
    };
    text.lines().filter_map(pair).collect()
}

/// What the model answered before the training and after it to questions that it was not trained on.
fn conversation(report: &Report, questions: &HashMap<String, String>) -> Vec<String> {
    let [Some(before), Some(after)] = [report.answers.first(), report.answers.last()] else { return Vec::new() };
    if before.step == after.step {
        return Vec::new();
    }
    let how = if report.workers.is_empty() { "here" } else { "by way of the workers, which saw neither" };
    let mut lines = vec![
        String::new(),
        format!("questions that it was not trained on, asked and answered {how}, up to a limit of tokens:"),
    ];
    for (AnswerReport { prompt, expected, answer }, tuned) in before.answers.iter().zip(&after.answers) {
        let one = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        lines.push(format!("  {}", one(questions.get(expected).unwrap_or(prompt))));
        lines.push(format!("    base model   {}", one(answer)));
        lines.push(format!("    tuned        {}", one(&tuned.answer)));
        lines.push(format!("    handbook     {}", one(expected)));
    }
    lines
}
