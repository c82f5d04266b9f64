//! Workers that die, come back and hang, as real processes: the run goes on, and ends by itself.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::{Node, Workspace};

/// So many steps that the fault comes long before the end.
const STEPS: usize = 12;

const SETTINGS: &str = "
[owner]
discovery_seconds = 30
patience_seconds = 120
[data]
max_tokens = 48
[training]
micro_batch = 4
accumulation = 2
in_flight = 2
learning_rate = 2e-3
warmup_steps = 0
[training.lora]
rank = 4
";

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

struct Run {
    workspace: Workspace,
    model: PathBuf,
}

impl Run {
    fn new() -> Self {
        let workspace = Workspace::new();
        let model = workspace.model("model");
        Self { workspace, model }
    }

    /// Starts a worker with an identity of its own; and its address.
    fn worker(&self, number: usize, listen: &str) -> (Node, String) {
        let key = self.workspace.path(&format!("worker-{number}.key"));
        let mut arguments: Vec<String> =
            ["--role", "worker", "--no-mdns", "--listen", listen].map(String::from).to_vec();
        arguments.extend(["--model".to_owned(), text(&self.model), "--identity".to_owned(), text(&key)]);
        let mut node = Node::start(arguments);
        let address = node.expect_line("listening on ");
        (node, address)
    }

    fn owner(&self, workers: &[&str]) -> Node {
        let settings = self.workspace.write("owner.toml", SETTINGS);
        let mut arguments: Vec<String> =
            ["--role", "owner", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"].map(String::from).to_vec();
        for (flag, value) in [
            ("--config", text(&settings)),
            ("--model", text(&self.model)),
            ("--data", text(&self.workspace.questions("data.jsonl", 40))),
            ("--out", text(&self.workspace.path("out"))),
            ("--steps", STEPS.to_string()),
            ("--workers", workers.len().to_string()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        for address in workers {
            arguments.extend(["--peer".to_owned(), (*address).to_owned()]);
        }
        Node::start(arguments)
    }

    /// Waits for the end of the run; its report.
    fn end(&self, owner: Node) -> Value {
        let finished = owner.finish();
        assert_eq!(finished.code, Some(0), "{}\n{}", finished.stdout, finished.stderr);
        let report = std::fs::read(self.workspace.path("out").join("report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let losses: Vec<f64> =
            report["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect();
        assert_eq!(losses.len(), STEPS);
        assert!(losses[STEPS - 1] < losses[0], "the model learns: {losses:?}");
        report
    }
}

/// The port of an address.
fn port(address: &str) -> &str {
    address.split("/tcp/").nth(1).unwrap().split('/').next().unwrap()
}

/// What became of the workers of a run, sorted.
fn states(report: &Value) -> Vec<&str> {
    let mut states: Vec<_> =
        report["workers"].as_array().unwrap().iter().map(|worker| worker["state"].as_str().unwrap()).collect();
    states.sort_unstable();
    states
}

const ANY: &str = "/ip4/127.0.0.1/tcp/0";

#[test]
fn a_worker_that_is_killed_is_replaced_by_the_other() {
    let run = Run::new();
    let ((one, first), (_two, second)) = (run.worker(1, ANY), run.worker(2, ANY));
    let mut owner = run.owner(&[&first, &second]);
    owner.expect_log("step 2/");
    drop(one);
    let report = run.end(owner);
    assert_eq!(states(&report), ["gone", "serving"]);
    let gone = report["workers"].as_array().unwrap().iter().find(|worker| worker["state"] == "gone").unwrap();
    assert!(gone["busy_seconds"].is_null() && gone["calls"].as_u64().unwrap() > 0, "{gone}");
}

#[test]
fn the_only_worker_is_waited_for_while_it_is_started_again() {
    let run = Run::new();
    let (worker, address) = run.worker(1, ANY);
    let mut owner = run.owner(&[&address]);
    owner.expect_log("step 2/");
    drop(worker);
    owner.expect_log("no worker is left");
    let (_worker, _) = run.worker(1, &format!("/ip4/127.0.0.1/tcp/{}", port(&address)));
    assert_eq!(states(&run.end(owner)), ["serving"]);
}

#[test]
fn the_work_of_a_worker_that_is_stopped_goes_to_the_other() {
    let run = Run::new();
    let ((one, first), (_two, second)) = (run.worker(1, ANY), run.worker(2, ANY));
    let mut owner = run.owner(&[&first, &second]);
    owner.expect_log("step 2/");
    one.signal("STOP");
    assert_eq!(states(&run.end(owner)), ["gone", "serving"]);
}
