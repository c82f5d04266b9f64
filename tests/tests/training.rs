//! A private fine-tuning with real processes: an owner and workers that know only each other's addresses.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use serde_json::Value;
use tests::{Finished, LAYERS, Node, Workspace};

/// Settings that suit the small random model: a few steps, all projections, no dropout.
const SETTINGS: &str = "
[owner]
discovery_seconds = 30
[data]
max_tokens = 48
pad_to = 16
[training]
steps = 4
micro_batch = 4
accumulation = 2
in_flight = 2
learning_rate = 2e-3
warmup_steps = 0
data_seed = 0
[training.lora]
rank = 4
";

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn owner(workspace: &Workspace, model: &Path, out: &str, more: &[String]) -> Vec<String> {
    let settings = workspace.write("owner.toml", SETTINGS);
    let mut arguments: Vec<String> =
        ["--role", "owner", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"].map(String::from).to_vec();
    for (flag, path) in [
        ("--config", settings.as_path()),
        ("--model", model),
        ("--data", &workspace.questions("data.jsonl", 40)),
        ("--out", &workspace.path(out)),
    ] {
        arguments.extend([flag.to_owned(), text(path)]);
    }
    arguments.extend_from_slice(more);
    arguments
}

fn worker(workspace: &Workspace, model: &Path, number: usize) -> (Node, String) {
    let key = workspace.path(&format!("worker-{number}.key"));
    let mut arguments: Vec<String> =
        ["--role", "worker", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"].map(String::from).to_vec();
    arguments.extend(["--model".to_owned(), text(model), "--identity".to_owned(), text(&key)]);
    let mut node = Node::start(arguments);
    let address = node.expect_line("listening on ");
    (node, address)
}

fn report(workspace: &Workspace, out: &str) -> Value {
    let path = workspace.path(out).join("report.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn losses(report: &Value) -> Vec<f64> {
    report["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
}

fn assert_success(finished: &Finished) {
    assert_eq!(finished.code, Some(0), "{}\n{}", finished.stdout, finished.stderr);
}

#[test]
fn encrypted_training_over_three_workers_follows_plain_training() {
    let workspace = Workspace::new();
    let model = workspace.model("model");
    let workers: Vec<_> = (1..=3).map(|number| worker(&workspace, &model, number)).collect();
    let mut peers = vec!["--workers".to_owned(), "3".to_owned()];
    for (_, address) in &workers {
        peers.extend(["--peer".to_owned(), address.clone()]);
    }
    assert_success(&Node::start(owner(&workspace, &model, "encrypted", &peers)).finish());
    let plain = ["--backend".to_owned(), "plain".to_owned()];
    assert_success(&Node::start(owner(&workspace, &model, "plain", &plain)).finish());

    let (encrypted, plain) = (report(&workspace, "encrypted"), report(&workspace, "plain"));
    let (encrypted_losses, plain_losses) = (losses(&encrypted), losses(&plain));
    assert_eq!(encrypted_losses.len(), 4);
    for (encrypted, plain) in encrypted_losses.iter().zip(&plain_losses) {
        assert!((encrypted / plain - 1.0).abs() < 0.01, "{encrypted_losses:?} beside {plain_losses:?}");
    }
    assert!(plain_losses[3] < plain_losses[0], "the model learns: {plain_losses:?}");

    let mut layers: Vec<(u64, u64)> = Vec::new();
    for worker in encrypted["workers"].as_array().unwrap() {
        layers.push((worker["layers"]["start"].as_u64().unwrap(), worker["layers"]["end"].as_u64().unwrap()));
        assert!(worker["calls"].as_u64().unwrap() > 0);
        assert!(worker["busy_seconds"].as_f64().unwrap() > 0.0);
    }
    layers.sort_unstable();
    assert_eq!((layers.len(), layers[0].0, layers[2].1), (3, 0, LAYERS), "{layers:?}");
    assert!(layers.windows(2).all(|pair| pair[0].1 == pair[1].0), "{layers:?}");
    assert!(encrypted["steps"][0]["bytes_up"].as_u64().unwrap() > 0);
    assert_eq!(plain["steps"][0]["bytes_up"].as_u64().unwrap(), 0);

    assert_eq!(workspace.names_in("encrypted/adapter"), ["adapter_config.json", "adapter_model.safetensors"]);
    assert!(workspace.names_in("encrypted").contains(&"loss.svg".to_owned()));
    for (mut node, _) in workers {
        assert!(node.is_running(), "a worker outlives its owner");
        assert!(node.remembers("model.layers.0.self_attn"), "the search finds what a worker does know");
        assert!(!node.remembers("What is 1"), "a worker never sees the data");
        assert!(!node.remembers("lora_A"), "a worker never sees an adapter");
        node.interrupt();
        assert_success(&node.finish());
    }
}

#[test]
fn ctrl_c_saves_the_adapter() {
    let workspace = Workspace::new();
    let model = workspace.model("model");
    let more = ["--backend", "plain", "--steps", "100000"].map(String::from);
    let mut node = Node::start(owner(&workspace, &model, "out", &more));
    node.expect_line("training ");
    std::thread::sleep(std::time::Duration::from_secs(2));
    node.interrupt();
    assert_success(&node.finish());
    assert_eq!(workspace.names_in("out/adapter"), ["adapter_config.json", "adapter_model.safetensors"]);
    let steps = losses(&report(&workspace, "out")).len();
    assert!((1..100_000).contains(&steps), "{steps} steps");
}
