//! An owner that is stopped, killed, left by its reader or without room on its disk, and goes on: with real processes, in the plain backend, where
//! a resumed run is the uninterrupted one byte for byte.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use tests::{Node, Run, text};

/// Everything that a run's numbers may depend on: several epochs, dropout, accumulation, evaluations on the way, lower layers
/// that are computed once a text.
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
layers = 'top 50%'
[checkpoint]
save_every = 1
";

/// Few layers, since every run is made several times.
fn plain_run() -> Run {
    Run::with(SETTINGS, 4)
}

#[test]
fn a_run_that_is_killed_again_and_again_is_the_one_that_was_not() {
    let run = plain_run();
    let started = Instant::now();
    run.train("whole", &[]);
    let lasted = started.elapsed();
    assert_eq!(run.losses("whole").len(), 16);

    // Moments all over a run, the same ones in every test; what they hit depends on the machine, the result must not.
    let mut state = 12345_u64;
    let mut moment = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        lasted.mul_f64((state >> 40) as f64 / (1_u64 << 24) as f64)
    };
    for _ in 0..6 {
        let mut node = run.owner("killed", &["--resume"]);
        thread::sleep(moment());
        if node.is_running() {
            node.signal("KILL");
        }
        drop(node.finish());
    }
    run.train("killed", &["--resume"]);
    run.assert_same("killed", "whole");
    assert_eq!(run.workspace.names_in("killed/checkpoints").len(), 2, "nothing half-written is left");
    for out in ["whole", "killed"] {
        let names = run.workspace.names_in(out);
        assert!(
            !names.contains(&"prefix.states".to_owned()),
            "a run that is over leaves no states of its texts: {names:?}"
        );
    }
    let said = run.train("killed", &["--resume"]);
    assert!(said.stderr.contains("going on after step 16") && !said.stderr.contains("evaluation after"), "{said:?}");
    run.assert_same("killed", "whole");
}

/// Whether this process, and with it every one that it starts, ignores SIGHUP, as under `nohup`: then an owner is to outlive its
/// terminal.
fn hang_up_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(ignored.trim(), 16).unwrap() & 1 == 1
}

#[test]
fn signals_stop_a_run_where_it_can_go_on() {
    // Steps so long that a signal comes before the last of them.
    let run = Run::with(&SETTINGS.replace("accumulation = 3", "accumulation = 30"), 4);
    run.train("whole", &[]);
    let signals = [("INT", "int"), ("TERM", "term"), ("HUP", "hup")];
    for (signal, out) in signals.into_iter().filter(|&(signal, _)| signal != "HUP" || !hang_up_is_ignored()) {
        let mut node = run.owner(out, &[]);
        node.expect_note("step 2/");
        node.signal(signal);
        node.finish().succeeded();
        assert!(run.refused(out, &[]).contains("--resume"), "an earlier run is not written over");
        let states = fs::metadata(run.workspace.path(out).join("prefix.states")).unwrap();
        assert_eq!((states.permissions().mode() & 0o777, states.len() > 1 << 10), (0o600, true), "for when it goes on");
        run.train(out, &["--resume"]);
        run.assert_same(out, "whole");
    }

    // Steps of many micro-batches: the second signal comes in the middle of one.
    let config = run.workspace.write("long.toml", &SETTINGS.replace("accumulation = 3", "accumulation = 900"));
    let long = ["--config", text(&config), "--steps", "3"];
    let mut node = run.owner("twice", &long);
    node.expect_note("step 1/");
    // A signal between two steps ends the run there; a step takes a second or more, and nothing tells that one has begun.
    thread::sleep(Duration::from_millis(200));
    node.interrupt();
    node.expect_note("stopping after this step");
    node.interrupt();
    let said = node.finish().refused();
    assert!(said.contains("the steps before it are in"), "{said}");
    assert_eq!(run.workspace.names_in("twice/checkpoints"), ["step-00000000.checkpoint", "step-00000001.checkpoint"]);
}

#[test]
fn what_is_not_of_this_run_is_refused_by_name() {
    let run = plain_run();
    let short = ["--steps", "2"];
    run.train("out", &short);
    let other = run.workspace.model("other", 9, 4);
    let data = run.workspace.questions("more.jsonl", 22);
    let config = run.workspace.write("rate.toml", &SETTINGS.replace("2e-3", "3e-3"));
    for (more, said) in [
        (vec!["--model", text(&other)], vec!["model (digest) is"]),
        (vec!["--data", text(&data)], vec!["data to train on"]),
        (vec!["--config", text(&config)], vec!["training.learning_rate is 0.002 in the checkpoint and 0.003"]),
        (vec!["--seed", "8"], vec!["training.seed is 0", "training.data_seed is 7 in the checkpoint and 8 now"]),
    ] {
        let refused = run.refused("out", &[&short[..], &["--resume"], &more].concat());
        assert!(said.iter().all(|said| refused.contains(said)), "{refused}");
        assert!(!refused.contains("rank"), "only what differs is named: {refused}");
    }

    // A torn newest checkpoint is named, and the one before it taken.
    let newest = run.workspace.path("out/checkpoints/step-00000002.checkpoint");
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() - 100]).unwrap();
    let adapter = run.adapter("out");
    let said = run.train("out", &[&short[..], &["--resume"]].concat()).stderr;
    assert!(said.contains("step-00000002") && said.contains("going on after step 1"), "{said}");
    assert!(run.adapter("out") == adapter, "the adapters differ");
    let from = run.workspace.path("out/checkpoints/step-00000001.checkpoint");
    run.train("copy", &[&short[..], &["--resume", text(&from)]].concat());
    assert!(run.adapter("copy") == adapter, "the adapters differ");
    run.train("out", &[&short[..], &["--overwrite"]].concat());
    run.assert_same("out", "copy");
}

#[test]
fn nobody_has_to_read_what_a_run_says() {
    let run = plain_run();
    Node::start_unread(run.owner_arguments("out", &["--steps", "2"])).finish().succeeded();
    assert_eq!(run.losses("out").len(), 2);
}

#[test]
fn an_order_that_nobody_gave_is_drawn_and_goes_on() {
    let run = plain_run();
    let config = run.workspace.write("free.toml", &SETTINGS.replace("data_seed = 7\n", ""));
    let free = ["--config", text(&config), "--steps", "3"];
    let seed = |out: &str| run.report(out)["data_seed"].as_u64().unwrap();
    run.train("one", &free);
    run.train("two", &free);
    assert_ne!((seed("one"), run.losses("one")), (seed("two"), run.losses("two")));
    let given = format!("data_seed = {}\n", seed("one"));
    let config = run.workspace.write("given.toml", &SETTINGS.replace("data_seed = 7\n", &given));
    run.train("again", &["--config", text(&config), "--steps", "3"]);
    run.assert_same("again", "one");
    let from = run.workspace.path("one/checkpoints/step-00000002.checkpoint");
    run.train("resumed", &[&free[..], &["--resume", text(&from)]].concat());
    run.assert_same("resumed", "one");
    assert_eq!(seed("resumed"), seed("one"));
    assert!(run.report("one")["model"] == "model" && !String::from_utf8_lossy(&run.adapter("one")[0]).contains('/'));
}

/// Names and bytes of a run's checkpoints. What one is written to before it has its name comes and goes at any time.
fn checkpoints(run: &Run, out: &str) -> Vec<(String, Vec<u8>)> {
    let folder = format!("{out}/checkpoints");
    let read = |name: String| (name.clone(), fs::read(run.workspace.path(&folder).join(name)).unwrap());
    run.workspace.names_in(&folder).into_iter().filter(|name| !name.starts_with('.')).map(read).collect()
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else() {
    const TRIED_AGAIN: &str = "it is tried again after every step, and older ones stay";
    let run = plain_run();
    // So many steps that the run lasts until the test has seen all that it waits for.
    let more = ["--steps", "200"];
    run.train("whole", &more);
    let mut node = Node::start_on_a_small_disk(run.owner_arguments("full", &more));
    node.expect_note("step 3/");
    node.fill_disk(true);
    let refused = node.expect_log(TRIED_AGAIN);
    assert!(refused.contains(".checkpoint cannot be written"), "{refused}");
    let older = checkpoints(&run, "full");
    assert_eq!(older.len(), 2, "those that were there stay, and nothing half-written");
    for _ in 0..5 {
        node.expect_note("step ");
    }
    assert!(checkpoints(&run, "full") == older, "the older checkpoints changed");
    node.fill_disk(false);
    node.expect_log("checkpoints can be written again");
    let newest = |saved: &[(String, Vec<u8>)]| saved.last().unwrap().0.clone();
    let at = |name: &str| -> usize { name.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap() };
    let (before, now) = (at(&newest(&older)), at(run.workspace.names_in("full/checkpoints").last().unwrap()));
    assert!((before + 5..200).contains(&now), "one of step {now} after that of step {before}");

    let said = node.finish().succeeded().stderr;
    for file in [".checkpoint", "metrics.jsonl"] {
        assert_eq!(said.matches(&format!("{file} cannot be written")).count(), 1, "it is said once: {said}");
    }
    assert_eq!(said.matches("checkpoints can be written again").count(), 1, "{said}");
    run.assert_same("full", "whole");
    let named = |name: &String| name.starts_with("step-") && name.ends_with(".checkpoint");
    assert!(run.workspace.names_in("full/checkpoints").iter().all(named), "something half-written stayed");

    // What was on the full disk is enough to go on from.
    let kept = run.workspace.path("kept.checkpoint");
    fs::write(&kept, &older[1].1).unwrap();
    run.train("resumed", &[&more[..], &["--resume", text(&kept)]].concat());
    run.assert_same("resumed", "whole");
}

#[test]
fn a_disk_that_stays_full_ends_a_run_that_can_go_on() {
    let run = plain_run();
    let more = ["--steps", "100"];
    run.train("whole", &more);
    let mut node = Node::start_on_a_small_disk(run.owner_arguments("full", &more));
    node.expect_note("step 3/");
    node.fill_disk(true);
    let said = node.finish().refused();
    assert!(said.contains("step 100/100"), "it goes on to its end: {said}");
    assert!(said.contains("error: ") && said.contains("full/report.json"), "{said}");
    assert!(!run.workspace.names_in("full/checkpoints").contains(&"step-00000100.checkpoint".to_owned()));
    run.train("full", &[&more[..], &["--resume"]].concat());
    run.assert_same("full", "whole");
}
