//! An owner that is stopped, killed, or left by its reader, and goes on: with real processes, in the plain backend, where
//! a resumed run is the uninterrupted one byte for byte.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use serde_json::Value;
use tests::{Finished, Node, Workspace};

/// Everything that a run's numbers may depend on: several epochs, dropout, accumulation, evaluations on the way.
const SETTINGS: &str = "
[owner]
backend = 'plain'
[data]
max_tokens = 48
pad_to = 16
[training]
steps = 16
micro_batch = 2
accumulation = 3
in_flight = 2
learning_rate = 2e-3
warmup_steps = 2
eval_every = 5
data_seed = 7
[training.lora]
rank = 4
dropout = 0.1
[checkpoint]
save_every = 1
";

struct Place {
    workspace: Workspace,
    arguments: Vec<String>,
}

impl Place {
    fn new() -> Self {
        let workspace = Workspace::new();
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let mut arguments: Vec<String> = ["--role", "owner", "--config"].map(String::from).to_vec();
        arguments.push(text(workspace.write("owner.toml", SETTINGS)));
        arguments.extend(["--model".into(), text(workspace.model_of("model", 1, 4))]);
        arguments.extend(["--data".into(), text(workspace.questions("data.jsonl", 21))]);
        Self { workspace, arguments }
    }

    fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let out = self.workspace.path(out).to_str().unwrap().to_owned();
        let mut arguments = Vec::new();
        // A flag is given once: what `more` says counts.
        for pair in self.arguments.chunks(2).filter(|pair| !more.contains(&pair[0].as_str())) {
            arguments.extend_from_slice(pair);
        }
        arguments.extend(["--out".to_owned(), out]);
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        arguments
    }

    fn start(&self, out: &str, more: &[&str]) -> Node {
        Node::start(self.arguments(out, more))
    }

    fn finish(&self, out: &str, more: &[&str]) -> Finished {
        let finished = self.start(out, more).finish();
        assert_eq!(finished.code, Some(0), "{}\n{}", finished.stdout, finished.stderr);
        finished
    }

    fn refused(&self, out: &str, more: &[&str]) -> String {
        let finished = self.start(out, more).finish();
        assert_eq!(finished.code, Some(1), "{}\n{}", finished.stdout, finished.stderr);
        finished.stderr
    }

    fn adapter(&self, out: &str) -> Vec<Vec<u8>> {
        let folder = self.workspace.path(out).join("adapter");
        ["adapter_config.json", "adapter_model.safetensors"].map(|name| fs::read(folder.join(name)).unwrap()).to_vec()
    }

    fn report(&self, out: &str) -> Value {
        serde_json::from_slice(&fs::read(self.workspace.path(out).join("report.json")).unwrap()).unwrap()
    }

    /// Losses of all steps, and all evaluations, as they stand in the report.
    fn losses(&self, out: &str) -> (Vec<Value>, Value) {
        let report = self.report(out);
        let losses = report["steps"].as_array().unwrap().iter().map(|step| step["loss"].clone()).collect();
        (losses, report["evaluations"].clone())
    }

    fn assert_same(&self, out: &str, whole: &str) {
        assert_eq!(self.losses(out), self.losses(whole));
        assert!(self.adapter(out) == self.adapter(whole), "the adapters differ");
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_is_the_one_that_was_not() {
    let place = Place::new();
    let started = Instant::now();
    place.finish("whole", &[]);
    let lasted = started.elapsed();
    assert_eq!(place.losses("whole").0.len(), 16);

    // Moments all over a run, the same ones in every test; what they hit depends on the machine, the result must not.
    let mut state = 12345_u64;
    let mut moment = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        lasted.mul_f64((state >> 40) as f64 / (1_u64 << 24) as f64)
    };
    for _ in 0..6 {
        let mut node = place.start("killed", &["--resume"]);
        thread::sleep(moment());
        if node.is_running() {
            node.signal("KILL");
        }
        drop(node.finish());
    }
    place.finish("killed", &["--resume"]);
    place.assert_same("killed", "whole");
    assert_eq!(place.workspace.names_in("killed/checkpoints").len(), 2, "nothing half-written is left");
    let said = place.finish("killed", &["--resume"]);
    assert!(said.stderr.contains("going on after step 16") && !said.stderr.contains("evaluation after"), "{said:?}");
    place.assert_same("killed", "whole");
}

#[test]
fn signals_stop_a_run_where_it_can_go_on() {
    let place = Place::new();
    place.finish("whole", &[]);
    for (signal, out) in [("INT", "int"), ("TERM", "term"), ("HUP", "hup")] {
        let mut node = place.start(out, &[]);
        node.expect_note("step 2/");
        node.signal(signal);
        let finished = node.finish();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert!(place.refused(out, &[]).contains("--resume"), "an earlier run is not written over");
        place.finish(out, &["--resume"]);
        place.assert_same(out, "whole");
    }

    // Steps of many micro-batches: the second signal comes in the middle of one.
    let config = place.workspace.write("long.toml", &SETTINGS.replace("accumulation = 3", "accumulation = 300"));
    let long = ["--config", config.to_str().unwrap(), "--steps", "3"];
    let mut node = place.start("twice", &long);
    node.expect_note("step 1/");
    node.interrupt();
    node.expect_note("stopping after this step");
    node.interrupt();
    let finished = node.finish();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("the steps before it are in"), "{finished:?}");
    assert_eq!(place.workspace.names_in("twice/checkpoints"), ["step-00000000.checkpoint", "step-00000001.checkpoint"]);
}

#[test]
fn what_is_not_of_this_run_is_refused_by_name() {
    let place = Place::new();
    let short = ["--steps", "2"];
    place.finish("out", &short);
    let other = place.workspace.model_of("other", 9, 4);
    let data = place.workspace.questions("more.jsonl", 22);
    let config = place.workspace.write("rate.toml", &SETTINGS.replace("2e-3", "3e-3"));
    for (more, said) in [
        (vec!["--model", other.to_str().unwrap()], vec!["model (digest) is"]),
        (vec!["--data", data.to_str().unwrap()], vec!["data to train on"]),
        (
            vec!["--config", config.to_str().unwrap()],
            vec!["training.learning_rate is 0.002 in the checkpoint and 0.003"],
        ),
        (vec!["--seed", "8"], vec!["training.seed is 0", "training.data_seed is 7 in the checkpoint and 8 now"]),
    ] {
        let refused = place.refused("out", &[&short[..], &["--resume"], &more].concat());
        assert!(said.iter().all(|said| refused.contains(said)), "{refused}");
        assert!(!refused.contains("rank"), "only what differs is named: {refused}");
    }

    // A torn newest checkpoint is named, and the one before it taken.
    let newest = place.workspace.path("out/checkpoints/step-00000002.checkpoint");
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() - 100]).unwrap();
    let adapter = place.adapter("out");
    let said = place.finish("out", &[&short[..], &["--resume"]].concat()).stderr;
    assert!(said.contains("step-00000002") && said.contains("going on after step 1"), "{said}");
    assert!(place.adapter("out") == adapter, "the adapters differ");
    let from = place.workspace.path("out/checkpoints/step-00000001.checkpoint");
    place.finish("copy", &[&short[..], &["--resume", from.to_str().unwrap()]].concat());
    assert!(place.adapter("copy") == adapter, "the adapters differ");
    place.finish("out", &[&short[..], &["--overwrite"]].concat());
    place.assert_same("out", "copy");
}

#[test]
fn nobody_has_to_read_what_a_run_says() {
    let place = Place::new();
    let finished = Node::start_unread(place.arguments("out", &["--steps", "2"])).finish();
    assert_eq!(finished.code, Some(0));
    assert_eq!(place.losses("out").0.len(), 2);
}

#[test]
fn an_order_that_nobody_gave_is_drawn_and_goes_on() {
    let place = Place::new();
    let config = place.workspace.write("free.toml", &SETTINGS.replace("data_seed = 7\n", ""));
    let free = ["--config", config.to_str().unwrap(), "--steps", "3"];
    let seed = |out: &str| place.report(out)["data_seed"].as_u64().unwrap();
    place.finish("one", &free);
    place.finish("two", &free);
    assert_ne!((seed("one"), place.losses("one")), (seed("two"), place.losses("two")));
    let given = format!("data_seed = {}\n", seed("one"));
    let config = place.workspace.write("given.toml", &SETTINGS.replace("data_seed = 7\n", &given));
    place.finish("again", &["--config", config.to_str().unwrap(), "--steps", "3"]);
    place.assert_same("again", "one");
    let from = place.workspace.path("one/checkpoints/step-00000002.checkpoint");
    place.finish("resumed", &[&free[..], &["--resume", from.to_str().unwrap()]].concat());
    place.assert_same("resumed", "one");
    assert_eq!(seed("resumed"), seed("one"));
    assert!(
        place.report("one")["model"] == "model" && !String::from_utf8_lossy(&place.adapter("one")[0]).contains('/')
    );
}
