//! Texts on the command line: over a real worker and without one, alone and side by side, and a conversation.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use tests::{Node, Workspace, text};

fn lines(arguments: &[&str]) -> Vec<Value> {
    let said = Node::start(arguments).finish().succeeded().stdout;
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn workers_write_what_the_owners_own_weights_write() {
    let workspace = Workspace::new();
    let model = workspace.model("model", 5, 2);
    let common = ["generate", "--model", text(&model), "--max-tokens", "6", "--logprobs", "1", "--json"];
    let with = |more: &[&str]| lines(&[&common[..], more].concat());
    let plain = &with(&["--prompt", "What is the tin?", "--backend", "plain"])[0];
    assert_eq!(plain["usage"]["tokens"], plain["tokens"].as_array().unwrap().len());
    let encrypted = &with(&["--prompt", "What is the tin?", "--workers", "1"])[0];
    assert_eq!(encrypted["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
    // What noise and rounding leave of it: the first token is as likely, give or take a little.
    let first = |answer: &Value| answer["logprobs"][0]["top"][0]["logprob"].as_f64().unwrap();
    assert!((first(encrypted) - first(plain)).abs() < 0.1, "{encrypted} for {plain}");

    // Side by side, each is what it is alone, whatever it is called.
    let file = "{\"prompt\": \"One\", \"id\": \"a\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"What is the tin?\"}]}\n";
    let prompts = workspace.write("prompts.jsonl", file);
    let both = with(&["--prompts", text(&prompts), "--backend", "plain", "--batch", "2"]);
    assert_eq!((both.len(), &both[0]["id"], &both[1]["tokens"]), (2, &"a".into(), &plain["tokens"]));
    let sampled = ["--prompt", "One", "--backend", "plain", "--temperature", "1.5", "--seed", "7"];
    assert_eq!(with(&sampled)[0]["tokens"], with(&sampled)[0]["tokens"]);

    let wrong = workspace.write("wrong.jsonl", "{\"prompt\": \"One\"}\n{\"question\": \"Two\"}\n");
    let arguments = ["generate", "--model", text(&model), "--backend", "plain", "--prompts", text(&wrong)];
    let said = Node::start(arguments).finish().refused();
    assert!(said.contains("line 2") && said.contains("question"), "{said}");
}

#[test]
fn a_conversation_ends_with_its_input() {
    let workspace = Workspace::new();
    let model = workspace.model("model", 5, 2);
    let arguments = ["chat", "--model", text(&model), "--backend", "plain", "--max-tokens", "4"];
    // Nothing is typed: standard input is empty.
    let ended = Node::start(arguments).finish().succeeded();
    assert!(ended.stderr.contains("/clear"), "{}", ended.stderr);
}
