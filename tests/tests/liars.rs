//! Workers that lie, over real sockets: each is named and banned, the run ends with the help of the others, and what it learnt
//! is what it would have learnt without them.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::Value;
use tests::{Liar, Lie, PLAIN, Run};

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
