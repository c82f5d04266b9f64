//! The files as a reader sees them.

#![allow(clippy::unwrap_used)]

use super::*;

fn report() -> Report {
    let steps = (1..=3).map(|step| StepReport {
        step,
        loss: 3.0 / f64::from(step),
        seconds: 4.5,
        tokens: 1024,
        loss_tokens: Some(700),
        learning_rate: Some(1e-4),
        gradient_norm: (step > 1).then_some(0.5),
        bytes_up: 7_000_000_000,
        bytes_down: 5,
        owner_parts: None,
        rewards: None,
        owner_cpu_seconds: (step > 1).then_some(0.25),
    });
    Report {
        velum_version: "0.1.0".into(),
        model: "A <model> & \"more\"".into(),
        model_digest: "ab".repeat(32),
        backend: "encrypted".into(),
        parameter_sets: vec![ParameterSet::P24, ParameterSet::P32],
        seed: u64::MAX,
        data_seed: 5,
        data_digest: Some("cd".repeat(32)),
        held_out_digest: None,
        settings: Some(serde_json::json!({"training": {"learning_rate": 1e-4}})),
        best_step: None,
        eval_loss_before: Some(3.1),
        eval_loss_after: None,
        answers: Vec::new(),
        evaluations: vec![EvaluationReport { step: 0, loss: 3.1, rewards: None }],
        steps: steps.collect(),
        time: TimeBreakdown { encrypt_seconds: 1.0, ..TimeBreakdown::default() },
        workers: vec![WorkerReport {
            serves: "layers 0 to 14".into(),
            peer_id: "12D3".into(),
            layers: 0..10,
            device: "cpu (avx2)".into(),
            calls: 12,
            busy_seconds: Some(0.5),
            peak_rss_bytes: Some(1 << 30),
            state: "serving".into(),
        }],
        owner_peak_rss_bytes: 1 << 31,
        owner_cpu_seconds: 6.5,
    }
}

#[test]
fn json_has_the_documented_fields() {
    let out = tempfile::tempdir().unwrap();
    report().write(out.path()).unwrap();
    let text = std::fs::read_to_string(out.path().join("report.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        json["steps"][1],
        serde_json::json!({"step": 2, "loss": 1.5, "seconds": 4.5, "tokens": 1024, "loss_tokens": 700, "learning_rate": 1e-4,
                           "gradient_norm": 0.5, "bytes_up": 7_000_000_000_u64,
                           "bytes_down": 5, "owner_cpu_seconds": 0.25})
    );
    assert_eq!(json["parameter_sets"], serde_json::json!(["p24", "p32"]));
    assert_eq!(json["eval_loss_before"], 3.1);
    assert!(json["eval_loss_after"].is_null());
    assert_eq!(json["evaluations"], serde_json::json!([{"step": 0, "loss": 3.1}]));
    assert_eq!((&json["seed"], &json["data_seed"]), (&u64::MAX.into(), &5.into()));
    let worker = &json["workers"][0];
    assert_eq!(worker["layers"], serde_json::json!({"start": 0, "end": 10}));
    for field in ["peer_id", "device", "calls", "busy_seconds", "peak_rss_bytes", "state"] {
        assert!(!worker[field].is_null(), "{field}");
    }
    for field in ["velum_version", "model", "model_digest", "backend", "owner_peak_rss_bytes", "owner_cpu_seconds"] {
        assert!(!json[field].is_null(), "{field}");
    }
    for activity in ["encrypt", "transport_and_multiply", "multiply", "decrypt", "own"] {
        assert!(json["time"][format!("{activity}_seconds")].is_number(), "{activity}");
    }
    assert_eq!(Report::read(out.path()).unwrap(), report());
}

fn lines(out: &std::path::Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join(METRICS_FILE)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn metrics_have_a_line_as_soon_as_there_is_something_to_tell() {
    let out = tempfile::tempdir().unwrap();
    let all = report();
    let mut run = Report { steps: Vec::new(), ..report() };
    // What a process that was killed has left: steps that the checkpoint has not, and half a line.
    std::fs::write(out.path().join(METRICS_FILE), "{\"step\": 1}\n{\"step\": 2}\n{\"st").unwrap();
    let mut curves = Curves::new(out.path(), &run);
    curves.follow(&run);
    assert_eq!(lines(out.path()), [serde_json::json!({"step": 0, "eval_loss": 3.1})]);
    for (count, step) in all.steps.iter().enumerate() {
        run.steps.push(step.clone());
        if count == 1 {
            run.evaluations.push(EvaluationReport { step: 2, loss: 2.5, rewards: None });
        }
        curves.follow(&run);
    }
    let written = lines(out.path());
    let steps: Vec<_> = written.iter().map(|line| (line["step"].as_u64().unwrap(), line["loss"].is_null())).collect();
    assert_eq!(steps, [(0, true), (1, false), (2, false), (2, true), (3, false)]);
    assert_eq!(written[4], serde_json::to_value(&run.steps[2]).unwrap());

    // The next process writes the same anew, and a disk that was full for a while leaves nothing out.
    drop(curves);
    let mut curves = Curves::new(out.path(), &run);
    std::fs::remove_file(out.path().join(METRICS_FILE)).unwrap();
    std::fs::create_dir(out.path().join(METRICS_FILE)).unwrap();
    curves.follow(&run);
    std::fs::remove_dir(out.path().join(METRICS_FILE)).unwrap();
    run.evaluations.push(EvaluationReport { step: 3, loss: f64::NAN, rewards: None });
    curves.follow(&run);
    assert_eq!(lines(out.path())[..5], written);
    assert!(lines(out.path())[5]["eval_loss"].is_null() && lines(out.path()).len() == 6);
}

#[test]
fn rewards_are_fields_of_their_step_and_evaluation() {
    let out = tempfile::tempdir().unwrap();
    let mut preferring = report();
    let rewards = Rewards { rewards_chosen: 0.5, rewards_rejected: -0.25, rewards_margin: 0.75, rewards_accuracy: 1.0 };
    preferring.steps[1].rewards = Some(rewards);
    preferring.evaluations[0].rewards = Some(rewards);
    preferring.write(out.path()).unwrap();
    assert_eq!(Report::read(out.path()).unwrap(), preferring);
    Curves::new(out.path(), &preferring).follow(&preferring);
    let lines = lines(out.path());
    assert_eq!((&lines[0]["eval_rewards_margin"], &lines[2]["rewards_chosen"]), (&0.75.into(), &0.5.into()));
    assert!(lines[1].get("rewards_chosen").is_none());
}

#[test]
fn the_card_says_what_the_adapter_is() {
    let mut run = report();
    (run.eval_loss_after, run.best_step, run.held_out_digest) = (Some(2.0), Some(2), Some("ef".repeat(32)));
    let card = adapter_card(&run);
    let mut parts = card.splitn(3, "---\n");
    assert_eq!(parts.next(), Some(""));
    // A name is quoted, whatever is in it.
    assert!(
        parts.next().unwrap().starts_with("base_model: \"A <model> & \\\"more\\\"\"\nlibrary_name: peft\n"),
        "{card}"
    );
    for said in [
        "for 3 steps, with encrypted base products",
        &"ab".repeat(32),
        &"cd".repeat(32),
        &"ef".repeat(32),
        "| 3.0000 to 1.0000 |",
        "| 3.1000 to 2.0000 |",
        "best evaluation, whose adapter this is | 2 |",
        "P24, P32",
        "\"learning_rate\": 0.0001",
    ] {
        assert!(card.contains(said), "{said}: {card}");
    }
}

/// The records of an event file, their lengths believed.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = bytes;
    let mut records = Vec::new();
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        records.push(rest[12..12 + length].to_vec());
        rest = &rest[16 + length..];
    }
    records
}

#[test]
fn each_process_has_an_event_file_that_begins_where_the_last_one_counts_no_more() {
    let out = tempfile::tempdir().unwrap();
    let files = || {
        let mut files: Vec<_> =
            std::fs::read_dir(out.path().join(EVENTS_FOLDER)).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    let mut run = report();
    Curves::new(out.path(), &run).follow(&run);
    let first = records(&std::fs::read(&files()[0]).unwrap());
    assert_eq!(first.len(), 2 + 1 + 3, "version, start, the evaluation and three steps");
    assert!(first[0].ends_with(b"brain.Event:2"));
    assert!(
        first[2].windows(9).any(|part| part == b"eval/loss") && !first[3].windows(9).any(|part| part == b"eval/loss")
    );

    let mut next = Curves::new(out.path(), &run);
    next.follow(&run);
    assert_eq!(files().len(), 1, "there is nothing new");
    run.steps.push(StepReport { step: 4, ..run.steps[2].clone() });
    next.follow(&run);
    let second = records(&std::fs::read(&files()[1]).unwrap());
    assert_eq!(second.len(), 3);
    // Field 2, the step, is 4: from there on the earlier file is forgotten.
    assert_eq!(second[1][9..], [2 << 3, 4, 7 << 3 | 2, 2, 1 << 3, 1]);
    remove_events(out.path()).unwrap();
    assert!(files().is_empty());
}

#[test]
fn a_diverged_run_can_still_be_written_and_read() {
    let out = tempfile::tempdir().unwrap();
    let mut diverged = report();
    diverged.steps[2].loss = f64::NAN;
    diverged.evaluations[0].loss = f64::INFINITY;
    diverged.write(out.path()).unwrap();
    let read = Report::read(out.path()).unwrap();
    assert!(read.steps[2].loss.is_nan() && read.evaluations[0].loss.is_nan());
    assert_eq!(read.steps[..2], report().steps[..2]);
}

#[test]
fn a_report_that_cannot_be_written_leaves_the_last_one() {
    let out = tempfile::tempdir().unwrap();
    report().write(out.path()).unwrap();
    // The rename onto a folder fails, and so does the temporary file in a folder that is not there.
    std::fs::remove_file(out.path().join(PLOT_FILE)).unwrap();
    std::fs::create_dir(out.path().join(PLOT_FILE)).unwrap();
    let error = report().write(out.path()).unwrap_err();
    assert!(error.to_string().contains("loss.svg"), "{error}");
    let mut names: Vec<_> = std::fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["loss.svg", "report.json"], "a temporary file was left behind");
    assert_eq!(Report::read(out.path()).unwrap(), report());
    assert!(report().write(&out.path().join("missing")).unwrap_err().to_string().contains("report.json"));
}

#[test]
fn plot_draws_both_curves_and_escapes_its_title() {
    let training: Vec<_> = (1..=20).map(|step| (step, 2.0 - 0.03 * f64::from(step))).collect();
    let svg = loss_svg("<model> & more", &training, &[(0, 2.1), (20, 1.5)]).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("&lt;model&gt; &amp; more") && !svg.contains("<model>"));
    for text in ["optimiser step", "mean loss per token", "training", "evaluation (held out)"] {
        assert!(svg.contains(text), "{text}");
    }
    // One marker a point, and one in the legend for each curve.
    assert_eq!(svg.matches("<circle").count(), 20 + 2 + 2);
}

#[test]
fn plot_leaves_out_what_is_not_a_number() {
    let svg = loss_svg("t", &[(1, f64::NAN), (2, 1.0), (3, f64::INFINITY), (4, f64::NEG_INFINITY)], &[]).unwrap();
    assert_eq!(svg.matches("<circle").count(), 1 + 1);
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
    assert!(!svg.contains("evaluation"));
}

#[test]
fn plot_of_nothing_says_so_and_any_single_point_is_drawn() {
    assert!(loss_svg("t", &[], &[]).unwrap().contains("no step was finished"));
    assert!(loss_svg("t", &[(1, f64::NAN)], &[]).unwrap().contains("no step was finished"));
    for loss in [0.0, 1e-30, -1.0, 2.5, 1e30, f64::MAX, f64::MIN] {
        let svg = loss_svg("t", &[(1, loss)], &[]).unwrap();
        assert_eq!(svg.matches("<circle").count(), 2, "{loss}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{loss}");
    }
    assert_eq!(loss_svg("t", &[(0, f64::MAX), (u32::MAX, f64::MIN)], &[]).unwrap().matches("<circle").count(), 3);
}
