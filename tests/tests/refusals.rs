//! Bad input: each ends with a message that names the thing and a non-zero exit, and leaves nothing half written.

#![allow(missing_docs, clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs;

use tests::{Node, PLAIN, Run, Workspace, text};

/// Runs `node` with arguments that it must refuse, and returns what it says.
fn refusal<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    Node::start(arguments).finish().refused()
}

/// What an owner says to these arguments; nothing may be left in its folder.
fn owners_refusal(run: &Run, more: &[&str]) -> String {
    let said = run.refused("out", more);
    assert_eq!(run.workspace.names_in("out"), Vec::<String>::new());
    said
}

#[test]
fn a_missing_model_is_named() {
    let run = Run::new();
    let said = owners_refusal(&run, &[&PLAIN[..], &["--model", "no/such/model"]].concat());
    assert!(said.contains("no/such/model"), "{said}");
    let said = refusal(["--role", "worker", "--model", "no/such/model.gguf"]);
    assert!(said.contains("no/such/model.gguf"), "{said}");
    let data = run.workspace.questions("data.jsonl", 10);
    for role in ["owner", "worker"] {
        let said = refusal(["--role", role, "--data", text(&data)]);
        assert!(said.contains("--model"), "{said}");
    }
}

#[test]
fn a_truncated_model_is_named() {
    let run = Run::new();
    let weights = run.model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let said = owners_refusal(&run, &PLAIN);
    assert!(said.contains("model.safetensors"), "{said}");
}

#[test]
fn a_gguf_of_another_architecture_is_refused_by_name() {
    let workspace = Workspace::new();
    let model = workspace.foreign_gguf("falcon.gguf", "falcon");
    let said = refusal(["--role", "worker", "--model", text(&model)]);
    assert!(said.contains("falcon") && said.contains("llama"), "{said}");
}

#[test]
fn a_bad_line_of_data_is_named_by_number() {
    let run = Run::new();
    run.workspace.write("data.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"texd\": 3}\n");
    let said = owners_refusal(&run, &PLAIN);
    assert!(said.contains("data.jsonl") && said.contains("line 3"), "{said}");
}

#[test]
fn an_unknown_key_is_named() {
    let workspace = Workspace::new();
    let config = workspace.write("velum.toml", "[training]\nstepz = 3\n");
    let said = refusal(["--role", "owner", "--config", text(&config)]);
    assert!(said.contains("velum.toml") && said.contains("stepz") && said.contains("line 2"), "{said}");
}

#[test]
fn a_taken_port_is_named() {
    let run = Run::new();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", holder.local_addr().unwrap().port());
    let said = refusal(run.worker_arguments(1, &["--listen", &address]));
    assert!(said.contains(&address), "{said}");
}

#[test]
fn a_second_worker_of_one_identity_is_refused() {
    let run = Run::new();
    let (first, _) = run.worker(1, &[]);
    let said = refusal(run.worker_arguments(1, &[]));
    let key = run.workspace.path("worker-1.key");
    assert!(said.contains(text(&key)) && said.contains("in use") && said.contains("--identity"), "{said}");
    first.interrupt();
    first.finish().succeeded();
    // However the first one ended, the identity is free again.
    run.worker(1, &[]);
}

#[test]
fn no_workers_within_the_time_is_an_error() {
    let run = Run::with("[owner]\ndiscovery_seconds = 2\n", 2);
    let said = owners_refusal(&run, &[]);
    assert!(said.contains("no worker") && said.contains("2 s"), "{said}");
}

#[test]
fn a_worker_with_another_model_is_refused_by_digest() {
    let run = Run::with("[owner]\ndiscovery_seconds = 3\n", 2);
    let other = run.workspace.model("other", 99, 2);
    let (mut worker, address) = run.worker(1, &["--model", text(&other)]);
    let said = owners_refusal(&run, &["--peer", &address]);
    assert!(said.contains("it serves model"), "{said}");
    assert!(worker.is_running());
}

#[test]
fn gpus_that_are_not_there_are_an_error_that_says_what_was_found() {
    let run = Run::new();
    let said = refusal(["--role", "worker", "--model", text(&run.model), "--gpus", "0,1"]);
    assert!(said.contains("--gpus"), "{said}");
}
