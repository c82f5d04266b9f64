//! Micro-batches that go side by side, and the blocks that they share.

use protocol::he::{EncryptError, MaskProduct, MaskProductBuilder, PadRow, ParameterSet, Precision};

use super::*;
use crate::backend::LinearBackend;
use crate::owner::convoy::{Convoy, Place, Seat};
use crate::owner::keys::KeyError;
use crate::owner::pads::Maker;

const FORWARD: Direction = Direction::Forward;

/// Doors for members of so many rows.
fn doors(cluster: &Cluster, rows: &[usize]) -> Vec<Arc<dyn LinearBackend>> {
    cluster.backend.side_by_side(rows).unwrap()
}

/// Asks at a door, from a thread as a trainer does, for the product of so many rows, and says whether it is right.
async fn right(
    cluster: &Cluster,
    door: &Arc<dyn LinearBackend>,
    linear: LinearId,
    direction: Direction,
    tokens: usize,
) {
    let (inner, _) = SHAPE.along(direction);
    let rows = random(tokens * inner, 31 * tokens as u64 + u64::from(linear.layer));
    let expected = plain_product(&rows, &cluster.weights[&linear], direction);
    let door = Arc::clone(door);
    let asked = tokio::task::spawn_blocking(move || door.apply(linear.along(direction), Arc::new(rows.into()), tokens));
    let found = asked.await.unwrap().unwrap().into_rows();
    let error = relative_error(&found, &expected);
    assert!(error < 0.02, "{linear} {direction:?}, {tokens} rows: relative error {error}");
}

fn bodies(cluster: &Cluster) -> Vec<Arc<Planes>> {
    let sent = cluster.workers.sent.lock().unwrap();
    let bodies: Vec<_> = sent.iter().filter_map(|sent| sent.body.clone()).collect();
    for (at, one) in bodies.iter().enumerate() {
        assert!(bodies[..at].iter().all(|other| other != one), "no byte of a ciphertext is used twice");
    }
    bodies
}

#[test]
fn members_share_a_block_and_all_their_products_are_right() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let members = [5, 1, 40];
        let doors = doors(&cluster, &members);
        for linear in linears() {
            for direction in [Direction::Forward, Direction::Backward] {
                // All at once: whoever is first makes it.
                let asked = doors.iter().zip(members);
                let asked = asked.map(|(door, tokens)| right(&cluster, door, linear, direction, tokens));
                futures::future::join_all(asked).await;
            }
        }
        let times = cluster.actors.clock.read();
        assert_eq!((times.products, times.shared_blocks), (18, 6));
        assert_eq!(bodies(&cluster).len(), 18);
        cluster.actors.stop();
    });
}

#[test]
fn who_comes_again_or_with_more_rows_goes_alone() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        let doors = doors(&cluster, &[4, 4]);
        let linear = linears().next().unwrap();
        right(&cluster, &doors[0], linear, FORWARD, 3).await;
        right(&cluster, &doors[0], linear, FORWARD, 3).await;
        right(&cluster, &doors[1], linear, FORWARD, 5).await;
        right(&cluster, &doors[1], linear, FORWARD, 4).await;
        assert_eq!(cluster.actors.clock.read().shared_blocks, 1);
        // Another attempt is encrypted anew; what goes wrong with one member's call is nothing to the other's.
        for fault in [Fault::Unreachable, Fault::BusyLater] {
            let shared = cluster.actors.clock.read().shared_blocks;
            let doors = self::doors(&cluster, &[4, 4]);
            cluster.workers.faults.lock().unwrap().extend([Some(fault), None]);
            right(&cluster, &doors[0], linear, FORWARD, 3).await;
            right(&cluster, &doors[1], linear, FORWARD, 4).await;
            assert_eq!(cluster.actors.clock.read().shared_blocks, shared + 1);
        }
        bodies(&cluster);
        cluster.actors.stop();
    });
}

#[test]
fn a_liar_is_noticed_and_its_answer_is_never_used() {
    actix::System::new().block_on(async {
        let settings = FleetSettings { replicas: 2, ..FleetSettings::default() };
        let (cluster, _, mut said) = cluster_with(&[1.0; 2], MaskRoom::memory(usize::MAX), settings).await;
        let linear = linears().next().unwrap();
        cluster.workers.feel(0, Some(Mood::Lies));
        for round in 0.. {
            assert!(round < 100, "it is never asked again, or never banned");
            let doors = doors(&cluster, &[2, 3]);
            right(&cluster, &doors[0], linear, FORWARD, 2).await;
            right(&cluster, &doors[1], linear, FORWARD, 3).await;
            if let Ok(Notice::Banned { peer, .. }) = said.try_recv() {
                assert_eq!(peer, name(0));
                break;
            }
        }
        cluster.actors.stop();
    });
}

#[test]
fn neighbours_go_together_as_far_as_a_block_has_rows() {
    actix::System::new().block_on(async {
        let (cluster, _) = cluster(&[1.0]).await;
        for without in [&[][..], &[1025], &[2000, 1025]] {
            assert!(cluster.backend.side_by_side(without).is_none(), "{without:?}");
        }
        // More than a block, a block of its own, and three that share one.
        let members = [1025, 600, 600, 300, 124];
        let doors = doors(&cluster, &members);
        assert_eq!(doors.len(), members.len());
        let linear = linears().next().unwrap();
        for (door, blocks) in doors.iter().zip([0, 1, 2, 2, 2]) {
            right(&cluster, door, linear, FORWARD, 2).await;
            assert_eq!(cluster.actors.clock.read().shared_blocks, blocks);
        }
        cluster.actors.stop();
    });
}

/// What blocks of the tests' table are made with.
fn maker() -> Maker {
    let matrices = linears().map(|linear| {
        let (integers, meta) = serve(random(SHAPE.d_in * SHAPE.d_out, u64::from(linear.layer)), SHAPE).unwrap();
        (linear, integers, meta)
    });
    let table = Arc::new(LayerTable::new(matrices, &PrecisionTarget::default()).unwrap());
    let (calls, clock, idle) = (CallNumbers::default(), Arc::default(), Arc::default());
    Maker { seed: MaskSeed::from_bytes([3; 32]), table, calls, clock, idle }
}

fn seats<const N: usize>(members: [usize; N], room: usize) -> [Seat; N] {
    Convoy::seats(members.into(), room).try_into().ok().unwrap()
}

#[test]
fn blocks_take_no_more_than_their_room_and_give_it_back() {
    actix::System::new().block_on(async {
        let maker = maker();
        let [first, second, third] = [0, 1, 2].map(|layer| LinearId { layer, group: Group::O }.along(FORWARD));
        let precision = maker.table.entry(first.linear).unwrap().precision(FORWARD);
        let block = 30 * PadRow::bytes_for(precision, SHAPE.d_in, SHAPE.d_out);
        let [one, other] = seats([10, 20], block);
        let took = |seat: &Seat, product| {
            let (seat, maker) = (seat.clone(), maker.clone());
            async move { seat.take(&maker, product, 10).await.unwrap().is_some() }
        };
        assert!(took(&one, first).await);
        assert!(!took(&one, second).await, "there is room for one");
        assert!(took(&other, first).await);
        assert!(!took(&other, second).await, "whoever was first went alone, and so does the other");
        assert!(took(&other, third).await && took(&one, third).await, "the first one's room is free again");
        let [one, other] = seats([10, 20], block - 1);
        assert!(!took(&one, first).await && !took(&other, first).await);
        let [alone] = seats([30], block);
        assert!(took(&alone, first).await);
        // More than a block has.
        let [one, _] = seats([1000, 25], usize::MAX);
        assert!(!took(&one, first).await);
        assert_eq!(maker.clock.read().shared_blocks, 3);
    });
}

/// A mask product of one column of another set than the table's.
fn unfit() -> Arc<MaskProduct> {
    let precision = Precision::standard(ParameterSet::P32);
    let mut masks = MaskProductBuilder::new(precision, 1).unwrap();
    let rows = Planes::zeros(precision.mask_limbs.into(), ParameterSet::P32.mask_rows(), 1);
    masks.tile(&ProductTile { first_column: 0, rows }).unwrap();
    #[allow(clippy::disallowed_methods)]
    let masks = masks.finish().unwrap().unchecked();
    Arc::new(masks)
}

#[test]
fn a_half_that_cannot_be_made_is_an_error_to_one_and_lost_to_the_others() {
    actix::System::new().block_on(async {
        let (maker, product) = (maker(), linears().next().unwrap().along(FORWARD));
        let [one, other] = seats([10, 20], usize::MAX);
        let Place { block, .. } = one.take(&maker, product, 10).await.unwrap().unwrap();
        let refused = one.answer(&maker, product, Arc::clone(&block), Some(unfit())).await.map(|_| ());
        assert!(matches!(refused, Err(KeyError::Encrypt(EncryptError::Precision { .. }))), "{refused:?}");
        assert!(other.answer(&maker, product, block, Some(unfit())).await.unwrap().is_none());
    });
}
