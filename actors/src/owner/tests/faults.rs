//! Workers that vanish, hang and lie, as the owner's actors see them.

use super::*;

const LINEAR: LinearId = LinearId { layer: 1, group: Group::O };

async fn faulty(workers: usize, settings: FleetSettings) -> (Cluster, mpsc::Receiver<Notice>) {
    let (cluster, _, said) = cluster_with(&vec![1.0; workers], MaskRoom::memory(usize::MAX), settings).await;
    (cluster, said)
}

fn replicated() -> FleetSettings {
    FleetSettings { replicas: 2, ..FleetSettings::default() }
}

/// Whether a product comes back right.
async fn right(cluster: Cluster, tokens: usize) -> Cluster {
    let rows = random(tokens * SHAPE.d_in, 7);
    let expected = plain_product(&rows, &cluster.weights[&LINEAR], Direction::Forward);
    let (cluster, result) = apply(cluster, LINEAR, Direction::Forward, rows, tokens).await;
    let error = relative_error(&result.unwrap(), &expected);
    assert!(error < 0.02, "relative error {error}");
    cluster
}

async fn until(said: &mut mpsc::Receiver<Notice>, wanted: impl Fn(&Notice) -> bool) -> Notice {
    loop {
        let notice = said.recv().await.unwrap();
        if wanted(&notice) {
            return notice;
        }
    }
}

#[test]
fn the_work_of_a_worker_that_vanishes_goes_to_another() {
    actix::System::new().block_on(async {
        let (cluster, _said) = faulty(2, FleetSettings::default()).await;
        let cluster = right(cluster, 2).await;
        let first = (0..2).find(|&number| cluster.workers.bodies_at(number) == 1).unwrap();
        cluster.workers.feel(first, Some(Mood::Down));
        let cluster = right(cluster, 2).await;
        assert_eq!(cluster.workers.bodies_at(1 - first), 1);
        let assigned = cluster.workers.assigned.lock().unwrap()[&name(1 - first)].clone();
        assert_eq!(assigned, 0..LAYERS);
        let mask_products = cluster.actors.clock.read().mask_products;
        assert_eq!(mask_products, 1, "the product of the mask is still good");
        let records = cluster.actors.scheduler.send(AskHealth).await.unwrap();
        let gone = records.iter().find(|record| record.peer == name(first)).unwrap();
        assert!(matches!(gone.presence, Presence::Gone(_)) && gone.products == 1 && gone.health.is_none());
        cluster.actors.stop();
    });
}

#[test]
fn the_only_worker_is_waited_for_and_then_the_run_is_lost() {
    actix::System::new().block_on(async {
        let patience = Duration::from_secs(2);
        let (cluster, mut said) = faulty(1, FleetSettings { patience, ..FleetSettings::default() }).await;
        cluster.workers.feel(0, Some(Mood::Down));
        let workers = Arc::clone(&cluster.workers);
        let back = async {
            until(&mut said, |notice| matches!(notice, Notice::Say(text) if text.contains("no worker is left"))).await;
            workers.feel(0, None);
        };
        let (cluster, ()) = tokio::join!(right(cluster, 2), back);
        cluster.workers.feel(0, Some(Mood::Down));
        let (cluster, result) = apply(cluster, LINEAR, Direction::Forward, random(SHAPE.d_in, 1), 1).await;
        let error = result.unwrap_err();
        assert!(error.is_lost_workers() && error.to_string().contains("owner.patience_seconds"), "{error}");
        cluster.actors.stop();
    });
}

#[test]
fn a_product_that_hangs_is_sent_to_a_replica_too() {
    actix::System::new().block_on(async {
        let (mut cluster, _said) = faulty(2, replicated()).await;
        for _ in 0..10 {
            cluster = right(cluster, 2).await;
        }
        // Whoever is asked first hangs, and nobody afterwards.
        (0..2).for_each(|number| cluster.workers.feel(number, Some(Mood::Hangs)));
        let workers = Arc::clone(&cluster.workers);
        let well = async {
            while workers.hanging.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (0..2).for_each(|number| workers.feel(number, None));
        };
        let (cluster, ()) = tokio::join!(right(cluster, 2), well);
        let sent = cluster.workers.sent.lock().unwrap();
        let calls: HashSet<u64> = sent.iter().rev().take(2).map(|sent| sent.header.call).collect();
        assert_eq!((sent.len(), calls.len()), (13, 2), "a mask, ten bodies, one that hangs, the same encrypted anew");
        drop(sent);
        let peers = cluster.workers.sent_to.lock().unwrap().clone();
        assert_ne!(peers[11], peers[12]);
        cluster.actors.stop();
    });
}

#[test]
fn a_worker_whose_answers_are_none_is_banned_and_its_work_is_done_by_another() {
    actix::System::new().block_on(async {
        let (mut cluster, mut said) = faulty(2, replicated()).await;
        cluster = right(cluster, 2).await;
        cluster.workers.feel(0, Some(Mood::Short));
        let mut products = 0;
        let banned = loop {
            cluster = right(cluster, 2).await;
            products += 1;
            assert!(products < 100, "it is never asked again, or never banned");
            if let Ok(notice @ Notice::Banned { .. }) = said.try_recv() {
                break notice;
            }
        };
        assert!(matches!(banned, Notice::Banned { peer, .. } if peer == name(0)));
        let asked = cluster.workers.bodies_at(0);
        for _ in 0..3 {
            cluster = right(cluster, 2).await;
        }
        assert_eq!(cluster.workers.bodies_at(0), asked, "a banned worker is never asked again");
        cluster.actors.stop();
    });
}

#[test]
fn workers_that_still_load_are_released_when_the_run_ends_before_it_begins() {
    actix::System::new().block_on(async {
        let (cluster, mut said) = unassigned(MaskRoom::memory(usize::MAX));
        (0..2).for_each(|number| cluster.workers.feel(number, Some(Mood::Loads)));
        let assigned = cluster.actors.scheduler.send(assign(&[1.0, 1.0], FleetSettings::default()));
        let released = async {
            until(&mut said, |notice| matches!(notice, Notice::Loading { loaded: 0, .. })).await;
            assert!(!cluster.workers.assigned.lock().unwrap().is_empty());
            cluster.actors.scheduler.send(ReleaseLayers).await.unwrap();
        };
        let (assigned, ()) = tokio::join!(assigned, released);
        assert!(matches!(assigned.unwrap(), Err(scheduler::ScheduleError::NotBegun)));
        assert!(cluster.workers.assigned.lock().unwrap().is_empty());
        cluster.actors.stop();
    });
}

#[test]
fn workers_that_are_too_small_are_named() {
    actix::System::new().block_on(async {
        let (cluster, _said) = unassigned(MaskRoom::memory(usize::MAX));
        let mut small = assign(&[1.0], FleetSettings::default());
        small.candidates[0].offer.room = LAYERS - 1;
        let error = cluster.actors.scheduler.send(small).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("can hold 2 of the model's 3 layers"), "{error}");
        cluster.actors.stop();
    });
}
