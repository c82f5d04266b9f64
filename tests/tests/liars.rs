//! Workers that lie, over real sockets: each is named and banned, the run ends with the help of the others, and what it learnt
//! is what it would have learnt without them.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use tests::{LAYERS, Liar, Lie, PLAIN, Run, SETTINGS};

#[test]
fn every_lie_is_caught_and_what_is_learnt_is_what_it_would_have_been() {
    let run = Run::new();
    let (_worker, address) = run.worker(1, &[]);
    run.train("plain", &PLAIN);
    for lie in Lie::WRONG {
        // It begins to lie in mid-run: by then its products of masks are in use.
        let liar = Liar::start(&run.model, lie, 40);
        let out = format!("{lie:?}");
        let said = run.owner_over(&[&address, &liar.address], &out, &[]).finish().succeeded().stderr;
        let report = run.report(&out);
        let of_liar = report["workers"].as_array().unwrap().iter().find(|worker| worker["peer_id"] == *liar.peer);
        let state = of_liar.unwrap()["state"].as_str().unwrap();
        assert!(state.starts_with("banned: "), "{lie:?}: {state}");
        assert!(said.contains(&format!("{} is banned", liar.peer)), "{lie:?} is named: {said}");
        run.assert_follows(&out, "plain");
    }
    let bans = std::fs::read_to_string(run.home().join("velum").join("bans.json")).unwrap();
    let bans: Value = serde_json::from_str(&bans).unwrap();
    assert_eq!(bans.as_array().unwrap().len(), Lie::WRONG.len(), "every ban is kept: {bans}");
}

/// Products that workers answered in time, each of which the report counts for one of them.
fn answered(report: &Value) -> u64 {
    report["workers"].as_array().unwrap().iter().map(|worker| worker["calls"].as_u64().unwrap()).sum()
}

#[test]
fn what_comes_after_another_has_answered_is_neither_used_nor_punished() {
    // Calls are heard to their end, whoever answers first; a run of few rows may end before that.
    for (rows, heard) in [(1024, true), (16, false)] {
        // So many products at a time that both workers are asked, whoever is faster.
        let settings =
            SETTINGS.replace("[owner]", "[owner]\nreplicas = 2").replace("accumulation = 2", "accumulation = 4");
        let settings = settings.replace("pad_to = 16", &format!("pad_to = {rows}"));
        let run = Run::with(&settings.replace("in_flight = 2", "in_flight = 4"), LAYERS);
        run.train("plain", &PLAIN);
        let (_worker, address) = run.worker(1, &[]);
        run.owner_over(&[&address], "peace", &[]).finish().succeeded();

        let liar = Liar::start(&run.model, Lie::Late, usize::MAX);
        let mut owner = run.owner_over(&[&address, &liar.address], "late", &[]);
        // By then it is known of every kind of product how long it takes.
        owner.expect_note("step 1/");
        liar.begin();
        let twice = owner.expect_log("a slow product is sent twice");
        assert!(twice.contains(&format!("slow={}", liar.peer)), "{twice}");
        // A step is done when all of its products are answered, this one by the other worker.
        owner.expect_note("step ");
        let held = liar.lies();
        assert!((1..12).contains(&held), "{held} answers are held back: who is late is asked again and again");
        liar.release();
        owner.finish().succeeded();
        if heard {
            assert_eq!(liar.late(), liar.lies(), "the owner heard what was held back");
        }

        run.assert_follows("late", "plain");
        let report = run.report("late");
        assert_eq!(answered(&report), answered(&run.report("peace")), "a product was answered twice, or never");
        let states: Vec<_> = report["workers"].as_array().unwrap().iter().map(|worker| &worker["state"]).collect();
        assert_eq!(states, ["serving", "serving"]);
    }
}
