//! Calls of few rows, with pads that were made for them.

use super::*;
use crate::owner::pads::FEW_ROWS;

const LINEAR: LinearId = LinearId { layer: 1, group: Group::O };

/// Says that calls of few rows will come, from a thread as an engine does, and waits until pads are there: a block for each layer,
/// and a second one for one of them.
async fn expecting(cluster: Cluster) -> Cluster {
    let told = tokio::task::spawn_blocking(move || {
        cluster.backend.expect_few_rows();
        cluster
    });
    let cluster = told.await.unwrap();
    while cluster.actors.clock.read().pad_blocks < 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    cluster
}

/// Whether a product comes back right; how many with pads there were then.
async fn right(cluster: Cluster, direction: Direction, tokens: usize, seed: u64) -> (Cluster, u64) {
    right_of(LINEAR, cluster, direction, tokens, seed).await
}

async fn right_of(
    linear: LinearId,
    cluster: Cluster,
    direction: Direction,
    tokens: usize,
    seed: u64,
) -> (Cluster, u64) {
    let (inner, outer) = SHAPE.along(direction);
    let mut rows = random(tokens * inner, seed);
    if tokens > 1 {
        rows[inner..2 * inner].fill(0.0);
    }
    let expected = plain_product(&rows, &cluster.weights[&linear], direction);
    let (cluster, result) = apply(cluster, linear, direction, rows, tokens).await;
    let found = result.unwrap();
    let error = relative_error(&found, &expected);
    assert!(error < 0.02, "{tokens} rows: relative error {error}");
    assert!(tokens == 1 || found[outer..2 * outer].iter().all(|&value| value == 0.0), "a zero row gives exact zeros");
    let with_pads = cluster.actors.clock.read().products_with_pads;
    (cluster, with_pads)
}

#[test]
fn forward_calls_of_few_rows_take_pads_and_others_do_not() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let (cluster, with_pads) = right(cluster, Direction::Forward, 1, 1).await;
        assert_eq!((with_pads, cluster.actors.clock.read().pad_blocks), (0, 0), "nobody has asked for pads");
        let mut cluster = expecting(expecting(cluster).await).await;
        let mut expected = 0;
        for (seed, tokens) in [1, 1, 2, FEW_ROWS, FEW_ROWS + 1, 5].into_iter().enumerate() {
            let (back, with_pads) = right(cluster, Direction::Forward, tokens, seed as u64).await;
            expected += u64::from(tokens <= FEW_ROWS);
            assert_eq!(with_pads, expected, "{tokens} rows");
            cluster = back;
        }
        let (cluster, with_pads) = right(cluster, Direction::Backward, 1, 1).await;
        assert_eq!(with_pads, expected);
        // More rows than all blocks have: one may come while the next is being made, and go the way of other calls.
        let mut cluster = cluster;
        for seed in 0..40 {
            for linear in linears() {
                (cluster, _) = right_of(linear, cluster, Direction::Forward, FEW_ROWS, seed).await;
            }
        }
        let times = cluster.actors.clock.read();
        assert!(times.products_with_pads >= expected + 60, "{times:?}");
        assert!(times.pad_blocks > 4 && times.pad_seconds > 0.0, "{times:?}");
        cluster.actors.stop();
    });
}

#[test]
fn every_attempt_takes_another_row() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let mut cluster = expecting(cluster).await;
        for fault in [None, Some(Fault::Unreachable), Some(Fault::BusyLater)] {
            let (back, _) = right(cluster, Direction::Forward, 1, 7).await;
            back.workers.faults.lock().unwrap().push_back(fault);
            let (back, _) = right(back, Direction::Forward, 1, 7).await;
            cluster = back;
        }
        let sent = cluster.workers.sent.lock().unwrap();
        let bodies: Vec<_> = sent.iter().filter(|sent| sent.body.is_some()).collect();
        assert_eq!(bodies.len(), 8, "six products, of which two were sent twice");
        let calls: HashSet<u64> = sent.iter().map(|sent| sent.header.call).collect();
        assert_eq!(calls.len(), sent.len());
        for (at, one) in bodies.iter().enumerate() {
            assert!(bodies[..at].iter().all(|other| other.body != one.body), "no byte of a ciphertext is used twice");
        }
        assert_eq!(cluster.actors.clock.read().products_with_pads, 6);
        drop(sent);
        cluster.actors.stop();
    });
}

#[test]
fn a_liar_is_noticed_and_banned_and_its_answer_is_never_used() {
    actix::System::new().block_on(async {
        let settings = FleetSettings { replicas: 2, ..FleetSettings::default() };
        let (cluster, _, mut said) = cluster_with(&[1.0; 2], MaskRoom::memory(usize::MAX), settings).await;
        let (mut cluster, _) = right(expecting(cluster).await, Direction::Forward, 1, 7).await;
        cluster.workers.feel(0, Some(Mood::Lies));
        let mut products = 0;
        loop {
            (cluster, _) = right(cluster, Direction::Forward, 1 + products % 3, products as u64).await;
            products += 1;
            assert!(products < 100, "it is never asked again, or never banned");
            if let Ok(Notice::Banned { peer, .. }) = said.try_recv() {
                break assert_eq!(peer, name(0));
            }
        }
        assert!(cluster.actors.clock.read().products_with_pads > 0);
        cluster.actors.stop();
    });
}

#[test]
fn an_output_far_above_the_others_is_right() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let mut cluster = expecting(cluster).await;
        // Rows along a column of the matrix: one output is far above all others, as far as one can be, and may wrap.
        for column in 0..SHAPE.d_out {
            let weights = &cluster.weights[&LINEAR];
            let row: Vec<f32> = (0..SHAPE.d_in).map(|i| weights[i * SHAPE.d_out + column]).collect();
            let expected = plain_product(&row, weights, Direction::Forward);
            let (back, result) = apply(cluster, LINEAR, Direction::Forward, row, 1).await;
            let error = relative_error(&result.unwrap(), &expected);
            assert!(error < 0.02, "relative error {error}");
            cluster = back;
        }
        assert!(cluster.actors.clock.read().products_with_pads >= SHAPE.d_out as u64);
        cluster.actors.stop();
    });
}
