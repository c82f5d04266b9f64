//! The wire's bytes: golden ones, every message there and back, and bytes that nobody meant.
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use proptest::prelude::*;

use super::frame::MOST_MACS_PER_SECOND;
use super::messages::*;
use super::*;
use crate::he::{ParameterSet, Planes, Precision, ProductTile};
use crate::ids::{Direction, Group, LinearId, ModelDigest};

const DIGEST: ModelDigest = ModelDigest([0xd5; 32]);

fn header() -> ProductHeader {
    ProductHeader {
        version: PROTOCOL_VERSION,
        call: 300,
        product: LinearId { layer: 7, group: Group::GateUp }.along(Direction::Backward),
        precision: Precision { set: ParameterSet::P32, body_bits: 24, mask_limbs: 3, output_bits: 16 },
        operand: Operand::Body { tokens: 70_000 },
    }
}

fn mask_header() -> ProductHeader {
    ProductHeader { operand: Operand::Masks { seed: [0x5e; 32] }, ..header() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Asserts the frame of a message, without the version that every frame begins with.
fn golden<M: Message + PartialEq + std::fmt::Debug>(message: M, length_and_payload: &str) {
    let frame = encode(&message).unwrap();
    assert_eq!(hex(&frame), format!("05000000{}", length_and_payload.replace(' ', "")), "{message:?}");
    let (prefix, payload) = frame.split_at(PREFIX_BYTES);
    assert_eq!(payload_length(prefix.try_into().unwrap()).unwrap(), payload.len());
    assert_eq!(decode::<M>(payload).unwrap(), message);
}

#[test]
fn golden_bytes() {
    let (d5, seed) = ("d5".repeat(32), "5e".repeat(32));
    golden(ControlRequest::Offer { version: 3 }, "02000000 00 03");
    golden(ControlRequest::Assign { model: DIGEST, layers: 3..400 }, &format!("25000000 01 {d5} 03 fb9001"));
    golden(ControlRequest::Health, "01000000 02");
    golden(ControlRequest::Release, "01000000 03");

    let device = DeviceOffer { name: "cpu".into(), memory_bytes: 1 << 33, macs_per_second: 1.0 };
    let offer = WorkerOffer { version: 1, model: DIGEST, layers: 30, room: 20, devices: vec![device] };
    let bytes = format!("3a000000 00 01 {d5} 1e 14 01 03637075 fd0000000002000000 000000000000f03f");
    golden(ControlReply::Offer(offer), &bytes);
    golden(ControlReply::Assigned, "01000000 01");
    let health = WorkerHealth {
        layers: 0..10,
        loaded: 4,
        failure: Some("no".into()),
        calls: 251,
        busy_seconds: 0.5,
        peak_rss_bytes: 250,
    };
    golden(ControlReply::Health(health), "14000000 02 00 0a 04 01 026e6f fbfb00 000000000000e03f fa");
    golden(ControlReply::Released, "01000000 03");
    golden(ControlReply::Refused(Refusal::Version(2)), "03000000 04 00 02");
    golden(ControlReply::Refused(Refusal::Model(DIGEST)), &format!("22000000 04 01 {d5}"));
    golden(ControlReply::Refused(Refusal::Layers("7".into())), "04000000 04 02 0137");
    golden(ControlReply::Refused(Refusal::Capacity("7".into())), "04000000 04 03 0137");
    golden(ControlReply::Refused(Refusal::Malformed("7".into())), "04000000 04 04 0137");
    golden(ControlReply::Refused(Refusal::Failed("7".into())), "04000000 04 05 0137");

    golden(header(), "11000000 05 fb2c01 07 02 01 01 18 03 10 01 fc70110100");
    golden(mask_header(), &format!("2c000000 05 fb2c01 07 02 01 01 18 03 10 00 {seed}"));
    let tile = TileHeader { call: 300, first_column: 64, columns: 32 };
    golden(ProductReply::Tile(tile), "06000000 00 fb2c01 40 20");
    golden(ProductReply::Refused(Refusal::Version(3)), "03000000 01 00 03");
}

#[test]
fn a_foreign_version_or_a_length_beyond_the_limit_is_refused_by_its_prefix() {
    assert_eq!(payload_length([1, 0, 0, 0, 1, 0, 0, 0]), Err(FrameError::Version { theirs: 1 }));
    assert_eq!(payload_length([5, 0, 0, 0, 0, 64, 0, 0]), Ok(MAX_PAYLOAD_BYTES));
    assert_eq!(payload_length([5, 0, 0, 0, 1, 64, 0, 0]), Err(FrameError::TooLong { length: MAX_PAYLOAD_BYTES + 1 }));
    assert_eq!(payload_length([5, 0, 0, 0, 255, 255, 255, 255]), Err(FrameError::TooLong { length: 0xffff_ffff }));
    assert!(matches!(decode::<ControlReply>(&vec![0; MAX_PAYLOAD_BYTES + 1]), Err(FrameError::TooLong { .. })));
    let long = ControlReply::Refused(Refusal::Failed("x".repeat(MAX_PAYLOAD_BYTES)));
    assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
}

#[test]
fn lengths_inside_of_a_payload_are_not_believed() {
    // A refusal whose text claims 2^62 bytes, and an offer that claims 2^40 devices.
    let mut text = vec![4, 5, 253];
    text.extend((1u64 << 62).to_le_bytes());
    assert!(matches!(decode::<ControlReply>(&text), Err(FrameError::Malformed { .. })));
    let mut devices = vec![0, 1];
    devices.extend([0; 32]);
    devices.extend([30, 20, 253]);
    devices.extend((1u64 << 40).to_le_bytes());
    assert!(matches!(decode::<ControlReply>(&devices), Err(FrameError::Malformed { .. })));
}

#[test]
fn trailing_bytes_and_contradictions_are_refused() {
    let mut payload = encode(&ControlRequest::Health).unwrap().split_off(PREFIX_BYTES);
    payload.push(0);
    assert!(matches!(decode::<ControlRequest>(&payload), Err(FrameError::Trailing { count: 1, .. })));

    let refused = |result: Result<Vec<u8>, FrameError>| matches!(result, Err(FrameError::Contradiction { .. }));
    assert!(refused(encode(&ControlRequest::Assign { model: DIGEST, layers: 4..4 })));
    assert!(refused(encode(&ProductHeader { operand: Operand::Body { tokens: 0 }, ..header() })));
    let precision = Precision { set: ParameterSet::P24, ..header().precision };
    assert!(encode(&ProductHeader { precision, ..header() }).is_ok());
    for precision in [
        Precision { body_bits: 26, ..precision },
        Precision { body_bits: 23, ..precision },
        Precision { mask_limbs: 4, ..precision },
        Precision { mask_limbs: 0, ..precision },
        Precision { output_bits: 0, ..precision },
        Precision { output_bits: 6, ..precision },
        Precision { output_bits: 11, ..precision },
        Precision { body_bits: 14, output_bits: 16, ..precision },
    ] {
        assert!(refused(encode(&ProductHeader { precision, ..header() })), "{precision:?}");
    }
    assert!(refused(encode(&ProductReply::Tile(TileHeader { call: 1, first_column: 0, columns: 0 }))));
    for speed in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
        assert!(refused(encode(&offer_of("", speed))), "{speed}");
    }
    // The same through decoding: `Assign` of layers 9..3.
    let mut backwards = vec![1];
    backwards.extend([0; 32]);
    backwards.extend([9, 3]);
    assert!(matches!(decode::<ControlRequest>(&backwards), Err(FrameError::Contradiction { .. })));
}

fn offer_of(name: &str, macs_per_second: f64) -> ControlReply {
    let device = DeviceOffer { name: name.into(), memory_bytes: 0, macs_per_second };
    ControlReply::Offer(WorkerOffer { version: 1, model: DIGEST, layers: 1, room: 1, devices: vec![device] })
}

/// What is decoded of what a peer sends.
fn received<M: Message>(message: &M) -> M {
    decode(&encode(message).unwrap()[PREFIX_BYTES..]).unwrap()
}

#[test]
fn what_a_peer_says_of_itself_is_harmless_when_it_is_decoded() {
    let (evil, shown) = ("\u{1b}[2Jall is well\n", "\u{fffd}[2Jall is well\u{fffd}");
    assert_eq!(received(&offer_of(evil, 1e300)), offer_of(shown, MOST_MACS_PER_SECOND));
    assert_eq!(received(&offer_of("gpu", 2e13)), offer_of("gpu", 2e13));
    let health = |failure: &str| {
        ControlReply::Health(WorkerHealth {
            layers: 0..1,
            loaded: 0,
            failure: Some(failure.into()),
            calls: 0,
            busy_seconds: 0.0,
            peak_rss_bytes: 0,
        })
    };
    assert_eq!(received(&health(evil)), health(shown));
    for refusal in [Refusal::Layers, Refusal::Capacity, Refusal::Malformed, Refusal::Failed, Refusal::Busy] {
        let (said, heard) = (refusal(evil.into()), refusal(shown.into()));
        assert_eq!(received(&ControlReply::Refused(said.clone())), ControlReply::Refused(heard.clone()));
        assert_eq!(received(&ProductReply::Refused(said)), ProductReply::Refused(heard));
    }
    let long = ControlReply::Refused(Refusal::Failed("x".repeat(10_000)));
    assert_eq!(received(&long), ControlReply::Refused(Refusal::Failed("x".repeat(300))));
}

#[test]
fn an_answer_in_crumbs_is_refused() {
    let header = ProductHeader { operand: Operand::Body { tokens: 5 }, ..header() };
    let tile = |first_column, columns| TileHeader { call: 300, first_column, columns };
    let outer = 1000;
    let mut ledger = TileLedger::new(&header, outer, 1 << 20);
    // Tiles of 64 columns, and so many more as a worker may need.
    let most = 16 + 16;
    for column in 0..most {
        ledger.accept(&tile(column, 1)).unwrap();
    }
    let refused = ledger.accept(&tile(most, 1));
    assert_eq!(refused, Err(TileError::TooMany { limit: most as usize, outer }));
    let mut honest = TileLedger::new(&header, outer, 1 << 20);
    for first in (0..outer as u32).step_by(64) {
        honest.accept(&tile(first, 64.min(1000 - first))).unwrap();
    }
    assert_eq!(honest.left(), 0);
}

#[test]
fn shapes_are_checked_before_anything_is_allocated() {
    let limit = 1 << 30;
    assert_eq!(PlanesShape::new(24, 10, 20, 600).unwrap().bytes(), 600);
    assert!(PlanesShape::new(24, 10, 20, 599).is_err());
    assert!(PlanesShape::new(24, 0, 20, limit).is_err());
    assert!(PlanesShape::new(24, 20, 0, limit).is_err());
    // A byte for each of 70 columns, and three groups of 32 in 16 and 8 bytes.
    assert_eq!(PlanesShape::new(12, 10, 70, limit).unwrap().bytes(), 10 * (70 + 3 * 16));
    assert_eq!(PlanesShape::new(22, 10, 70, limit).unwrap().bytes(), 10 * (2 * 70 + 3 * 24));
    for bits in [0, 2, 6, 7, 9, 23] {
        assert!(PlanesShape::new(bits, 10, 20, limit).is_err(), "no value has {bits} bits");
    }
    for bits in [8, 22, 24, 48, u32::MAX - 1] {
        for (rows, columns) in [(usize::MAX, 2), (2, usize::MAX), (usize::MAX / 3, 3), (3, usize::MAX / 3)] {
            assert!(PlanesShape::new(bits, rows, columns, limit).is_err());
            assert!(bits == 8 || PlanesShape::new(bits, rows, columns, usize::MAX).is_err());
        }
    }
    let huge = ProductHeader { operand: Operand::Body { tokens: u32::MAX }, ..header() };
    assert!(PlanesShape::of_body(&huge, 8192, limit).is_err());
    let body = PlanesShape::of_body(&header(), 10, limit).unwrap().unwrap();
    assert!(body.fits(&Planes::zeros(3, 70_000, 10)) && !body.fits(&Planes::zeros(3, 10, 70_000)));
    let packed = Precision { body_bits: 20, ..header().precision };
    let packed = ProductHeader { precision: packed, operand: Operand::Body { tokens: 7 }, ..header() };
    let shape = PlanesShape::of_body(&packed, 10, limit).unwrap().unwrap();
    assert_eq!((shape.bytes(), shape.allocate().bytes().len()), (7 * (2 * 10 + 16), shape.bytes()));
    assert!(shape.fits(&Planes::zeros_of_bits(20, 7, 10)) && !shape.fits(&Planes::zeros(3, 7, 10)));
    assert_eq!(PlanesShape::of_body(&mask_header(), usize::MAX, limit), Ok(None), "nothing follows a mask's header");
}

#[test]
fn a_ledger_takes_every_column_once() {
    let header = ProductHeader { operand: Operand::Body { tokens: 5 }, ..header() };
    let tile = |first_column, columns| TileHeader { call: 300, first_column, columns };
    let mut ledger = TileLedger::new(&header, 100, 1 << 20);
    let shape = ledger.accept(&tile(40, 20)).unwrap();
    assert_eq!((shape.planes.bytes(), ledger.left()), (2 * 5 * 20, 80));
    let other = TileHeader { call: 301, ..tile(0, 10) };
    assert!(matches!(ledger.accept(&other), Err(TileError::OtherCall { ours: 300, theirs: 301 })));
    assert!(matches!(ledger.accept(&tile(90, 11)), Err(TileError::OutOfRange { .. })));
    assert!(matches!(ledger.accept(&tile(u32::MAX, u32::MAX)), Err(TileError::OutOfRange { .. })));
    assert!(matches!(ledger.accept(&tile(10, 0)), Err(TileError::OutOfRange { .. })));
    assert!(matches!(ledger.accept(&tile(0, 41)), Err(TileError::Twice(40))));
    assert_eq!(ledger.left(), 80);
    ledger.accept(&tile(0, 40)).unwrap();
    ledger.accept(&tile(60, 40)).unwrap();
    assert_eq!(ledger.left(), 0);
    let mut small = TileLedger::new(&header, 100, 2 * 5 * 20 - 1);
    assert!(matches!(small.accept(&tile(0, 20)), Err(TileError::TooLarge(_))));
    let mut masks = TileLedger::new(&mask_header(), 100, 1 << 20);
    assert_eq!(masks.accept(&tile(0, 20)).unwrap().planes.bytes(), 3 * 1280 * 20);
}

#[test]
fn a_worker_announces_only_tiles_of_the_products_shape() {
    let header = ProductHeader { operand: Operand::Body { tokens: 5 }, ..header() };
    let mut ledger = TileLedger::new(&header, 100, 1 << 20);
    let good = ProductTile { first_column: 8, rows: Planes::zeros(2, 5, 8) };
    assert_eq!(ledger.announce(&good).unwrap(), TileHeader { call: 300, first_column: 8, columns: 8 });
    // A tile that is entered is not taken back: each tries columns of its own.
    let others = [Planes::zeros(3, 5, 8), Planes::zeros_of_bits(14, 5, 8), Planes::zeros_of_bits(10, 5, 8)];
    for (first_column, rows) in [16, 24, 32].into_iter().zip(others) {
        assert_eq!(ledger.announce(&ProductTile { first_column, rows }), Err(TileError::OtherShape(first_column)));
    }
}

fn text() -> impl Strategy<Value = String> {
    // What is not printable does not come back as it was said.
    "[^\\p{C}\\p{Z}]{0,200}"
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<u32>().prop_map(Refusal::Version),
        any::<[u8; 32]>().prop_map(|digest| Refusal::Model(ModelDigest(digest))),
        text().prop_map(Refusal::Layers),
        text().prop_map(Refusal::Capacity),
        text().prop_map(Refusal::Malformed),
        text().prop_map(Refusal::Failed),
    ]
}

fn layers() -> impl Strategy<Value = Range<u16>> {
    (0..u16::MAX).prop_flat_map(|start| (Just(start), start + 1..=u16::MAX)).prop_map(|(start, end)| start..end)
}

fn request() -> impl Strategy<Value = ControlRequest> {
    prop_oneof![
        any::<u32>().prop_map(|version| ControlRequest::Offer { version }),
        (any::<[u8; 32]>(), layers())
            .prop_map(|(digest, layers)| ControlRequest::Assign { model: ModelDigest(digest), layers }),
        Just(ControlRequest::Health),
        Just(ControlRequest::Release),
    ]
}

fn reply() -> impl Strategy<Value = ControlReply> {
    let device = (text(), any::<u64>(), f64::MIN_POSITIVE..1e16)
        .prop_map(|(name, memory_bytes, macs_per_second)| DeviceOffer { name, memory_bytes, macs_per_second });
    let offer = (any::<u32>(), any::<[u8; 32]>(), any::<(u16, u16)>(), prop::collection::vec(device, 0..8)).prop_map(
        |(version, digest, (layers, room), devices)| WorkerOffer {
            version,
            model: ModelDigest(digest),
            layers,
            room,
            devices,
        },
    );
    let health = (layers(), prop::option::of(text()), any::<u64>(), 0.0..1e9, any::<u64>()).prop_map(
        |(layers, failure, calls, busy_seconds, peak_rss_bytes)| {
            let loaded = layers.len() as u16 / 2;
            WorkerHealth { layers, loaded, failure, calls, busy_seconds, peak_rss_bytes }
        },
    );
    prop_oneof![
        offer.prop_map(ControlReply::Offer),
        health.prop_map(ControlReply::Health),
        refusal().prop_map(ControlReply::Refused),
        Just(ControlReply::Assigned),
        Just(ControlReply::Released),
    ]
}

fn product_header() -> impl Strategy<Value = ProductHeader> {
    let precision = prop::sample::select(ParameterSet::ALL.into_iter().flat_map(Precision::all).collect::<Vec<_>>());
    let operand = prop_oneof![
        any::<[u8; 32]>().prop_map(|seed| Operand::Masks { seed }),
        (1..=u32::MAX).prop_map(|tokens| Operand::Body { tokens }),
    ];
    let linear = (any::<u16>(), 0usize..5)
        .prop_map(|(layer, group)| LinearId { layer, group: Group::ALL.get(group).copied().unwrap_or(Group::Head) });
    (any::<(u32, u64, bool)>(), linear, precision, operand).prop_map(
        |((version, call, forward), linear, precision, operand)| {
            let direction = if forward { Direction::Forward } else { Direction::Backward };
            ProductHeader { version, call, product: linear.along(direction), precision, operand }
        },
    )
}

fn product_reply() -> impl Strategy<Value = ProductReply> {
    prop_oneof![
        (any::<(u64, u32)>(), 1..u32::MAX).prop_map(|((call, first_column), columns)| ProductReply::Tile(TileHeader {
            call,
            first_column,
            columns
        })),
        refusal().prop_map(ProductReply::Refused),
    ]
}

/// There and back; cut anywhere, the bytes are refused; with bytes changed, they are refused or are another
/// message that may be sent.
fn survives<M: Message + PartialEq + std::fmt::Debug>(
    message: &M,
    cut: prop::sample::Index,
    changes: &[(prop::sample::Index, u8)],
) -> Result<(), TestCaseError> {
    let frame = encode(message).unwrap();
    let (prefix, payload) = frame.split_at(PREFIX_BYTES);
    prop_assert_eq!(payload_length(prefix.try_into().unwrap()), Ok(payload.len()));
    prop_assert_eq!(&decode::<M>(payload).unwrap(), message);

    prop_assert!(decode::<M>(&payload[..cut.index(payload.len())]).is_err());
    let mut mutated = payload.to_vec();
    for (at, byte) in changes {
        mutated[at.index(payload.len())] = *byte;
    }
    if let Ok(other) = decode::<M>(&mutated) {
        prop_assert!(encode(&other).is_ok());
    }
    Ok(())
}

fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..6)
}

proptest! {
    #[test]
    fn requests_survive(message in request(), cut: prop::sample::Index, changes in changes()) {
        survives(&message, cut, &changes)?;
    }

    #[test]
    fn replies_survive(message in reply(), cut: prop::sample::Index, changes in changes()) {
        survives(&message, cut, &changes)?;
    }

    #[test]
    fn product_headers_survive(message in product_header(), cut: prop::sample::Index, changes in changes()) {
        survives(&message, cut, &changes)?;
    }

    #[test]
    fn product_replies_survive(message in product_reply(), cut: prop::sample::Index, changes in changes()) {
        survives(&message, cut, &changes)?;
    }

    #[test]
    fn random_bytes_are_refused_or_valid(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode::<ControlRequest>(&bytes).is_err_or_encodes());
        prop_assert!(decode::<ControlReply>(&bytes).is_err_or_encodes());
        prop_assert!(decode::<ProductHeader>(&bytes).is_err_or_encodes());
        prop_assert!(decode::<ProductReply>(&bytes).is_err_or_encodes());
    }

    /// However a peer cuts the columns, the ledger agrees with a plain set of columns.
    #[test]
    fn ledgers_agree_with_a_set(tiles in prop::collection::vec((0u32..70, 0u32..70), 0..30), outer in 1usize..64) {
        let header = ProductHeader { operand: Operand::Body { tokens: 2 }, ..header() };
        let mut ledger = TileLedger::new(&header, outer, 1 << 30);
        let mut set = std::collections::BTreeSet::new();
        for (first_column, columns) in tiles {
            let range = first_column..first_column + columns;
            let fits = columns > 0 && range.end as usize <= outer && range.clone().all(|column| !set.contains(&column));
            prop_assert_eq!(ledger.accept(&TileHeader { call: 300, first_column, columns }).is_ok(), fits);
            if fits {
                set.extend(range);
            }
            prop_assert_eq!(ledger.left(), outer - set.len());
        }
    }
}

trait ErrOrEncodes {
    fn is_err_or_encodes(&self) -> bool;
}

impl<M: Message> ErrOrEncodes for Result<M, FrameError> {
    fn is_err_or_encodes(&self) -> bool {
        self.as_ref().map_or(true, |message| encode(message).is_ok())
    }
}
