//! Answers that are preferred, and runs that begin with the adapter of an earlier one, with real processes.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;

use serde_json::{Value, json};
use tests::{LAYERS, PLAIN, Run, SETTINGS, text};

/// Settings for pairs, with an evaluation on the way.
fn settings(objective: &str) -> String {
    let training = format!("[training]\nobjective = '{objective}'\neval_every = 2\nlearning_rate = 5e-3\n");
    SETTINGS.replace("[training]\n", &training).replace("learning_rate = 1e-3\n", "")
}

fn preferring(objective: &str) -> Run {
    let run = Run::with(&settings(objective), LAYERS / 4);
    let pair = |number: usize| {
        let pair = json!({
            "prompt": format!("What is {number} and one?"),
            "chosen": format!("It is {}.", number + 1),
            "rejected": format!("No {number}!"),
        });
        pair.to_string() + "\n"
    };
    run.workspace.write("data.jsonl", &(0..20).map(pair).collect::<String>());
    run
}

#[test]
fn encrypted_preferences_follow_plain_ones_and_are_resumed() {
    let run = preferring("dpo");
    let (worker, address) = run.worker(1, &[]);
    run.owner_over(&[&address], "encrypted", &[]).finish().succeeded();
    run.train("plain", &PLAIN);
    // A loss of preferences is made of differences of whole sequences' costs, which for random weights are large: what the
    // products' noise adds to them is of their size, and not of the loss's.
    let (found, expected) = (run.losses("encrypted"), run.losses("plain"));
    assert_eq!(found.len(), expected.len());
    assert!(
        found.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() < 0.1),
        "{found:?}, {expected:?}"
    );
    worker.interrupt();
    worker.finish().succeeded();

    let report = run.report("plain");
    let first = report["steps"][0]["loss"].as_f64().unwrap();
    assert!((first - 2f64.ln()).abs() < 1e-5, "nothing is preferred yet: {first}");
    let margins: Vec<f64> =
        report["evaluations"].as_array().unwrap().iter().map(|e| e["rewards_margin"].as_f64().unwrap()).collect();
    assert!(margins.len() == 4 && margins[3] > margins[0].abs() + 1e-3, "{margins:?}");

    let steps = ["--steps", "100000"];
    let mut node = run.owner("stopped", &[&PLAIN[..], &steps].concat());
    node.expect_note("step 2/");
    node.interrupt();
    node.finish().succeeded();
    let done = run.losses("stopped").len();
    let lines = |out: &str| -> Vec<Value> {
        let text = fs::read_to_string(run.workspace.path(out).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let steps_of = |lines: &[Value]| -> Vec<u64> {
        lines.iter().filter(|line| !line["loss"].is_null()).map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert!(steps_of(&lines("stopped")).into_iter().eq(1..=done as u64));
    let mut node = run.owner("stopped", &[&PLAIN[..], &steps, &["--resume"]].concat());
    node.expect_note(&format!("step {}/", done + 2));
    node.interrupt();
    node.finish().succeeded();
    let all = lines("stopped");
    assert!(steps_of(&all).into_iter().eq(1..=run.losses("stopped").len() as u64));
    assert!(all.iter().all(|line| line["rewards_margin"].is_f64() || line["eval_rewards_margin"].is_f64()));
}

#[test]
fn a_run_begins_with_the_adapter_of_an_earlier_one() {
    let run = Run::with(&SETTINGS.replace("rank = 4", "rank = 4\nuse_rslora = true"), LAYERS / 4);
    run.train("first", &PLAIN);
    let adapter = run.workspace.path("first/adapter");
    let begins = ["--adapter", text(&adapter)];
    run.train("second", &[&PLAIN[..], &begins].concat());
    let after = |out: &str, field: &str| run.report(out)[field].as_f64().unwrap();
    let (left, found) = (after("first", "eval_loss_after"), after("second", "eval_loss_before"));
    assert!((left - found).abs() < 1e-9, "{left} and {found}");
    assert!(after("second", "eval_loss_after") < left);
    let card = fs::read_to_string(run.workspace.path("second/adapter/README.md")).unwrap();
    assert!(
        card.contains("\"use_rslora\": true") && card.contains(run.report("second")["data_digest"].as_str().unwrap())
    );

    let said = run.refused("second", &[&PLAIN[..], &["--resume"]].concat());
    assert!(said.contains("adapter to begin with"), "{said}");
    let contradicting = SETTINGS.replace("rank = 4", "rank = 8");
    let settings = run.workspace.write("other.toml", &contradicting);
    let said = run.refused("third", &[&PLAIN[..], &begins, &["--config", text(&settings)]].concat());
    assert!(said.contains("training.lora.rank is 8, and the adapter's is 4"), "{said}");
}

#[test]
fn pairs_and_texts_are_not_taken_for_each_other() {
    let run = preferring("dpo");
    run.workspace
        .write("data.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"text\": \"d\"}\n");
    let said = run.refused("out", &PLAIN);
    assert!(said.contains("line 2") && said.contains("no pair of a chosen and a rejected"), "{said}");
    let run = Run::with(SETTINGS, 2);
    run.workspace.write("data.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n");
    let said = run.refused("out", &PLAIN);
    assert!(said.contains("line 1") && said.contains("training.objective"), "{said}");
}
