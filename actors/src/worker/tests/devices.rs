//! Workers with several devices.

use std::sync::atomic::Ordering;

use super::*;
use crate::matmul::kernels;
use crate::testing::{Switches, TestDevice};

/// Devices of these speeds and memories of their own, each with another of this machine's kernels as far as they go.
fn devices(which: &[(&'static str, f64, Option<u64>)]) -> (Vec<Arc<dyn Device>>, Vec<Arc<Switches>>) {
    let kernels = kernels();
    let device = |(number, &(name, speed, memory)): (usize, &(&'static str, f64, Option<u64>))| {
        TestDevice::new(name, Arc::clone(&kernels[number % kernels.len()]), speed, memory)
    };
    let devices: Vec<TestDevice> = which.iter().enumerate().map(device).collect();
    let switches = devices.iter().map(|device| Arc::clone(&device.switches)).collect();
    (devices.into_iter().map(|device| Arc::new(device) as _).collect(), switches)
}

fn products(switches: &[Arc<Switches>]) -> Vec<u64> {
    switches.iter().map(|switches| switches.products.load(Ordering::SeqCst)).collect()
}

fn held(switches: &[Arc<Switches>]) -> Vec<u64> {
    switches.iter().map(|switches| switches.held_bytes.load(Ordering::SeqCst)).collect()
}

async fn offer(net: &Net) -> protocol::wire::messages::WorkerOffer {
    match net.control(ControlRequest::Offer { version: PROTOCOL_VERSION }).await.unwrap() {
        ControlReply::Offer(offer) => offer,
        other => panic!("{other:?}"),
    }
}

/// A forward and a backward product of a wide matrix and of a narrow one, of a body and of a mask.
fn requests(layer: u16, set: ParameterSet) -> Vec<ProductRequest> {
    let mut requests = Vec::new();
    for (group, tokens) in [(Group::GateUp, 7), (Group::Down, 2)] {
        for direction in [Direction::Forward, Direction::Backward] {
            let body = request(LinearId { layer, group }, direction, Precision::standard(set), tokens);
            requests.extend([of_mask(&body), body]);
        }
    }
    requests
}

#[actix::test]
async fn layers_lie_on_several_devices_and_each_serves_its_own() {
    // The GPU is fast, but has room for one layer.
    let (devices, switches) = devices(&[("gpu", 9.0, Some(2 * layer_bytes() - 1)), ("cpu", 1.0, None)]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Layers, limits()).await;
    let first = offer(&net).await;
    let listed: Vec<_> = first
        .devices
        .iter()
        .map(|device| (device.name.as_str(), device.memory_bytes, device.macs_per_second))
        .collect();
    assert_eq!(listed, [("gpu", 2 * layer_bytes() - 1, 9.0), ("cpu", 3 * layer_bytes(), 1.0)]);
    assert_eq!(first.room, 4);
    net.loaded(1..4).await;
    assert_eq!(held(&switches), [layer_bytes(), 2 * layer_bytes()]);
    assert_eq!(offer(&net).await.room, 1);
    let mut calls = 0;
    for layer in 1..4 {
        for request in requests(layer, ParameterSet::P24) {
            let whole = expected(&request);
            assert_covers(collect(net.product(request).await.unwrap()).await, &whole);
            calls += 1;
        }
    }
    assert_eq!(products(&switches), [8, 16]);
    let health = net.until(|health| health.calls == calls).await;
    assert!(health.busy_seconds > 0.0);
    assert_eq!(net.control(ControlRequest::Release).await.unwrap(), ControlReply::Released);
    net.worker.stop().await;
    assert_eq!(held(&switches), [0, 0]);
}

#[actix::test]
async fn a_cut_matrix_answers_as_a_whole_one() {
    for which in [&[("a", 3.0, None), ("b", 2.0, None)][..], &[("a", 1.0, None), ("b", 1.0, Some(1 << 30))]] {
        let (devices, switches) = devices(which);
        let net = start_on(Arc::<Synthetic>::default(), devices, Split::Columns, limits()).await;
        net.loaded(2..3).await;
        let mut calls = 0;
        for set in ParameterSet::ALL {
            for request in requests(2, set) {
                let whole = expected(&request);
                assert_covers(collect(net.product(request).await.unwrap()).await, &whole);
                calls += 1;
            }
        }
        // The narrow matrix stays whole, on the fastest device.
        assert_eq!(products(&switches), [24, 12]);
        net.until(|health| health.calls == calls).await;
        net.worker.stop().await;
    }
}

#[actix::test]
async fn layers_that_do_not_fit_a_device_are_refused_before_they_are_loaded() {
    let need = layer_bytes();
    let (devices, switches) = devices(&[("small", 1.0, Some(need)), ("none", 1.0, Some(need - 1))]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Layers, limits()).await;
    let refused = refusal(net.assign(0..2).await).to_string();
    let expected = format!(
        "1 of these 2 layers fit: a layer takes {need} bytes of small, which has {need} free, {need} bytes of none, \
         which has {} free",
        need - 1
    );
    assert!(refused.contains(&expected), "{refused}");
    assert_eq!((net.health().await.layers, held(&switches)), (0..0, vec![0, 0]));
    net.loaded(3..4).await;
    assert_eq!(held(&switches), [need, 0]);
}

#[actix::test]
async fn layers_come_to_lie_elsewhere_when_an_owner_asks_for_others() {
    let (devices, switches) = devices(&[("a", 1.0, None), ("b", 1.0, None)]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Layers, limits()).await;
    net.loaded(0..2).await;
    assert_eq!(held(&switches), [layer_bytes(), layer_bytes()]);
    net.loaded(1..2).await;
    assert_eq!(held(&switches), [layer_bytes(), 0], "layer 1 is the first now");
    let request = simple_request();
    let whole = expected(&request);
    assert_covers(collect(net.product(request).await.unwrap()).await, &whole);
    assert_eq!(products(&switches), [1, 0]);
}

#[actix::test]
async fn a_device_that_cannot_hold_a_matrix_fails_its_layer() {
    let (devices, switches) = devices(&[("a", 1.0, None), ("b", 1.0, None)]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Layers, limits()).await;
    switches[1].refuse_to_hold.store(true, Ordering::SeqCst);
    net.assign(0..2).await.unwrap();
    let health = net.until(|health| health.loaded == 1 && health.failure.is_some()).await;
    let why = health.failure.unwrap();
    assert!(why.contains("layer 1") && why.contains("b is out of memory: 1234 bytes are needed, 56 are free"), "{why}");
    // The layer's other matrices are tried, too; until then they are said to be loading.
    in_time(async {
        while !matches!(net.refusal(simple_request().header).await, Refusal::Failed(_)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    switches[1].refuse_to_hold.store(false, Ordering::SeqCst);
    net.loaded(0..2).await;
    assert_eq!(net.health().await.failure, None);
}

#[actix::test]
async fn a_product_that_a_device_has_no_memory_for_is_refused_and_the_next_is_served() {
    let (devices, switches) = devices(&[("a", 1.0, None), ("b", 1.0, None)]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Columns, limits()).await;
    net.loaded(0..1).await;
    for request in &requests(0, ParameterSet::P24)[..4] {
        switches[1].refuse_to_multiply.store(true, Ordering::SeqCst);
        let mut stream = net.product(request.clone()).await.unwrap();
        let refused = loop {
            match in_time(stream.recv()).await.expect("a refusal before the end") {
                Ok(_) => {}
                refused => break refusal(refused),
            }
        };
        assert!(matches!(&refused, Refusal::Busy(why) if why.contains("b is out of memory")), "{refused}");
        assert!(stream.recv().await.is_none(), "nothing comes after a refusal");
        switches[1].refuse_to_multiply.store(false, Ordering::SeqCst);
        assert_covers(collect(net.product(request.clone()).await.unwrap()).await, &expected(request));
    }
}

#[actix::test]
async fn a_stopped_worker_gives_cut_products_that_it_began() {
    let (devices, _) = devices(&[("a", 1.0, None), ("b", 1.0, None)]);
    let net = start_on(Arc::<Synthetic>::default(), devices, Split::Columns, limits()).await;
    net.loaded(0..1).await;
    let mut begun = Vec::new();
    for request in requests(0, ParameterSet::P24) {
        begun.push((expected(&request), net.product(request).await.unwrap()));
    }
    net.worker.stop().await;
    for (whole, stream) in begun {
        assert_covers(collect(stream).await, &whole);
    }
}

#[actix::test]
async fn a_cut_product_is_charged_for_its_parts() {
    let (devices, _) = devices(&[("a", 1.0, None), ("b", 1.0, None)]);
    let linear = LinearId { layer: 0, group: Group::GateUp };
    let request = |body_bits, output_bits| {
        let precision = Precision { set: ParameterSet::P24, body_bits, mask_limbs: 2, output_bits };
        request(linear, Direction::Backward, precision, 10)
    };
    let (whole, packed) = (request(24, 16), request(22, 10));
    // Body, a copy of it, two summands, the answer; the body once more where it comes packed.
    let bytes = 10 * (2 * 3 * 300 + 2 * 3 * 40 + 2 * 40);
    let spread = 10 * 3 * 300;
    for (request, product_bytes, enough) in [
        (&whole, bytes, true),
        (&whole, bytes - 1, false),
        (&packed, bytes + spread, true),
        (&packed, bytes + spread - 1, false),
    ] {
        let limits = WorkerLimits { product_bytes, ..limits() };
        let net = start_on(Arc::<Synthetic>::default(), devices.clone(), Split::Columns, limits).await;
        net.loaded(0..1).await;
        let admitted = net.worker.admit(&"owner".into(), &request.header).await;
        assert_eq!(admitted.is_ok(), enough, "{:?}", admitted.err());
    }
}

#[actix::test]
async fn a_worker_without_devices_does_not_start() {
    let started = Worker::start(Arc::new(Synthetic::default()), Vec::new(), Split::Layers, limits(), || 0).await;
    assert!(matches!(started, Err(StartError::NoDevice)));
}
