//! A worker that lies, on a real swarm: it speaks the protocol as any other and computes as any other, and then alters what it
//! sends, or sends it too late.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use actors::matmul::{CpuDevice, Device, best_kernel};
use actors::transport::{Admitted, Answer, PeerName, WorkerService};
use actors::worker::{ModelSource, ShardSource, SourceError, Split, Worker, WorkerLimits};
use async_trait::async_trait;
use node::swarm::{Identity, ServeConfig, SwarmConfig, SwarmHandle, SwarmRole, serve};
use protocol::he::{Planes, ProductTile};
use protocol::ids::{Group, LinearId, LinearShape, ModelDigest, ProductId};
use protocol::model::Model;
use protocol::quant::{Int8Matrix, LinearMeta};
use protocol::wire::messages::{ControlReply, ControlRequest, Operand, ProductHeader, Refusal};
use tokio::sync::{mpsc, oneshot, watch};

/// How a worker lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Other weights multiply the masks, from the beginning.
    MasksByOtherWeights,
    /// Other weights multiply the bodies.
    BodiesByOtherWeights,
    /// Other weights multiply both.
    AllByOtherWeights,
    /// Half the modulus is added to two entries of a row.
    PairOfHalves,
    /// One entry is another.
    OneEntry,
    /// Noise of many times the honest is added everywhere.
    Noise,
    /// An earlier answer to the same matrix is sent again.
    Replay,
    /// The answers' rows are in another order.
    RowsSwapped,
    /// The answer is right, but it does not come before [`Liar::release`].
    Late,
}

impl Lie {
    /// All whose answers are wrong.
    pub const WRONG: [Self; 8] = [
        Self::MasksByOtherWeights,
        Self::BodiesByOtherWeights,
        Self::AllByOtherWeights,
        Self::PairOfHalves,
        Self::OneEntry,
        Self::Noise,
        Self::Replay,
        Self::RowsSwapped,
    ];

    /// Whether the masks are multiplied by other weights.
    fn alters_masks(self) -> bool {
        matches!(self, Self::MasksByOtherWeights | Self::AllByOtherWeights)
    }

    /// Whether anything is multiplied by other weights.
    fn has_other_weights(self) -> bool {
        self.alters_masks() || self == Self::BodiesByOtherWeights
    }
}

/// What a liar does, as it and the test see it.
struct Conduct {
    lie: Lie,
    /// Products of bodies that it still answers as it should.
    honest: AtomicUsize,
    lies: AtomicUsize,
    released: watch::Sender<bool>,
    late: AtomicUsize,
}

/// A running worker that lies from some product on. Dropping it ends it.
pub struct Liar {
    /// Where it can be dialed; empty where it dials.
    pub address: String,
    /// Its name.
    pub peer: String,
    conduct: Arc<Conduct>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    /// Starts a worker that can be dialed, answers `honest` products of bodies as it should, and lies in all others.
    pub fn start(model: &Path, lie: Lie, honest: usize) -> Self {
        let mut swarm = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Worker);
        swarm.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")];
        Self::on(swarm, model, lie, honest)
    }

    /// Starts a worker that dials an owner at a port of this machine, and lies once it is told to.
    pub fn dialing(owner: u16, model: &Path, lie: Lie) -> Self {
        let mut swarm = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Worker);
        swarm.dial = vec![format!("/ip4/127.0.0.1/tcp/{owner}").parse().expect("an address")];
        Self::on(swarm, model, lie, usize::MAX)
    }

    fn on(swarm: SwarmConfig, model: &Path, lie: Lie, honest: usize) -> Self {
        let (tell, told) = sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let conduct = Arc::new(Conduct {
            lie,
            honest: AtomicUsize::new(honest),
            lies: AtomicUsize::new(0),
            released: watch::Sender::new(false),
            late: AtomicUsize::new(0),
        });
        let (model, conducts) = (model.to_owned(), Arc::clone(&conduct));
        let work = async move {
            let service = Lying::start(&model, conducts).await;
            let swarm = SwarmHandle::start(swarm).await.expect("a port is free");
            let serving = serve(&swarm, Arc::new(service), ServeConfig::default()).await.expect("nobody else serves");
            let address = swarm.listening().first().map(ToString::to_string).unwrap_or_default();
            tell.send((address, swarm.local_peer().to_base58())).expect("the test waits");
            // It ends with the test, however that ends.
            let _ = stopped.await;
            drop(serving);
            swarm.shut_down();
        };
        let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads and timers");
        let thread = std::thread::spawn(move || actix::System::with_tokio_rt(runtime).block_on(work));
        let (address, peer) = told.recv().expect("the worker starts");
        Self { address, peer, conduct, stop: Some(stop), thread: Some(thread) }
    }

    /// From now on it lies.
    pub fn begin(&self) {
        self.conduct.honest.store(0, Ordering::Relaxed);
    }

    /// Lies so far.
    pub fn lies(&self) -> usize {
        self.conduct.lies.load(Ordering::Relaxed)
    }

    /// Answers that were held back may go, and none is held back any more.
    pub fn release(&self) {
        self.conduct.released.send_replace(true);
    }

    /// Answers that went after they had been held back.
    pub fn late(&self) -> usize {
        self.conduct.late.load(Ordering::Relaxed)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        // It may have ended by a panic, which the test shows.
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A model with weights that are not the model's.
struct Altered(ModelSource);

impl ShardSource for Altered {
    fn digest(&self) -> ModelDigest {
        self.0.digest()
    }

    fn layers(&self) -> u16 {
        self.0.layers()
    }

    fn groups(&self, layer: u16) -> &'static [Group] {
        self.0.groups(layer)
    }

    fn shape(&self, linear: LinearId) -> LinearShape {
        self.0.shape(linear)
    }

    fn load(&self, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError> {
        let (mut matrix, meta) = self.0.load(linear)?;
        matrix.values.iter_mut().step_by(50).for_each(|value| *value = value.wrapping_add(9));
        Ok((matrix, meta))
    }
}

/// Tiles of earlier answers, by what they answered.
type Earlier = Arc<Mutex<HashMap<(ProductId, usize), Vec<ProductTile>>>>;

struct Lying {
    conduct: Arc<Conduct>,
    right: Worker,
    /// Where the lie needs it.
    wrong: Option<Worker>,
    earlier: Earlier,
}

impl Lying {
    async fn start(model: &Path, conduct: Arc<Conduct>) -> Self {
        let source = || ModelSource::new(Arc::new(Model::open(model).expect("a model"))).expect("its digest");
        let worker = async |source: Arc<dyn ShardSource>| {
            let devices: Vec<Arc<dyn Device>> = vec![Arc::new(CpuDevice::new(best_kernel()))];
            let limits = WorkerLimits::default();
            Worker::start(source, devices, Split::Layers, limits, || 0).await.expect("a worker starts")
        };
        let right = worker(Arc::new(source())).await;
        let wrong = match conduct.lie.has_other_weights() {
            true => Some(worker(Arc::new(Altered(source()))).await),
            false => None,
        };
        Self { conduct, right, wrong, earlier: Arc::default() }
    }

    /// Whether this product is answered wrongly, or too late.
    fn lies(&self, header: &ProductHeader) -> bool {
        let Conduct { lie, honest, released, .. } = &*self.conduct;
        match header.operand {
            Operand::Masks { .. } => lie.alters_masks(),
            Operand::Body { .. } => {
                let over =
                    honest.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
                over && *lie != Lie::MasksByOtherWeights && !*released.borrow()
            }
        }
    }
}

#[async_trait]
impl WorkerService for Lying {
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply {
        let of_wrong = match &self.wrong {
            Some(wrong) => Some(wrong.control(owner, request.clone()).await),
            None => None,
        };
        match (self.right.control(owner, request).await, of_wrong) {
            // It is ready when both are.
            (ControlReply::Health(mut right), Some(ControlReply::Health(wrong))) => {
                right.loaded = right.loaded.min(wrong.loaded);
                ControlReply::Health(right)
            }
            (reply, _) => reply,
        }
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        let lies = self.lies(header);
        let worker = self.wrong.as_ref().filter(|_| lies).unwrap_or(&self.right);
        let admitted = worker.admit(owner, header).await?;
        if lies {
            self.conduct.lies.fetch_add(1, Ordering::Relaxed);
        }
        let (conduct, earlier) = (Arc::clone(&self.conduct), Arc::clone(&self.earlier));
        Ok(Box::new(Altering { admitted, lies, header: header.clone(), conduct, earlier }))
    }

    fn serves(&self, peer: &PeerName) -> bool {
        self.right.serves(peer)
    }

    async fn left(&self, peer: &PeerName) {
        for worker in std::iter::once(&self.right).chain(&self.wrong) {
            worker.left(peer).await;
        }
    }
}

struct Altering {
    admitted: Box<dyn Admitted>,
    lies: bool,
    header: ProductHeader,
    conduct: Arc<Conduct>,
    earlier: Earlier,
}

#[async_trait]
impl Admitted for Altering {
    fn inner(&self) -> usize {
        self.admitted.inner()
    }

    fn outer(&self) -> usize {
        self.admitted.outer()
    }

    async fn begin(self: Box<Self>, body: Option<Arc<Planes>>) -> Result<Answer, Refusal> {
        let Self { admitted, lies, header, conduct, earlier } = *self;
        let Answer { mut tiles, time, place } = admitted.begin(body).await?;
        let mut all = Vec::new();
        while let Some(tile) = tiles.recv().await {
            all.push(tile?);
        }
        if matches!(header.operand, Operand::Body { .. }) {
            let key = (header.product, header.rows());
            let first = earlier.lock().expect("nobody panicked").entry(key).or_insert_with(|| all.clone()).clone();
            match conduct.lie {
                _ if !lies => {}
                Lie::Replay => all = first,
                Lie::Late => {
                    let released = conduct.released.subscribe().wait_for(|&released| released).await.is_ok();
                    conduct.late.fetch_add(usize::from(released), Ordering::Relaxed);
                }
                lie => all.iter_mut().for_each(|tile| alter(lie, &mut tile.rows)),
            }
        }
        let (sender, tiles) = mpsc::channel(all.len().max(1));
        for tile in all {
            sender.try_send(Ok(tile)).expect("there is room for all tiles");
        }
        Ok(Answer { tiles, time, place })
    }
}

/// Alters a tile.
fn alter(lie: Lie, planes: &mut Planes) {
    let (rows, columns) = (planes.rows(), planes.columns());
    let half = 1_u64 << (planes.bits() - 1);
    let mut add = |row: usize, column: usize, value: u64| {
        let sum = planes.value(row, column).wrapping_add(value);
        planes.set_value(row, column, sum);
    };
    match lie {
        // In every row, since those of zeros are not used.
        Lie::PairOfHalves => (0..rows).for_each(|row| {
            add(row, 0, half);
            add(row, columns - 1, half);
        }),
        Lie::OneEntry => (0..rows).for_each(|row| add(row, row % columns, half / 3)),
        Lie::Noise => {
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                // As good as random.
                let random = ((row * 7919 + column * 104_729) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                add(row, column, random % (half / 8));
            }
        }
        Lie::RowsSwapped => {
            for row in 0..rows / 2 {
                for column in 0..columns {
                    let (a, b) = (planes.value(row, column), planes.value(rows - 1 - row, column));
                    planes.set_value(row, column, b);
                    planes.set_value(rows - 1 - row, column, a);
                }
            }
        }
        Lie::MasksByOtherWeights | Lie::BodiesByOtherWeights | Lie::AllByOtherWeights | Lie::Replay | Lie::Late => {}
    }
}
