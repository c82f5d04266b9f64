//! A worker that lies, on a real swarm: it speaks the protocol as any other and computes as any other, and then alters what it
//! sends.

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
use protocol::ids::{LinearId, LinearShape, ModelDigest, ProductId};
use protocol::model::Model;
use protocol::quant::{Int8Matrix, LinearMeta};
use protocol::wire::messages::{ControlReply, ControlRequest, Operand, ProductHeader, Refusal};
use tokio::sync::{mpsc, oneshot};

/// How a worker lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Other weights multiply the masks.
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
}

impl Lie {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::MasksByOtherWeights,
        Self::BodiesByOtherWeights,
        Self::AllByOtherWeights,
        Self::PairOfHalves,
        Self::OneEntry,
        Self::Noise,
        Self::Replay,
        Self::RowsSwapped,
    ];
}

/// A running worker that lies from some product on. Dropping it ends it.
pub struct Liar {
    /// Where it can be dialed.
    pub address: String,
    /// Its name.
    pub peer: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    /// Starts a worker that answers `honest` products of bodies as it should and lies in all others.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(model: &Path, lie: Lie, honest: usize) -> Self {
        let (tell, told) = sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let model = model.to_owned();
        let work = async move {
            let service = Lying::start(&model, lie, honest).await;
            let mut swarm = SwarmConfig::new(Identity::ephemeral(), SwarmRole::Worker);
            swarm.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")];
            let swarm = SwarmHandle::start(swarm).await.expect("a port is free");
            let serving = serve(&swarm, Arc::new(service), ServeConfig::default()).await.expect("nobody else serves");
            let place = (swarm.listening()[0].to_string(), swarm.local_peer().to_base58());
            tell.send(place).expect("the test waits");
            // It ends with the test, however that ends.
            let _ = stopped.await;
            drop(serving);
            swarm.shut_down();
        };
        let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads and timers");
        let thread = std::thread::spawn(move || actix::System::with_tokio_rt(runtime).block_on(work));
        let (address, peer) = told.recv().expect("the worker starts");
        Self { address, peer, stop: Some(stop), thread: Some(thread) }
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
    lie: Lie,
    honest: usize,
    answered: AtomicUsize,
    right: Worker,
    wrong: Worker,
    earlier: Earlier,
}

impl Lying {
    async fn start(model: &Path, lie: Lie, honest: usize) -> Self {
        let source = || ModelSource::new(Arc::new(Model::open(model).expect("a model"))).expect("its digest");
        let worker = async |source: Arc<dyn ShardSource>| {
            let devices: Vec<Arc<dyn Device>> = vec![Arc::new(CpuDevice::new(best_kernel()))];
            let limits = WorkerLimits::default();
            Worker::start(source, devices, Split::Layers, limits, || 0).await.expect("a worker starts")
        };
        let (right, wrong) = (worker(Arc::new(source())).await, worker(Arc::new(Altered(source()))).await);
        Self { lie, honest, answered: AtomicUsize::new(0), right, wrong, earlier: Arc::default() }
    }

    /// Whether this product is answered wrongly.
    fn lies(&self, header: &ProductHeader) -> bool {
        match header.operand {
            Operand::Masks { .. } => matches!(self.lie, Lie::MasksByOtherWeights | Lie::AllByOtherWeights),
            Operand::Body { .. } => {
                let answered = self.answered.fetch_add(1, Ordering::Relaxed);
                answered >= self.honest && self.lie != Lie::MasksByOtherWeights
            }
        }
    }
}

#[async_trait]
impl WorkerService for Lying {
    async fn control(&self, owner: &PeerName, request: ControlRequest) -> ControlReply {
        let of_wrong = self.wrong.control(owner, request.clone()).await;
        match (self.right.control(owner, request).await, of_wrong) {
            // It is ready when both are.
            (ControlReply::Health(mut right), ControlReply::Health(wrong)) => {
                right.loaded = right.loaded.min(wrong.loaded);
                ControlReply::Health(right)
            }
            (reply, _) => reply,
        }
    }

    async fn admit(&self, owner: &PeerName, header: &ProductHeader) -> Result<Box<dyn Admitted>, Refusal> {
        let lies = self.lies(header);
        let by_other_weights =
            matches!(self.lie, Lie::MasksByOtherWeights | Lie::BodiesByOtherWeights | Lie::AllByOtherWeights);
        let worker = if lies && by_other_weights { &self.wrong } else { &self.right };
        let admitted = worker.admit(owner, header).await?;
        let lie = (lies && !by_other_weights).then_some(self.lie);
        Ok(Box::new(Altering { admitted, lie, header: header.clone(), earlier: Arc::clone(&self.earlier) }))
    }

    fn serves(&self, peer: &PeerName) -> bool {
        self.right.serves(peer)
    }

    async fn left(&self, peer: &PeerName) {
        self.right.left(peer).await;
        self.wrong.left(peer).await;
    }
}

struct Altering {
    admitted: Box<dyn Admitted>,
    lie: Option<Lie>,
    header: ProductHeader,
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
        let Self { admitted, lie, header, earlier } = *self;
        let Answer { mut tiles, time, place } = admitted.begin(body).await?;
        let mut all = Vec::new();
        while let Some(tile) = tiles.recv().await {
            all.push(tile?);
        }
        if matches!(header.operand, Operand::Body { .. }) {
            let key = (header.product, header.rows());
            let first = earlier.lock().expect("nobody panicked").entry(key).or_insert_with(|| all.clone()).clone();
            match lie {
                Some(Lie::Replay) => all = first,
                Some(lie) => all.iter_mut().for_each(|tile| alter(lie, &mut tile.rows)),
                None => {}
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
    let half = 1_u64 << (8 * planes.limbs() - 1);
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
        Lie::MasksByOtherWeights | Lie::BodiesByOtherWeights | Lie::AllByOtherWeights | Lie::Replay => {}
    }
}
