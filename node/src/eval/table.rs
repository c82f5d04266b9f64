//! An evaluation for people.

use super::measures::Measures;
use super::{Evaluation, Scores};

/// What was found, a line for each figure.
pub(super) fn lines(evaluation: &Evaluation) -> Vec<String> {
    let Evaluation { model, data, examples, loss_tokens, base, adapter, .. } = evaluation;
    let models: Vec<&Scores> = std::iter::once(base).chain(adapter).collect();
    let row = |name: &str, of: &dyn Fn(&Scores) -> Option<String>| {
        let cells: Option<Vec<String>> = models.iter().map(|scores| of(scores)).collect();
        cells.map(|cells| {
            let cells: String = cells.iter().map(|cell| format!("{cell:>14}")).collect();
            format!("  {name:<16}{cells}")
        })
    };
    let measured = |of: fn(&Measures) -> String| move |scores: &Scores| scores.generation.as_ref().map(of);
    let names = ["base", "with adapter"].into_iter().take(models.len());
    let names: String = names.map(|name| format!("{name:>14}")).collect();
    let mut lines = vec![
        format!("{model} on {data}: {examples} examples, {loss_tokens} tokens to predict"),
        format!("  {:<16}{names}", ""),
    ];
    lines.extend(row("loss", &|scores| Some(format!("{:.4}", scores.loss))));
    lines.extend(row("perplexity", &|scores| Some(format!("{:.3}", scores.perplexity))));
    lines.extend(row("answers", &measured(|measures| measures.answers.to_string())));
    lines.extend(row("exact match", &measured(|measures| format!("{:.1} %", measures.exact_match))));
    let without = |scores: &Scores| scores.generation.as_ref()?.without_answer.map(|without| without.to_string());
    lines.extend(row("without answer", &without));
    lines.extend(row("chrF2", &measured(|measures| format!("{:.2}", measures.chrf))));
    lines.extend(row("BLEU", &measured(|measures| format!("{:.2}", measures.bleu))));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_shown_for_each_model_that_has_it() {
        let scores = |loss: f64, generation| Scores { loss, perplexity: loss.exp(), generation };
        let mut evaluation = Evaluation {
            model: "m".into(),
            data: "d".into(),
            examples: 2,
            loss_tokens: 9,
            base: scores(2.0, None),
            adapter: Some(scores(1.0, None)),
            answers: Vec::new(),
        };
        let shown = lines(&evaluation);
        assert_eq!(shown.len(), 4);
        assert!(shown[2].contains("2.0000") && shown[2].contains("1.0000") && shown[3].contains("7.389"), "{shown:?}");
        let measures = Measures { answers: 2, exact_match: 50.0, chrf: 33.333, bleu: 1.0, without_answer: None };
        for scores in [Some(&mut evaluation.base), evaluation.adapter.as_mut()].into_iter().flatten() {
            scores.generation = Some(measures);
        }
        let shown = lines(&evaluation).join("\n");
        assert!(shown.contains("50.0 %") && shown.contains("33.33") && !shown.contains("without"), "{shown}");
    }
}
