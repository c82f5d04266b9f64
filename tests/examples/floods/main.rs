//! Attacks on a worker process beside an honest owner that is doing products: how many products the owner gets in the same
//! time without the attack and during it, and the worker's largest memory before and after.
//!
//!     cargo build --release -p node && cargo run --release -p tests --example floods
//!
//! Each attack meets a new worker, on a random model of SmolLM2's width. Worker, owner and attackers share this machine, so
//! that an attack takes processor time from the owner even where it gains nothing else.

#![allow(missing_docs)]

mod hostile;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actors::transport::{PeerName, ProductRequest, Transport as _};
use anyhow::{Context as _, bail};
use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::{Multiaddr, Stream};
use node::swarm::{Identity, Libp2pTransport, SwarmConfig, SwarmHandle, SwarmRole, TransportConfig};
use protocol::he::{ParameterSet, Planes, Precision};
use protocol::ids::{Direction, Group, LinearId, ModelDigest};
use protocol::model::Model;
use protocol::model::synthetic::{KnownModel, StoredAs, SyntheticLlama};
use protocol::wire::encode;
use protocol::wire::messages::{ControlReply, ControlRequest, Operand, PROTOCOL_VERSION, ProductHeader};
use tests::{Node, Workspace};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use hostile::Hostile;

/// Time in which products are counted, without and with the attack.
const COUNTED: Duration = Duration::from_secs(6);
/// Time that an attack has to unfold before.
const UNFOLDS: Duration = Duration::from_secs(2);
/// Rows of the honest owner's products, and how many it has in flight.
const TOKENS: u32 = 64;
const IN_FLIGHT: usize = 4;
/// Attackers that no layers are assigned to.
const STRANGERS: usize = 16;
/// Rows of the attackers' products.
const HOSTILE_TOKENS: u32 = 4096;

#[derive(Clone, Copy, Debug)]
enum Attack {
    Nothing,
    UnreadAnswers,
    AnswersReadByDrops,
    TricklingBodies,
    IdleStreams,
    ManyStreams,
    Questions,
    SilentSockets,
    IdleConnections,
    TakingThePlace,
}

impl Attack {
    const ALL: [Self; 10] = [
        Self::Nothing,
        Self::UnreadAnswers,
        Self::AnswersReadByDrops,
        Self::TricklingBodies,
        Self::IdleStreams,
        Self::ManyStreams,
        Self::Questions,
        Self::SilentSockets,
        Self::IdleConnections,
        Self::TakingThePlace,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::UnreadAnswers => "a second owner asks for 32 products of 4,096 rows and reads no answer",
            Self::AnswersReadByDrops => "the same, and it reads a byte of each in 100 ms",
            Self::TricklingBodies => "a second owner sends 32 bodies, a byte in 100 ms",
            Self::IdleStreams => "16 strangers with 16 idle streams each, opened anew when dropped",
            Self::ManyStreams => "16 strangers open streams with noise as fast as they can",
            Self::Questions => "16 strangers ask for health and offers as fast as they can",
            Self::SilentSockets => "200 sockets that never shake hands, opened anew when closed",
            Self::IdleConnections => "200 strangers that connect and do nothing",
            Self::TakingThePlace => "16 strangers ask for the place, as fast as they can",
        }
    }

    /// Whether the attacker is an owner that the worker serves beside the honest one.
    fn has_layers(self) -> bool {
        matches!(self, Self::UnreadAnswers | Self::AnswersReadByDrops | Self::TricklingBodies)
    }

    /// Begins it; it goes on until the tasks are dropped.
    async fn begin(self, scene: &Scene) -> anyhow::Result<JoinSet<()>> {
        let mut tasks = JoinSet::new();
        match self {
            Self::Nothing => {}
            Self::UnreadAnswers | Self::AnswersReadByDrops | Self::TricklingBodies => {
                let owner = Arc::new(Hostile::connect(&scene.address).await?);
                scene.assign(&owner).await?;
                for call in 0..32 {
                    let (owner, inner) = (Arc::clone(&owner), scene.inner);
                    tasks.spawn(async move {
                        loop {
                            // An error means that the worker has had enough of it.
                            let _ = self.product(&owner, inner, call).await;
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    });
                }
            }
            Self::SilentSockets => {
                for _ in 0..200 {
                    let to = scene.socket()?;
                    tasks.spawn(async move {
                        loop {
                            let _ = silent(to).await;
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    });
                }
            }
            Self::IdleConnections => {
                for _ in 0..200 {
                    let address = scene.address.clone();
                    tasks.spawn(async move {
                        loop {
                            if let Ok(_stranger) = Hostile::connect(&address).await {
                                tokio::time::sleep(Duration::from_secs(5)).await;
                            }
                            tokio::time::sleep(Duration::from_millis(200)).await;
                        }
                    });
                }
            }
            Self::IdleStreams | Self::ManyStreams | Self::Questions | Self::TakingThePlace => {
                for _ in 0..STRANGERS {
                    let (address, model) = (scene.address.clone(), scene.model);
                    tasks.spawn(async move {
                        loop {
                            if let Ok(stranger) = Hostile::connect(&address).await {
                                while self.disturb(&stranger, model).await.is_ok() {}
                            }
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    });
                }
            }
        }
        Ok(tasks)
    }

    /// One product of a hostile owner.
    async fn product(self, owner: &Hostile, inner: usize, call: u64) -> anyhow::Result<()> {
        let header = header(call, HOSTILE_TOKENS);
        let mut stream = owner.product().await?;
        stream.write_all(&encode(&header)?).await?;
        stream.flush().await?;
        let body = vec![0; Planes::bytes_for(header.operand_bits(), header.rows(), inner).expect("a small body")];
        if matches!(self, Self::TricklingBodies) {
            for byte in body.chunks(1) {
                stream.write_all(byte).await?;
                stream.flush().await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        stream.write_all(&body).await?;
        stream.flush().await?;
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if matches!(self, Self::AnswersReadByDrops) {
                stream.read_exact(&mut [0]).await?;
            } else if is_over(&mut stream).await {
                bail!("the worker has had enough");
            }
        }
    }

    /// Whatever a stranger does again and again.
    async fn disturb(self, stranger: &Hostile, model: ModelDigest) -> anyhow::Result<()> {
        match self {
            Self::IdleStreams => {
                let streams = (0..16).map(|_| async {
                    let mut stream = stranger.product().await?;
                    stream.write_all(&[3]).await?;
                    stream.flush().await?;
                    // Until the worker has had enough of it.
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                    anyhow::Ok(())
                });
                futures::future::try_join_all(streams).await?;
            }
            Self::ManyStreams => {
                let mut stream = stranger.product().await?;
                stream.write_all(&[0x55; 4096]).await?;
                stream.close().await?;
            }
            Self::TakingThePlace => {
                stranger.ask(&ControlRequest::Assign { model, layers: 0..1 }).await?;
                stranger.ask(&ControlRequest::Health).await?;
            }
            _ => {
                stranger.ask(&ControlRequest::Health).await?;
                stranger.ask(&ControlRequest::Offer { version: PROTOCOL_VERSION }).await?;
            }
        }
        Ok(())
    }
}

/// Whether the worker has ended a stream of which nothing is to be read.
async fn is_over(stream: &mut Stream) -> bool {
    // Writing to it fails; a byte behind the body ends it, too, and so is not sent.
    stream.flush().await.is_err()
}

/// A connection from another address of this machine, until the worker closes it.
async fn silent(to: SocketAddr) -> anyhow::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into())?;
    let mut socket = socket.connect(to).await?;
    tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut Vec::new()).await?;
    Ok(())
}

fn header(call: u64, tokens: u32) -> ProductHeader {
    ProductHeader {
        version: PROTOCOL_VERSION,
        call,
        product: LinearId { layer: 0, group: Group::GateUp }.along(Direction::Forward),
        precision: Precision::standard(ParameterSet::P24),
        operand: Operand::Body { tokens },
    }
}

/// A worker process and what an owner must know of its model.
struct Scene {
    process: Node,
    address: Multiaddr,
    model: ModelDigest,
    inner: usize,
    outer: usize,
}

impl Scene {
    fn start(folder: &Workspace, model: &Path, digest: ModelDigest, attack: Attack) -> anyhow::Result<Self> {
        let key = folder.path(&format!("{attack:?}.key"));
        let owners = if attack.has_layers() { 2 } else { 1 };
        let config = folder.write("worker.toml", &format!("[worker]\nmax_owners = {owners}\n"));
        let mut arguments: Vec<std::ffi::OsString> = Vec::new();
        for argument in ["--role", "worker", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0", "--model"] {
            arguments.push(argument.into());
        }
        arguments.extend([model.into(), "--identity".into(), key.into(), "--config".into(), config.into()]);
        let mut process = Node::start(arguments);
        let address = process.expect_line("listening on ").parse()?;
        let (inner, outer) = Model::open(model)?.config().shape(Group::GateUp).along(Direction::Forward);
        Ok(Self { process, address, model: digest, inner, outer })
    }

    fn socket(&self) -> anyhow::Result<SocketAddr> {
        let port = self.address.iter().find_map(|part| match part {
            libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
            _ => None,
        });
        Ok((Ipv4Addr::LOCALHOST, port.context("no TCP address")?).into())
    }

    /// The worker's largest memory so far, MiB.
    fn peak_mib(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
    }

    async fn assign(&self, owner: &Hostile) -> anyhow::Result<()> {
        match owner.ask(&ControlRequest::Assign { model: self.model, layers: 0..1 }).await? {
            ControlReply::Assigned => Ok(()),
            reply => bail!("{reply:?}"),
        }
    }
}

/// The honest owner.
struct Owner {
    transport: Libp2pTransport,
    worker: PeerName,
    request: ProductRequest,
    calls: AtomicU64,
}

impl Owner {
    /// An owner with the worker's layer, once it is loaded.
    async fn start(scene: &Scene) -> anyhow::Result<Arc<Self>> {
        let mut config = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Owner);
        config.dial = vec![scene.address.clone()];
        let transport = Libp2pTransport::new(SwarmHandle::start(config).await?, TransportConfig::default());
        let worker = scene.address.to_string();
        let worker = PeerName::from(worker.rsplit('/').next().context("the address names no peer")?);
        let assign = ControlRequest::Assign { model: scene.model, layers: 0..1 };
        let start = Instant::now();
        while let Err(error) = transport.control(&worker, assign.clone()).await {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(error.into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        loop {
            match transport.control(&worker, ControlRequest::Health).await? {
                ControlReply::Health(health) if health.loaded > 0 => break,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        let header = header(0, TOKENS);
        let body = Planes::zeros_of_bits(header.operand_bits(), header.rows(), scene.inner);
        let request = ProductRequest { header, body: Some(Arc::new(body)), outer: scene.outer };
        Ok(Arc::new(Self { transport, worker, request, calls: AtomicU64::new(0) }))
    }

    async fn product(&self) -> anyhow::Result<()> {
        let mut request = self.request.clone();
        request.header.call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut tiles = self.transport.product(&self.worker, request).await?;
        let mut left = self.request.outer;
        while let Some(tile) = tiles.recv().await {
            left -= tile?.rows.columns();
        }
        anyhow::ensure!(left == 0, "the answer is not whole");
        Ok(())
    }

    /// Products served and refused in the time that counts.
    async fn count(self: &Arc<Self>) -> (u64, u64) {
        let end = Instant::now() + COUNTED;
        let mut tasks = JoinSet::new();
        for _ in 0..IN_FLIGHT {
            let owner = Arc::clone(self);
            tasks.spawn(async move {
                let (mut served, mut failed) = (0, 0);
                while Instant::now() < end {
                    match owner.product().await {
                        Ok(()) => served += 1,
                        Err(error) => {
                            eprintln!("the honest owner: {error}");
                            failed += 1;
                        }
                    }
                }
                (served, failed)
            });
        }
        tasks.join_all().await.into_iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

/// Whether another owner can connect now: seconds until it is offered the worker.
async fn newcomer(scene: &Scene) -> anyhow::Result<f64> {
    let start = Instant::now();
    loop {
        let asked = async {
            let newcomer = Hostile::connect(&scene.address).await?;
            newcomer.ask(&ControlRequest::Offer { version: PROTOCOL_VERSION }).await
        };
        match tokio::time::timeout(Duration::from_secs(10), asked).await {
            Ok(Ok(ControlReply::Offer(_))) => return Ok(start.elapsed().as_secs_f64()),
            _ if start.elapsed() > Duration::from_secs(60) => bail!("not within a minute"),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn measure(scene: &Scene, attack: Attack) -> anyhow::Result<()> {
    let owner = Owner::start(scene).await?;
    let (before, _) = owner.count().await;
    let peak_before = scene.peak_mib()?;
    let tasks = attack.begin(scene).await?;
    tokio::time::sleep(UNFOLDS).await;
    let (during, failed) = owner.count().await;
    let newcomer = newcomer(scene).await.map_or_else(|error| error.to_string(), |seconds| format!("{seconds:.1}"));
    let peak = scene.peak_mib()?;
    drop(tasks);
    let share = 100.0 * during as f64 / before.max(1) as f64;
    println!(
        "| {} | {before} | {during} ({share:.0} %) | {failed} | {newcomer} | {peak_before} | {peak} |",
        attack.name()
    );
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let folder = Workspace::new();
    let mut llama = SyntheticLlama::known(KnownModel::SmolLm2_135m, 1);
    llama.config.layers = 1;
    let path = folder.path("model");
    llama.write_folder(&path, StoredAs::Bf16)?;
    let digest = Model::open(&path)?.digest()?;
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    println!(
        "| attack | products in {} s before | during | failed | s until a newcomer has its offer | peak MiB before | after |",
        COUNTED.as_secs()
    );
    println!("|---|---|---|---|---|---|---|");
    let is_wanted = |attack: &Attack| wanted.is_empty() || wanted.contains(&format!("{attack:?}"));
    for attack in Attack::ALL.into_iter().filter(is_wanted) {
        let scene = Scene::start(&folder, &path, digest, attack)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(measure(&scene, attack))?;
        runtime.shutdown_background();
    }
    Ok(())
}
