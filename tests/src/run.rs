//! What most tests begin with: a model, data and settings in a folder of their own, and workers and owners that are started on
//! them. A test says what is different about its owner, and looks at what that leaves behind.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Finished, Node, Workspace};

/// Settings that suit the small random model: it learns within a few steps, in which all that is random comes from seeds.
pub const SETTINGS: &str = "
[owner]
discovery_seconds = 30
patience_seconds = 120
[data]
max_tokens = 48
pad_to = 16
[training]
steps = 5
micro_batch = 4
accumulation = 2
in_flight = 2
learning_rate = 1e-3
warmup_steps = 0
data_seed = 0
[training.lora]
rank = 4
";

/// What an owner is told in order to train without workers.
pub const PLAIN: [&str; 2] = ["--backend", "plain"];

/// Layers of a test's model: so many that each of some workers gets one, even if it measured itself on busy cores at a
/// quarter of the others' speed.
pub const LAYERS: usize = 16;

/// So many that what is left for training is odd: a pass over it ends in the middle of a micro-batch.
const QUESTIONS: usize = 41;

/// Whatever is trained on one model with one set of settings.
pub struct Run {
    /// Where everything lies.
    pub workspace: Workspace,
    /// The model.
    pub model: PathBuf,
    settings: PathBuf,
    data: PathBuf,
}

impl Default for Run {
    fn default() -> Self {
        Self::new()
    }
}

impl Run {
    /// With [`SETTINGS`], and a model of [`LAYERS`] layers.
    pub fn new() -> Self {
        Self::with(SETTINGS, LAYERS)
    }

    /// With other settings, and a model of so many layers.
    pub fn with(settings: &str, layers: usize) -> Self {
        let workspace = Workspace::new();
        let model = workspace.model("model", 1, layers);
        let settings = workspace.write("owner.toml", settings);
        let data = workspace.questions("data.jsonl", QUESTIONS);
        Self { workspace, model, settings, data }
    }

    /// What a worker is told that has the identity of this number.
    pub fn worker_arguments(&self, number: usize, more: &[&str]) -> Vec<String> {
        let key = self.workspace.path(&format!("worker-{number}.key"));
        self.arguments(&[("--role", "worker"), ("--identity", text(&key))], more)
    }

    /// Starts a worker; and the address at which it can be dialed.
    pub fn worker(&self, number: usize, more: &[&str]) -> (Node, String) {
        let mut node = Node::start(self.worker_arguments(number, more));
        let address = node.expect_line("listening on ");
        (node, address)
    }

    /// What an owner is told that writes to the folder `out`.
    pub fn owner_arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let out = self.workspace.path(out);
        let paths = [("--config", &self.settings), ("--data", &self.data), ("--out", &out)];
        let paths = paths.map(|(flag, path)| (flag, text(path)));
        self.arguments(&[&[("--role", "owner")], &paths[..]].concat(), more)
    }

    /// Flags with their values, those of every process among them. A flag is given once: what `more` says counts.
    fn arguments(&self, own: &[(&str, &str)], more: &[&str]) -> Vec<String> {
        let all = [("--listen", "/ip4/127.0.0.1/tcp/0"), ("--model", text(&self.model))];
        let given = own.iter().chain(&all).filter(|(flag, _)| !more.contains(flag));
        let words = given.flat_map(|&(flag, value)| [flag, value]).chain(["--no-mdns"]).chain(more.iter().copied());
        words.map(String::from).collect()
    }

    /// Starts an owner. Whom it bans, it bans in this test alone.
    pub fn owner(&self, out: &str, more: &[&str]) -> Node {
        Node::start_in(&self.home(), self.owner_arguments(out, more))
    }

    /// Starts an owner that dials these workers and waits for all of them.
    pub fn owner_over(&self, workers: &[&str], out: &str, more: &[&str]) -> Node {
        let count = workers.len().to_string();
        let mut arguments = vec!["--workers", &count];
        arguments.extend(workers.iter().flat_map(|&address| ["--peer", address]));
        arguments.extend(more);
        self.owner(out, &arguments)
    }

    /// The folder of the owners' configuration, the list of bans among it.
    pub fn home(&self) -> PathBuf {
        self.workspace.path("home")
    }

    /// Runs an owner to its end.
    pub fn train(&self, out: &str, more: &[&str]) -> Finished {
        self.owner(out, more).finish().succeeded()
    }

    /// Runs an owner that must refuse what it is told; what it says.
    pub fn refused(&self, out: &str, more: &[&str]) -> String {
        self.owner(out, more).finish().refused()
    }

    /// What a run reports.
    ///
    /// # Panics
    /// When there is no such report.
    pub fn report(&self, out: &str) -> Value {
        let report = fs::read(self.workspace.path(out).join("report.json")).expect("a run leaves a report");
        serde_json::from_slice(&report).expect("a report is JSON")
    }

    /// Losses of all steps of a run, as they stand in its report.
    ///
    /// # Panics
    /// When it has no report that tells them.
    pub fn losses(&self, out: &str) -> Vec<f64> {
        let report = self.report(out);
        let steps = report["steps"].as_array().expect("a report has steps");
        steps.iter().map(|step| step["loss"].as_f64().expect("a step has a loss")).collect()
    }

    /// The files of the adapter that a run leaves.
    ///
    /// # Panics
    /// When there is none.
    pub fn adapter(&self, out: &str) -> [Vec<u8>; 2] {
        let folder = self.workspace.path(out).join("adapter");
        ["adapter_config.json", "adapter_model.safetensors"]
            .map(|name| fs::read(folder.join(name)).expect("a run leaves an adapter"))
    }

    /// Two runs were the same: in every loss, and in every byte of the adapter.
    ///
    /// # Panics
    /// When they were not.
    pub fn assert_same(&self, out: &str, other: &str) {
        assert_eq!(self.losses(out), self.losses(other));
        assert_eq!(self.report(out)["evaluations"], self.report(other)["evaluations"]);
        assert!(self.adapter(out) == self.adapter(other), "the adapters differ");
    }

    /// In each step an encrypted run learnt what the plain one did: their losses differ by less than one in a hundred.
    ///
    /// # Panics
    /// When it did not.
    pub fn assert_follows(&self, encrypted: &str, plain: &str) {
        let (found, expected) = (self.losses(encrypted), self.losses(plain));
        assert_eq!(found.len(), expected.len());
        let near = |(found, expected): (&f64, &f64)| (found / expected - 1.0).abs() < 0.01;
        assert!(found.iter().zip(&expected).all(near), "{encrypted}: {found:?} beside {expected:?}");
    }
}

/// A path as a flag's value.
///
/// # Panics
/// When it is no text, which those of tests are.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a test's paths are text")
}
