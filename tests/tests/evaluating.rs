//! `node eval`, and what an evaluation during training shows.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use tests::{LAYERS, Node, PLAIN, Run, SETTINGS, text};

/// What `node eval` finds with the plain backend.
fn eval(run: &Run, more: &[&str]) -> Value {
    let arguments = ["eval", "--backend", "plain", "--json", "--model", text(&run.model)];
    let printed = Node::start(arguments.into_iter().chain(more.iter().copied())).finish().succeeded().stdout;
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

#[test]
fn an_evaluation_finds_the_loss_that_training_reports_and_compares_answers() {
    let run = Run::with(&format!("{SETTINGS}\n[eval]\ngenerate = 2\nmax_tokens = 6\n"), LAYERS);
    let data = run.workspace.path("data");
    std::fs::create_dir(&data).unwrap();
    let [train, valid] =
        [("data/train.jsonl", 31), ("data/valid.jsonl", 9)].map(|(name, n)| run.workspace.questions(name, n));
    let finished = run.train("plain", &[&PLAIN[..], &["--data", text(&data)]].concat());
    let report = run.report("plain");
    let adapter = run.workspace.path("plain/adapter");
    let (settings, adapter) = (run.workspace.path("owner.toml"), text(&adapter));

    let found = eval(&run, &["--config", text(&settings), "--adapter", adapter, "--data", text(&valid)]);
    for (model, reported) in [("base", "eval_loss_before"), ("adapter", "eval_loss_after")] {
        let (found, expected) = (found[model]["loss"].as_f64().unwrap(), report[reported].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-6, "{model}: {found} beside {expected}");
    }
    assert_eq!((found["examples"].as_u64(), found["answers"].is_null()), (Some(9), true));

    // The same prompts at the first and the last evaluation, whose answers are those of greedy generation.
    let answers = report["answers"].as_array().unwrap();
    assert_eq!(answers.iter().map(|one| one["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 5]);
    assert!(finished.stderr.contains("answers to held-out prompts after 5 steps"), "{}", finished.stderr);
    let more = ["--adapter", adapter, "--data", text(&valid), "--generate", "--max-tokens", "6"];
    let generated = eval(&run, &more);
    let rows = generated["answers"].as_array().unwrap();
    assert_eq!(rows.len(), 9);
    assert!(answers.iter().all(|one| one["answers"].as_array().unwrap().len() == 2), "two are asked for: {answers:?}");
    for (number, model) in [(0, "base"), (1, "adapter")] {
        for (asked, row) in answers[number]["answers"].as_array().unwrap().iter().zip(rows) {
            assert_eq!((&asked["prompt"], &asked["expected"]), (&row["prompt"], &row["reference"]));
            assert_eq!(asked["answer"], row[model]["text"], "{model}");
        }
        let right = rows.iter().filter(|row| row[model]["right"] == true).count();
        let measures = &generated[model]["generation"];
        assert_eq!(measures["exact_match"].as_f64().unwrap(), 100.0 * right as f64 / 9.0);
        assert!((0.0..=100.0).contains(&measures["chrf"].as_f64().unwrap()));
    }
    assert_eq!(rows[0]["reference"], "It is 1.");

    // The first examples alone, on the terminal.
    let arguments = ["eval", "--backend", "plain", "--model", text(&run.model), "--data", text(&train), "--limit", "3"];
    let table = Node::start(arguments).finish().succeeded().stdout;
    assert!(table.contains("3 examples") && table.contains("perplexity") && !table.contains("with adapter"), "{table}");
}

#[test]
fn what_cannot_be_evaluated_is_refused() {
    let run = Run::new();
    let texts = run.workspace.write("texts.jsonl", "{\"text\": \"Once upon a time.\"}\n");
    let refused = |more: &[&str]| {
        let arguments = ["eval", "--backend", "plain", "--model", text(&run.model)];
        Node::start(arguments.into_iter().chain(more.iter().copied())).finish().refused()
    };
    let said = refused(&["--data", text(&texts), "--generate"]);
    assert!(said.contains("has no prompts to answer"), "{said}");
    let said = refused(&["--data", text(&texts), "--generate", "--answer-regex", "("]);
    assert!(said.contains("--answer-regex"), "{said}");
    let said = refused(&["--data", "missing.jsonl"]);
    assert!(said.contains("missing.jsonl"), "{said}");
}
