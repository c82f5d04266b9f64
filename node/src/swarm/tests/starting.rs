//! Swarms that start, do not start, end and come back.

use std::net::TcpListener;

use super::*;

async fn fails(listen: &Multiaddr) -> String {
    let mut config = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Worker);
    config.listen = vec![listen.clone()];
    let error = SwarmHandle::start(config).await.err().expect("an error");
    assert!(matches!(&error, SwarmError::Listen { address, .. } if address == listen), "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_an_error_that_names_it() {
    for listen in [TCP, QUIC] {
        let first = node(SwarmRole::Worker, &[listen], vec![]).await;
        let mut taken = first.listening()[0].clone();
        taken.pop();
        let error = fails(&taken).await;
        assert!(error.contains(&taken.to_string()) && error.contains("in use") && error.contains("port 0"), "{error}");
    }
    let other_program = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other_program.local_addr().unwrap().port();
    fails(&format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_that_nobody_listens_on_are_errors() {
    for address in ["/ip4/192.0.2.1/tcp/0", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/0", "/memory/7"] {
        fails(&address.parse().unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_outlives_its_swarm() {
    let worker = Worker::start(TCP, FakeService::new(8, 8, 8), ServeConfig::default()).await;
    let transport = owner_of(&worker.handle, TransportConfig::default()).await;
    transport.handle().shut_down();
    let error = transport.control(&worker.name(), ControlRequest::Release).await.unwrap_err();
    assert!(error.to_string().contains("shut down"), "{error}");
    assert!(matches!(transport.handle().peers().await, Err(SwarmError::Closed)));
    let serving = serve(transport.handle(), Arc::new(FakeService::new(8, 8, 8)), ServeConfig::default()).await;
    assert!(matches!(serving, Err(SwarmError::Closed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swarm_takes_one_service_at_a_time() {
    let worker = Worker::start(TCP, FakeService::new(8, 8, 8), ServeConfig::default()).await;
    let second = serve(&worker.handle, Arc::new(FakeService::new(8, 8, 8)), ServeConfig::default()).await;
    assert!(matches!(second, Err(SwarmError::AlreadyServing)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("identity");
    let start = async |listen: Multiaddr| {
        let mut config = SwarmConfig::new(Identity::load_or_create(&key).unwrap(), SwarmRole::Worker);
        config.listen = vec![listen];
        let handle = SwarmHandle::start(config).await.unwrap();
        let serving = serve(&handle, Arc::new(FakeService::new(8, 8, 8)), ServeConfig::default()).await.unwrap();
        Worker { handle, _serving: serving }
    };
    let worker = start(TCP.parse().unwrap()).await;
    let (name, peer, mut address) = (worker.name(), worker.handle.local_peer(), worker.address());
    address.pop();
    let transport =
        Libp2pTransport::new(node(SwarmRole::Owner, &[], vec![address.clone()]).await, TransportConfig::default());
    let mut events = transport.handle().events();
    connected(transport.handle(), peer).await;
    works(&transport, &name, 8, 8).await;

    worker.handle.shut_down();
    drop(worker);
    let lost = async { while !matches!(events.recv().await.unwrap(), NetworkEvent::PeerLost(lost) if lost == peer) {} };
    tokio::time::timeout(PATIENCE, lost).await.expect("the loss is told");
    let error = transport.control(&name, ControlRequest::Release).await.unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");

    let _again = start(address).await;
    connected(transport.handle(), peer).await;
    works(&transport, &name, 8, 8).await;
}
