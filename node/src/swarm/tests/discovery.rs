//! How an owner finds its workers.

use super::*;

async fn worker_of(model: ModelDigest, version: u32) -> Worker {
    let mut service = FakeService::new(16, 8, 8);
    service.offer.model = model;
    service.offer.version = version;
    Worker::start(TCP, service, ServeConfig::default()).await
}

fn query(wanted: usize, time_out: Duration) -> DiscoveryQuery {
    DiscoveryQuery { model: DIGEST, admission: Admission::default(), wanted, time_out }
}

async fn owner(dial: Vec<Multiaddr>) -> Libp2pTransport {
    Libp2pTransport::new(node(SwarmRole::Owner, &[], dial).await, TransportConfig::default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_are_found_and_others_named_with_the_reason() {
    let (one, two) = (worker_of(DIGEST, PROTOCOL_VERSION).await, worker_of(DIGEST, PROTOCOL_VERSION).await);
    let other_model = worker_of(ModelDigest([0xaa; 32]), PROTOCOL_VERSION).await;
    let other_version = worker_of(DIGEST, 7).await;
    let idle = node(SwarmRole::Owner, &[TCP], vec![]).await;
    let nobody: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    let mut without_name = one.address();
    without_name.pop();
    let dial = vec![
        without_name,
        two.address(),
        other_model.address(),
        other_version.address(),
        idle.listening()[0].clone(),
        nobody.clone(),
    ];
    let transport = owner(dial).await;
    let (mut found, mut rejected) = (0, 0);
    let discovery = discover(&transport, &query(3, Duration::from_secs(4)), |event| match event {
        DiscoveryEvent::Found(_) => found += 1,
        DiscoveryEvent::Rejected(_) => rejected += 1,
        DiscoveryEvent::Lost(peer) => panic!("{peer} stays"),
    })
    .await
    .unwrap();

    let mut names: Vec<_> = discovery.workers.iter().map(|worker| worker.peer.clone()).collect();
    let mut expected = vec![one.name(), two.name()];
    names.sort();
    expected.sort();
    assert_eq!(names, expected, "{discovery}");
    let why = |peer: String| {
        let rejected = discovery.rejected.iter().find(|rejected| rejected.peer == peer);
        rejected.unwrap_or_else(|| panic!("{peer} in {discovery}")).why.clone()
    };
    assert!(why(other_model.name().to_string()).contains(&"aa".repeat(32)));
    assert!(why(other_version.name().to_string()).contains("version 7"));
    assert!(why(idle.local_peer().to_base58()).contains("serves nothing"));
    assert!(why(nobody.to_string()).contains("refused"));
    assert_eq!((found, rejected), (2, 4), "{discovery}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_starts_later_is_found() {
    // A port that is free now and that the worker takes later.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("/ip4/127.0.0.1/tcp/{port}");
    let transport = owner(vec![listen.parse().unwrap()]).await;
    let search = tokio::spawn({
        let transport = transport.clone();
        async move { discover(&transport, &query(1, PATIENCE), |_| ()).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let worker = Worker::start(&listen, FakeService::new(16, 8, 8), ServeConfig::default()).await;
    let discovery = search.await.unwrap();
    assert_eq!(discovery.workers[0].peer, worker.name());
    works(&transport, &worker.name(), 16, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_found_within_the_time() {
    let transport = owner(vec![]).await;
    let discovery = discover(&transport, &query(1, Duration::from_millis(300)), |_| ()).await.unwrap();
    assert_eq!(discovery.to_string(), "0 workers found");
}

/// Owner and worker know only a third peer, which serves another model.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_found_over_the_dht() {
    let start = async |role, listen: &[&str], dial| {
        let mut config = SwarmConfig::new(Identity::ephemeral(), role);
        config.listen = listen.iter().map(|address| address.parse().unwrap()).collect();
        config.dial = dial;
        config.kademlia = true;
        SwarmHandle::start(config).await.unwrap()
    };
    let serve_model = async |handle: &SwarmHandle, model| {
        let mut service = FakeService::new(16, 8, 8);
        service.offer.model = model;
        handle.provide(model).await.unwrap();
        serve(handle, Arc::new(service), ServeConfig::default()).await.unwrap()
    };
    let meeting = start(SwarmRole::Worker, &[TCP], vec![]).await;
    let _other = serve_model(&meeting, ModelDigest([0xaa; 32])).await;
    let at = meeting.listening().to_vec();
    let worker = start(SwarmRole::Worker, &[TCP], at.clone()).await;
    connected(&worker, meeting.local_peer()).await;
    let _serving = serve_model(&worker, DIGEST).await;
    let transport = Libp2pTransport::new(start(SwarmRole::Owner, &[], at).await, TransportConfig::default());
    let discovery = discover(&transport, &query(1, Duration::from_secs(30)), |_| ()).await.unwrap();
    let names: Vec<_> = discovery.workers.iter().map(|worker| worker.peer.clone()).collect();
    assert_eq!(names, [peer_name(worker.local_peer())], "{discovery}");
    works(&transport, &names[0], 16, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_serve_is_not_asked_and_who_leaves_is_told() {
    let [one, banned, stranger] = [
        worker_of(DIGEST, PROTOCOL_VERSION).await,
        worker_of(DIGEST, PROTOCOL_VERSION).await,
        worker_of(DIGEST, PROTOCOL_VERSION).await,
    ];
    let transport = owner(vec![one.address(), banned.address(), stranger.address()]).await;
    let admission = Admission {
        allowed: Some([one.name(), banned.name()].into()),
        banned: [(banned.name(), "it lied; see bans.json".to_owned())].into(),
    };
    let query = DiscoveryQuery { admission, ..query(3, Duration::from_secs(3)) };
    let discovery = discover(&transport, &query, |_| ()).await.unwrap();
    let names: Vec<_> = discovery.workers.iter().map(|worker| worker.peer.clone()).collect();
    assert_eq!(names, [one.name()], "{discovery}");
    let said = discovery.to_string();
    assert!(said.contains(&format!("{}: it lied; see bans.json", banned.name())), "{said}");
    assert!(said.contains(&format!("{}: it is not among the workers that are allowed", stranger.name())), "{said}");

    // During the run: who is there is found, and told of when it leaves.
    let name = one.name();
    let mut leaving = Some(one);
    let (events, mut seen) = mpsc::channel(16);
    let looking = keep_looking(&transport, &query, |event| {
        let event = match event {
            DiscoveryEvent::Found(worker) => (worker.peer.clone(), true),
            DiscoveryEvent::Lost(peer) => (peer.clone(), false),
            DiscoveryEvent::Rejected(_) => return,
        };
        events.try_send(event).unwrap();
    });
    let watched = async {
        assert_eq!(seen.recv().await.unwrap(), (name.clone(), true));
        if let Some(worker) = leaving.take() {
            worker.handle.shut_down();
        }
        while seen.recv().await.unwrap() != (name.clone(), false) {}
    };
    tokio::select! {
        error = looking => panic!("{error}"),
        () = watched => {}
        () = tokio::time::sleep(PATIENCE) => panic!("nobody told that it left"),
    }
}
