//! A private fine-tuning with real processes: an owner and workers that know only each other's addresses.

#![allow(missing_docs, clippy::unwrap_used)]

use tests::{LAYERS, PLAIN, Run, SETTINGS};

#[test]
fn encrypted_training_over_three_workers_follows_plain_training() {
    let run = Run::new();
    let workers = [1, 2, 3].map(|number| run.worker(number, &[]));
    let addresses = [0, 1, 2].map(|index| workers[index].1.as_str());
    run.owner_over(&addresses, "encrypted", &[]).finish().succeeded();
    run.train("plain", &PLAIN);

    run.assert_follows("encrypted", "plain");
    let losses = run.losses("plain");
    assert_eq!(losses.len(), 5);
    assert!(losses[4] < losses[0], "the model learns: {losses:?}");

    let (encrypted, plain) = (run.report("encrypted"), run.report("plain"));
    let mut layers: Vec<(u64, u64)> = Vec::new();
    for worker in encrypted["workers"].as_array().unwrap() {
        layers.push((worker["layers"]["start"].as_u64().unwrap(), worker["layers"]["end"].as_u64().unwrap()));
        assert!(worker["calls"].as_u64().unwrap() > 0);
        assert!(worker["busy_seconds"].as_f64().unwrap() > 0.0);
    }
    layers.sort_unstable();
    assert_eq!((layers.len(), layers[0].0, layers[2].1), (3, 0, LAYERS as u64), "{layers:?}");
    assert!(layers.windows(2).all(|pair| pair[0].1 == pair[1].0), "{layers:?}");
    assert!(encrypted["steps"][0]["bytes_up"].as_u64().unwrap() > 0);
    assert_eq!(plain["steps"][0]["bytes_up"].as_u64().unwrap(), 0);

    assert_eq!(
        run.workspace.names_in("encrypted/adapter"),
        ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    );
    assert!(run.workspace.names_in("encrypted").contains(&"loss.svg".to_owned()));
    for (mut node, _) in workers {
        assert!(node.is_running(), "a worker outlives its owner");
        assert!(node.remembers("model.layers.0.self_attn"), "the search finds what a worker does know");
        assert!(!node.remembers("What is 1"), "a worker never sees the data");
        assert!(!node.remembers("lora_A"), "a worker never sees an adapter");
        node.interrupt();
        node.finish().succeeded();
    }
}

#[test]
fn workers_that_serve_the_head_too_follow_plain_training() {
    let run = Run::new();
    let workers = [1, 2].map(|number| run.worker(number, &[]));
    let addresses = [0, 1].map(|index| workers[index].1.as_str());
    run.owner_over(&addresses, "encrypted", &["--head", "remote"]).finish().succeeded();
    run.train("plain", &PLAIN);

    run.assert_follows("encrypted", "plain");
    let report = run.report("encrypted");
    let served: Vec<&str> =
        report["workers"].as_array().unwrap().iter().map(|worker| worker["serves"].as_str().unwrap()).collect();
    assert!(served.iter().any(|served| served.ends_with("head")), "{served:?}");
}

#[test]
fn a_second_run_finds_the_products_of_the_masks() {
    let run = Run::new();
    let (worker, address) = run.worker(1, &[]);
    let steps = ["--steps", "2"];
    let notes = ["first", "second"].map(|out| run.owner_over(&[&address], out, &steps).finish().succeeded().stderr);
    assert!(notes[0].contains("products of masks: ") && notes[1].contains("are kept from earlier runs"), "{notes:?}");
    let down = |out: &str| run.report(out)["steps"][0]["bytes_down"].as_u64().unwrap();
    let mask_seconds = |out: &str| run.report(out)["time"]["mask_seconds"].as_f64().unwrap();
    assert!(down("second") < down("first") * 3 / 4, "{} after {}", down("second"), down("first"));
    assert_eq!(mask_seconds("second"), 0.0, "no worker is asked for one");
    // What was kept is as right as what was fetched.
    run.train("plain", &[&PLAIN[..], &steps].concat());
    run.assert_follows("second", "plain");
    worker.interrupt();
    worker.finish().succeeded();
}

#[test]
fn texts_that_come_again_cost_the_adapted_layers_alone() {
    let run = Run::with(&SETTINGS.replace("rank = 4", "rank = 4\nlayers = 'top 25%'"), LAYERS);
    let (worker, address) = run.worker(1, &[]);
    // Thirty-seven texts, eight a step: the last steps are of the third pass.
    let steps = ["--steps", "14"];
    run.owner_over(&[&address], "encrypted", &steps).finish().succeeded();
    run.train("plain", &[&PLAIN[..], &steps].concat());
    run.assert_follows("encrypted", "plain");
    let report = run.report("encrypted");
    let bytes = |step: usize| {
        let step = &report["steps"][step];
        step["bytes_up"].as_u64().unwrap() as f64 / step["tokens"].as_u64().unwrap() as f64
    };
    // Sixteen layers forward and four backward before, four each way since.
    assert!(bytes(2) > 0.0 && bytes(12) < 0.6 * bytes(2), "{} after {}", bytes(12), bytes(2));
    assert!(!run.workspace.names_in("encrypted").contains(&"prefix.states".to_owned()));
    worker.interrupt();
    worker.finish().succeeded();
}

#[test]
fn ctrl_c_saves_the_adapter() {
    let run = Run::new();
    let mut node = run.owner("out", &[&PLAIN[..], &["--steps", "100000"]].concat());
    node.expect_note("step 1/");
    node.interrupt();
    node.finish().succeeded();
    assert_eq!(
        run.workspace.names_in("out/adapter"),
        ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    );
    let steps = run.losses("out").len();
    assert!((1..100_000).contains(&steps), "{steps} steps");
}
