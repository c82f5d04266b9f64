//! The adapter's card, `README.md` in its folder: what a reader of the adapter has to know, as the hub of Hugging Face lays
//! it out.

use std::fmt::Write as _;

use serde_json::Value;

use super::Report;

/// File name of the card in the adapter's folder.
pub const CARD_FILE: &str = "README.md";

/// The card of a run's adapter.
pub fn adapter_card(report: &Report) -> String {
    let mut card = String::new();
    let mut line = |text: &str| {
        card.push_str(text);
        card.push('\n');
    };
    line("---");
    line(&format!("base_model: {}", Value::from(report.model.as_str())));
    line("library_name: peft");
    line("tags:\n- lora\n- velum\n---\n");
    line(&format!("# LoRA adapter for {}\n", one_line(&report.model)));
    line(&format!(
        "Trained by Velum {} for {} steps, with {} base products.\n",
        report.velum_version,
        report.steps.len(),
        report.backend
    ));
    line("| | |\n|---|---|");
    for (name, value) in facts(report) {
        line(&format!("| {name} | {value} |"));
    }
    if let Some(settings) = &report.settings {
        line("\n## Settings\n");
        line("```json");
        line(&serde_json::to_string_pretty(settings).unwrap_or_default());
        line("```");
    }
    card
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let mut facts = vec![("model", one_line(&report.model)), ("model digest", code(&report.model_digest))];
    facts.extend(report.data_digest.as_ref().map(|digest| ("digest of the tokens trained on", code(digest))));
    facts.extend(report.held_out_digest.as_ref().map(|digest| ("digest of the tokens held out", code(digest))));
    let losses = |losses: &[Option<f64>]| {
        losses.iter().flatten().fold(String::new(), |mut text, loss| {
            let _ = write!(text, "{}{loss:.4}", if text.is_empty() { "" } else { " to " });
            text
        })
    };
    let training = [report.steps.first(), report.steps.last()].map(|step| step.map(|step| step.loss));
    facts.push(("training loss, first to last step", losses(&training)));
    let evaluation = [report.eval_loss_before, report.eval_loss_after];
    if evaluation.iter().any(Option::is_some) {
        facts.push(("evaluation loss, before to after", losses(&evaluation)));
    }
    facts.extend(report.best_step.map(|step| ("step of the best evaluation, whose adapter this is", step.to_string())));
    if let Some(rewards) = report.steps.last().and_then(|step| step.rewards) {
        let text = format!("{:.4}, of {:.0} % of the pairs", rewards.rewards_margin, 100.0 * rewards.rewards_accuracy);
        facts.push(("margin of the rewards in the last step", text));
    }
    if !report.parameter_sets.is_empty() {
        let sets: Vec<String> = report.parameter_sets.iter().map(|set| format!("{set:?}")).collect();
        facts.push(("parameter sets of the encryption", sets.join(", ")));
    }
    facts.push(("seeds (adapters, data)", format!("{}, {}", report.seed, report.data_seed)));
    facts
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

/// A name in a table or a heading.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r', '|'], " ")
}
