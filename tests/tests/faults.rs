//! Workers that die, come back, hang and wake up, as real processes: the run goes on, and ends by itself.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use tests::{Node, Run};

/// So many steps that the fault comes long before the end.
const STEPS: usize = 12;

/// Starts a run over these workers, and waits until it is well under way.
fn begin(run: &Run, workers: &[&str]) -> Node {
    let mut owner = run.owner_over(workers, "out", &["--steps", &STEPS.to_string()]);
    owner.expect_log("step 2/");
    owner
}

/// Waits for the end of the run; its report.
fn end(run: &Run, owner: Node) -> Value {
    owner.finish().succeeded();
    let losses = run.losses("out");
    assert_eq!(losses.len(), STEPS);
    assert!(losses[STEPS - 1] < losses[0], "the model learns: {losses:?}");
    run.report("out")
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

#[test]
fn a_worker_that_is_killed_is_replaced_by_the_other() {
    let run = Run::new();
    let ((one, first), (_two, second)) = (run.worker(1, &[]), run.worker(2, &[]));
    let owner = begin(&run, &[&first, &second]);
    drop(one);
    let report = end(&run, owner);
    assert_eq!(states(&report), ["gone", "serving"]);
    let gone = report["workers"].as_array().unwrap().iter().find(|worker| worker["state"] == "gone").unwrap();
    assert!(gone["busy_seconds"].is_null() && gone["calls"].as_u64().unwrap() > 0, "{gone}");
}

#[test]
fn the_only_worker_is_waited_for_while_it_is_started_again() {
    let run = Run::new();
    let (worker, address) = run.worker(1, &[]);
    let mut owner = begin(&run, &[&address]);
    drop(worker);
    owner.expect_log("no worker is left");
    let (_worker, _) = run.worker(1, &["--listen", &format!("/ip4/127.0.0.1/tcp/{}", port(&address))]);
    assert_eq!(states(&end(&run, owner)), ["serving"]);
}

#[test]
fn the_work_of_a_worker_that_is_stopped_goes_to_the_other() {
    let run = Run::new();
    let ((one, first), (_two, second)) = (run.worker(1, &[]), run.worker(2, &[]));
    let owner = begin(&run, &[&first, &second]);
    one.signal("STOP");
    assert_eq!(states(&end(&run, owner)), ["gone", "serving"]);
}

#[test]
fn a_worker_that_wakes_up_is_not_heard_for_what_another_did() {
    let run = Run::new();
    let ((one, first), (_two, second)) = (run.worker(1, &[]), run.worker(2, &[]));
    // It goes on until this worker is back.
    let mut owner = run.owner_over(&[&first, &second], "out", &["--steps", "100000"]);
    owner.expect_log("step 2/");
    one.signal("STOP");
    owner.expect_log("its layers go to others until it is back");
    // The other one does what it was asked for last before this step is done.
    owner.expect_note("step ");
    one.signal("CONT");
    owner.expect_log("is back");
    owner.expect_note("step ");
    owner.interrupt();
    let said = owner.finish().succeeded().stderr;
    assert!(!said.contains("wrong answer") && !said.contains("banned"), "{said}");
    let report = run.report("out");
    assert_eq!(states(&report), ["serving", "serving"]);
    let losses = run.losses("out");
    assert!(losses[losses.len() - 1] < losses[0], "the model learns: {losses:?}");
}
