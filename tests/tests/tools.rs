//! The tools beside the roles, as a user types them: a synthetic model that is trained on, and the measurements' JSON.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use serde_json::Value;
use tests::{Finished, Node, Run, Workspace, text};

fn succeed(arguments: &[&str]) -> Finished {
    Node::start(arguments).finish().succeeded()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(arguments).stdout).unwrap()
}

fn events(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_synthetic_model_is_measured_with_real_processes_and_traced() {
    let workspace = Workspace::new();
    let (model, trace) = (workspace.path("model"), workspace.path("step.json"));
    let said = succeed(&["synth", "--config", "tiny", "--layers", "4", "--out", text(&model)]).stdout;
    assert!(said.contains("tiny") && said.contains("4 layers"), "{said}");

    let mut arguments = vec!["bench", "step", "--model", text(&model), "--json", "--trace", text(&trace)];
    arguments.extend(["--workers", "2", "--tokens", "128", "--sequence", "32", "--micro-batches", "2", "--steps", "2"]);
    let figures = json(&arguments);
    assert_eq!(figures["backend"], "encrypted");
    assert_eq!(figures["tokens"], 128);
    let seconds = figures["step_seconds"].as_array().unwrap();
    assert!(seconds.len() == 2 && seconds.iter().all(|seconds| seconds.as_f64().unwrap() > 0.0));
    for figure in ["bytes_up_per_token", "bytes_down_per_token", "owner_peak_rss_bytes"] {
        assert!(figures[figure].as_u64().unwrap() > 0, "{figure}");
    }
    let workers = figures["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    assert!(workers.iter().all(|worker| worker["peak_rss_bytes"].as_u64().unwrap() > 0));

    // Every process has ended and left a whole file, of a time that all of them share.
    let owner = events(&workspace.path("step-owner.json"));
    let count = |name: &str, phase: &str| owner.iter().filter(|e| e["name"] == name && e["ph"] == phase).count();
    assert_eq!(
        (count("step", "b"), count("step", "e"), count("micro-batch", "X"), count("optimiser", "X")),
        (3, 3, 6, 3)
    );
    // Forward, there is also the text by which a run that keeps nothing finds out what int8 weights lack.
    assert_eq!(["forward", "loss", "backward"].map(|part| count(part, "X")), [7, 7, 6]);
    for number in 1..=2 {
        let worker = events(&workspace.path(&format!("step-worker-{number}.json")));
        assert_ne!(worker[0]["pid"], owner[0]["pid"]);
    }

    let mut arguments = vec!["bench", "account", "--model", text(&model), "--json", "--workers", "1"];
    arguments.extend(["--tokens", "64", "--sequence", "32", "--steps", "2"]);
    let account = json(&arguments);
    let figure = |name: &str| account[name].as_f64().unwrap();
    let ratio = figure("owner_cpu_seconds") / figure("plain_cpu_seconds");
    assert!((figure("account") / ratio - 1.0).abs() < 1e-9, "{account}");
    for name in ["bytes_up_per_token", "bytes_down_per_token", "once_bytes_down"] {
        assert!(figure(name) > 0.0, "{name}: {account}");
    }
    assert!(figure("worker_cpu_seconds") >= 0.0, "{account}");
    for name in ["owner_peak_rss_bytes", "plain_peak_rss_bytes"] {
        assert!(account[name].as_u64().unwrap() > 0, "{name}: {account}");
    }

    let mut arguments = vec!["bench", "generate", "--model", text(&model), "--json", "--workers", "2"];
    arguments.extend(["--tokens", "40", "--rows", "2"]);
    for (mib, with_pads) in [("8", 0.8..=1.0), ("0", 0.0..=0.0)] {
        let figures = json(&[&arguments[..], &["--pad-mib", mib]].concat());
        assert_eq!(figures["products_per_token"], 16);
        let share = figures["pads"]["share_of_products"].as_f64().unwrap();
        assert!(with_pads.contains(&share), "{mib} MiB: {share}");
        let seconds = figures["token_seconds"].as_array().unwrap();
        assert!(seconds.len() == 40 && seconds.iter().all(|seconds| seconds.as_f64().unwrap() > 0.0));
        for figure in ["bytes_up_per_token", "bytes_down_per_token"] {
            assert!(figures[figure].as_u64().unwrap() > 0, "{figure}");
        }
        assert!(figures["floor"]["seconds"].as_f64().unwrap() > 0.0, "{figures}");
    }

    let said = Node::start(["synth", "--config", "tiny", "--out", text(&model)]).finish().refused();
    assert!(said.contains("not empty"), "{said}");
}

#[test]
fn one_product_is_measured() {
    let arguments = ["bench", "linear", "--d-in", "192", "--d-out", "64", "--tokens", "24", "--json"];
    let figures = json(&arguments);
    let (error, predicted) = (figures["rel_error"].as_f64().unwrap(), figures["predicted_error"].as_f64().unwrap());
    assert!((error / predicted - 1.0).abs() < 0.3, "{error} where {predicted} was predicted");
    assert_eq!(figures["device"], "cpu");
    for figure in ["encrypt_s", "multiply_s", "mask_multiply_s", "body_multiply_s", "decrypt_s", "plain_int8_s"] {
        assert!(figures[figure].as_f64().unwrap() > 0.0, "{figure}");
    }
    let parts = figures["mask_multiply_s"].as_f64().unwrap() + figures["body_multiply_s"].as_f64().unwrap();
    assert!((figures["multiply_s"].as_f64().unwrap() - parts).abs() < 1e-9);
}

#[test]
fn a_gpu_is_not_needed_to_know_what_its_products_take() {
    let arguments = ["bench", "gpu", "--floor", "--model-shape", "llama-3.2-1b", "--tokens", "2048", "--json"];
    let products = json(&arguments);
    // Four products, both ways, of a body and of the masks of two sets.
    assert_eq!(products.as_array().unwrap().len(), 4 * 2 * 3);
    assert_eq!((&products[0]["product"], &products[0]["rows"]), (&"qkv".into(), &"2048 tokens".into()));
    assert_eq!(products[0]["operations"].as_f64().unwrap(), 2.0 * 3.0 * 2048.0 * 2048.0 * 3072.0);
}

#[test]
fn random_products_are_exact() {
    let said = succeed(&["bench", "exactness", "--seconds", "1", "--seed", "17"]).stdout;
    assert!(said.contains("products, each byte the portable kernel's"), "{said}");
}

#[test]
fn ctrl_c_leaves_a_whole_trace() {
    let run = Run::new();
    let trace = run.workspace.path("worker.json");
    let (worker, _) = run.worker(1, &["--trace", text(&trace)]);
    worker.interrupt();
    worker.finish().succeeded();
    assert_eq!(events(&trace)[0]["args"]["name"], "worker");
}
