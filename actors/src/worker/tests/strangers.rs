//! Owners that share a worker, and peers that it does not serve.

use super::*;

#[actix::test]
async fn owners_share_memory_and_idle_ones_make_place() {
    let patient = WorkerLimits { owners: 2, ..limits() };
    let net = start(Arc::default(), patient).await;
    let assign = |owner: &str, layers| {
        let (worker, owner) = (Arc::clone(&net.worker), PeerName::from(owner));
        async move { worker.control(&owner, ControlRequest::Assign { model: DIGEST, layers }).await }
    };
    assert_eq!(assign("a", 0..2).await, ControlReply::Assigned);
    assert!(matches!(assign("b", 2..4).await, ControlReply::Refused(Refusal::Capacity(_))), "four layers do not fit");
    assert_eq!(assign("b", 1..3).await, ControlReply::Assigned, "three do, one of them shared");
    assert!(matches!(assign("c", 1..2).await, ControlReply::Refused(Refusal::Capacity(_))), "two owners are served");
    assert_eq!(net.worker.control(&"a".into(), ControlRequest::Release).await, ControlReply::Released);
    assert_eq!(assign("c", 1..2).await, ControlReply::Assigned);

    let impatient = start(Arc::default(), WorkerLimits { first_use: Duration::ZERO, ..limits() }).await;
    impatient.loaded(0..1).await;
    let reply = impatient.worker.control(&"other".into(), ControlRequest::Assign { model: DIGEST, layers: 0..1 }).await;
    assert_eq!(reply, ControlReply::Assigned, "an idle owner is displaced");
    assert_eq!(impatient.health().await.layers, 0..0);
}

#[actix::test]
async fn owners_that_are_not_on_the_list_are_refused_everything() {
    let net = start(Arc::default(), WorkerLimits { allowed: ["friend".into()].into(), ..limits() }).await;
    for request in
        [ControlRequest::Offer { version: PROTOCOL_VERSION }, ControlRequest::Assign { model: DIGEST, layers: 0..1 }]
    {
        let refused = refusal(net.control(request.clone()).await).to_string();
        assert!(refused.contains("add owner to worker.owners"), "{refused}");
        let reply = net.worker.control(&"friend".into(), request).await;
        assert!(matches!(reply, ControlReply::Offer(_) | ControlReply::Assigned), "{reply:?}");
    }
    assert!(net.worker.serves(&"friend".into()) && !net.worker.serves(&"owner".into()));
}

#[actix::test]
async fn an_owner_hears_of_its_own_work_and_a_stranger_of_none() {
    let net = start(Arc::default(), WorkerLimits { owners: 2, ..limits() }).await;
    net.loaded(0..2).await;
    net.worker.control(&"other".into(), ControlRequest::Assign { model: DIGEST, layers: 0..2 }).await;
    collect(net.product(simple_request()).await.unwrap()).await;
    assert_eq!(net.until(|health| health.calls > 0).await.calls, 1);
    let mut seen = Vec::new();
    for peer in ["other", "stranger"] {
        match net.worker.control(&peer.into(), ControlRequest::Health).await {
            ControlReply::Health(health) => {
                seen.push((health.layers, health.calls, health.busy_seconds, health.peak_rss_bytes));
            }
            reply => panic!("{reply:?}"),
        }
    }
    assert_eq!(seen, [(0..2, 0, 0.0, 4242), (0..0, 0, 0.0, 0)]);
}

#[actix::test]
async fn questions_keep_no_place_and_whoever_loses_it_loses_what_is_under_way() {
    let brief = WorkerLimits { first_use: Duration::ZERO, ..limits() };
    let net = start(Arc::default(), brief).await;
    net.loaded(1..2).await;
    // A product renews the lease; without one, asking how the worker does would not keep the place.
    let (worker, request) = (&net.worker, simple_request());
    let admitted = worker.admit(&"owner".into(), &request.header).await.ok().unwrap();
    let unread = admitted.begin(request.body.clone()).await.ok().unwrap();
    let rival = PeerName::from("other");
    let other = |layers| worker.control(&rival, ControlRequest::Assign { model: DIGEST, layers });
    assert!(matches!(other(1..2).await, ControlReply::Refused(Refusal::Capacity(_))));
    net.loaded(1..3).await;
    assert_eq!(net.health().await.loaded, 2);
    assert_eq!(other(1..2).await, ControlReply::Assigned, "the layers were loaded, and nothing was asked of them");
    assert!(!worker.serves(&"owner".into()));
    let Answer { mut tiles, place, .. } = unread;
    in_time(async { while tiles.recv().await.is_some() {} }).await;
    drop(place);
    assert!(matches!(net.refusal(request.header).await, Refusal::Layers(_)));
}

#[actix::test]
async fn answers_count_and_an_owner_has_its_own_share() {
    let request = simple_request();
    // Three rows of 40 values: three bytes of each come in, two go back.
    assert_eq!(request.body.as_ref().unwrap().bytes().len(), 360);
    let memory =
        |owners, product_memory_bytes| WorkerLimits { owners, product_memory_bytes, room: Duration::ZERO, ..limits() };
    for (owners, memory_bytes, fits) in [(1, 1 << 10, true), (2, 1 << 10, false), (2, 2 << 10, true)] {
        let net = start(Arc::default(), memory(owners, memory_bytes)).await;
        net.loaded(1..2).await;
        let admitted = net.worker.admit(&"owner".into(), &request.header).await;
        assert_eq!(admitted.is_ok(), fits, "600 bytes of {memory_bytes} for {owners} owners");
        if fits {
            let second = net.refusal(request.header.clone()).await;
            assert!(matches!(second, Refusal::Busy(_)), "places are counted in KiB: {second}");
        }
    }
}

#[actix::test]
async fn unread_answers_hold_their_place_and_dropped_ones_give_it_back() {
    let net = start(Arc::default(), WorkerLimits { products: 2, room: Duration::ZERO, ..limits() }).await;
    net.loaded(1..3).await;
    let wide = || {
        request(
            LinearId { layer: 1, group: Group::GateUp },
            Direction::Forward,
            Precision::standard(ParameterSet::P24),
            2,
        )
    };
    let begin = async |request: ProductRequest| {
        let admitted = net.worker.admit(&"owner".into(), &request.header).await?;
        admitted.begin(request.body).await
    };
    let first = begin(wide()).await.ok().unwrap();
    let second = begin(wide()).await.ok().unwrap();
    assert!(matches!(begin(wide()).await, Err(Refusal::Busy(_))));
    drop(first);
    // The place comes back when the forwarding task and the device have seen the drop.
    let third = in_time(async {
        loop {
            match begin(wide()).await {
                Ok(answer) => break answer,
                Err(refusal) => assert!(matches!(refusal, Refusal::Busy(_))),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let mut places = Vec::new();
    for Answer { mut tiles, place, .. } in [second, third] {
        let mut columns = 0;
        while let Some(tile) = tiles.recv().await {
            columns += tile.unwrap().rows.columns();
        }
        assert_eq!(columns, 300);
        places.push(place);
    }
    assert!(matches!(begin(wide()).await, Err(Refusal::Busy(_))), "the places are the reader's to give back");
    drop(places);
    in_time(async {
        while begin(wide()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
