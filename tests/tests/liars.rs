//! Workers that lie, over real sockets: each is named and banned, the run ends with the help of the others, and what it learnt
//! is what it would have learnt without them.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::{Liar, Lie, Node, Workspace};

const STEPS: usize = 5;

const SETTINGS: &str = "
[owner]
discovery_seconds = 30
patience_seconds = 60
[data]
max_tokens = 48
pad_to = 16
[training]
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

    fn honest(&self, number: usize) -> (Node, String) {
        let key = self.workspace.path(&format!("worker-{number}.key"));
        let listen = ["--role", "worker", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
        let mut arguments: Vec<String> = listen.map(String::from).to_vec();
        arguments.extend(["--model".to_owned(), text(&self.model), "--identity".to_owned(), text(&key)]);
        let mut node = Node::start(arguments);
        let address = node.expect_line("listening on ");
        (node, address)
    }

    /// Trains over workers, or in plain text where there are none; the report, and what the owner said.
    fn train(&self, out: &str, workers: &[&str]) -> (Value, String) {
        let settings = self.workspace.write("owner.toml", SETTINGS);
        let listen = ["--role", "owner", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
        let mut arguments: Vec<String> = listen.map(String::from).to_vec();
        for (flag, value) in [
            ("--config", text(&settings)),
            ("--model", text(&self.model)),
            ("--data", text(&self.workspace.questions("data.jsonl", 40))),
            ("--out", text(&self.workspace.path(out))),
            ("--steps", STEPS.to_string()),
            ("--backend", if workers.is_empty() { "plain".into() } else { "encrypted".into() }),
            ("--workers", workers.len().max(1).to_string()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        for address in workers {
            arguments.extend(["--peer".to_owned(), (*address).to_owned()]);
        }
        // Its bans are of this test alone.
        let finished = Node::start_in(&self.workspace.path("home"), arguments).finish();
        assert_eq!(finished.code, Some(0), "{}\n{}", finished.stdout, finished.stderr);
        let report = std::fs::read(self.workspace.path(out).join("report.json")).unwrap();
        (serde_json::from_slice(&report).unwrap(), finished.stderr)
    }
}

fn losses(report: &Value) -> Vec<f64> {
    report["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
}

#[test]
fn every_lie_is_caught_and_what_is_learnt_is_what_it_would_have_been() {
    let run = Run::new();
    let (_worker, address) = run.honest(1);
    let plain = losses(&run.train("plain", &[]).0);
    assert_eq!(plain.len(), STEPS);
    for lie in Lie::ALL {
        // It begins to lie in mid-run: by then its products of masks are in use.
        let liar = Liar::start(&run.model, lie, 40);
        let (report, said) = run.train(&format!("{lie:?}"), &[&address, &liar.address]);
        let of_liar = report["workers"].as_array().unwrap().iter().find(|worker| worker["peer_id"] == *liar.peer);
        let state = of_liar.unwrap()["state"].as_str().unwrap();
        assert!(state.starts_with("banned: "), "{lie:?}: {state}");
        assert!(said.contains(&format!("{} is banned", liar.peer)), "{lie:?} is named: {said}");
        for (step, (found, plain)) in losses(&report).iter().zip(&plain).enumerate() {
            assert!((found / plain - 1.0).abs() < 0.01, "{lie:?}, step {}: {found} for {plain}", step + 1);
        }
    }
    let bans = std::fs::read_to_string(run.workspace.path("home").join("velum").join("bans.json")).unwrap();
    let bans: Value = serde_json::from_str(&bans).unwrap();
    assert_eq!(bans.as_array().unwrap().len(), Lie::ALL.len(), "every ban is kept: {bans}");
}
