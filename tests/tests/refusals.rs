//! Bad input: each ends with a message that names the thing and a non-zero exit, and leaves nothing half written.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use tests::{Node, Workspace};

/// Runs `node` with arguments that it must refuse, and returns what it says.
fn refusal(arguments: &[&str]) -> String {
    let finished = Node::start(arguments).finish();
    assert_eq!(finished.code, Some(1), "{}\n{}", finished.stdout, finished.stderr);
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    assert!(finished.stderr.contains("error: "), "{}", finished.stderr);
    finished.stderr
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What an owner is asked to do with a model and data, writing to the workspace's `out`.
struct Run {
    workspace: Workspace,
    out: String,
}

impl Run {
    fn new() -> Self {
        let workspace = Workspace::new();
        let out = text(&workspace.path("out")).to_owned();
        Self { workspace, out }
    }

    /// What the owner says to these arguments; nothing may be left in its folder.
    fn refused(&self, model: &Path, data: &Path, more: &[&str]) -> String {
        let mut arguments = vec!["--role", "owner", "--model", text(model), "--data", text(data), "--no-mdns"];
        arguments.extend(["--listen", "/ip4/127.0.0.1/tcp/0", "--out", &self.out]);
        arguments.extend(more);
        let said = refusal(&arguments);
        assert_eq!(self.workspace.names_in("out"), Vec::<String>::new());
        said
    }
}

#[test]
fn a_missing_model_is_named() {
    let run = Run::new();
    let data = run.workspace.questions("data.jsonl", 10);
    let said = run.refused(Path::new("no/such/model"), &data, &["--backend", "plain"]);
    assert!(said.contains("no/such/model"), "{said}");
    let said = refusal(&["--role", "worker", "--model", "no/such/model.gguf"]);
    assert!(said.contains("no/such/model.gguf"), "{said}");
    for role in ["owner", "worker"] {
        let said = refusal(&["--role", role, "--data", text(&data)]);
        assert!(said.contains("--model"), "{said}");
    }
}

#[test]
fn a_truncated_model_is_named() {
    let run = Run::new();
    let model = run.workspace.model("model");
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let data = run.workspace.questions("data.jsonl", 10);
    let said = run.refused(&model, &data, &["--backend", "plain"]);
    assert!(said.contains("model.safetensors"), "{said}");
}

#[test]
fn a_gguf_of_another_architecture_is_refused_by_name() {
    let workspace = Workspace::new();
    let model = workspace.foreign_gguf("falcon.gguf", "falcon");
    let said = refusal(&["--role", "worker", "--model", text(&model)]);
    assert!(said.contains("falcon") && said.contains("llama"), "{said}");
}

#[test]
fn a_bad_line_of_data_is_named_by_number() {
    let run = Run::new();
    let model = run.workspace.model("model");
    let data = run.workspace.write("data.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"texd\": 3}\n");
    let said = run.refused(&model, &data, &["--backend", "plain"]);
    assert!(said.contains("data.jsonl") && said.contains("line 3"), "{said}");
}

#[test]
fn an_unknown_key_is_named() {
    let workspace = Workspace::new();
    let config = workspace.write("velum.toml", "[training]\nstepz = 3\n");
    let said = refusal(&["--role", "owner", "--config", text(&config)]);
    assert!(said.contains("velum.toml") && said.contains("stepz") && said.contains("line 2"), "{said}");
}

#[test]
fn a_taken_port_is_named() {
    let workspace = Workspace::new();
    let model = workspace.model("model");
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", holder.local_addr().unwrap().port());
    let key = workspace.path("worker.key");
    let mut arguments = vec!["--role", "worker", "--model", text(&model), "--listen", &address];
    arguments.extend(["--no-mdns", "--identity", text(&key)]);
    let said = refusal(&arguments);
    assert!(said.contains(&address), "{said}");
}

#[test]
fn a_second_worker_of_one_identity_is_refused() {
    let workspace = Workspace::new();
    let (model, key) = (workspace.model("model"), workspace.path("worker.key"));
    let mut arguments = vec!["--role", "worker", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
    arguments.extend(["--model", text(&model), "--identity", text(&key)]);
    let mut first = Node::start(&arguments);
    first.expect_line("listening on ");
    let said = refusal(&arguments);
    assert!(said.contains(text(&key)) && said.contains("in use") && said.contains("--identity"), "{said}");
    first.interrupt();
    assert_eq!(first.finish().code, Some(0));
    // However the first one ended, the identity is free again.
    let mut second = Node::start(&arguments);
    second.expect_line("listening on ");
}

#[test]
fn no_workers_within_the_time_is_an_error() {
    let run = Run::new();
    let (model, data) = (run.workspace.model("model"), run.workspace.questions("data.jsonl", 10));
    let config = run.workspace.write("velum.toml", "[owner]\ndiscovery_seconds = 2\n");
    let said = run.refused(&model, &data, &["--config", text(&config)]);
    assert!(said.contains("no worker") && said.contains("2 s"), "{said}");
}

#[test]
fn a_worker_with_another_model_is_refused_by_digest() {
    let run = Run::new();
    let (model, other) = (run.workspace.model("model"), run.workspace.model_with_seed("other", 99));
    let key = run.workspace.path("worker.key");
    let mut arguments = vec!["--role", "worker", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
    arguments.extend(["--model", text(&other), "--identity", text(&key)]);
    let mut worker = Node::start(&arguments);
    let address = worker.expect_line("listening on ");
    let data = run.workspace.questions("data.jsonl", 10);
    let config = run.workspace.write("velum.toml", "[owner]\ndiscovery_seconds = 3\n");
    let said = run.refused(&model, &data, &["--config", text(&config), "--peer", &address]);
    assert!(said.contains("it serves model"), "{said}");
    assert!(worker.is_running());
}

#[test]
fn gpus_that_are_not_there_are_an_error_that_says_what_was_found() {
    let workspace = Workspace::new();
    let model = workspace.model("model");
    let said = refusal(&["--role", "worker", "--model", text(&model), "--gpus", "0,1"]);
    assert!(said.contains("--gpus"), "{said}");
}
