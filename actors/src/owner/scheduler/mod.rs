//! The layer scheduler: the shell around the fleet, which decides, and the way of each product through it.

mod ahead;
mod error;
mod product;
mod shell;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use protocol::buffer::Buffer;
use protocol::ids::{ModelDigest, ProductId};
use protocol::sketch::Verified;
use protocol::wire::messages::{WorkerHealth, WorkerOffer};
use tokio::sync::mpsc;

pub use self::error::ScheduleError;
use self::shell::Shell;
use super::convoy::Seat;
use super::fleet::{Event, Fleet, FleetSettings, Presence};
use super::keys::KeyManager;
use super::masks::MaskCache;
use super::pads::PadStore;
use super::table::LayerTable;
use crate::transport::{PeerName, Transport};

/// How often the fleet is told that time goes on: it asks workers that load their layers about as often.
const TICK: Duration = Duration::from_millis(100);
/// Messages that may wait for the scheduler: each is taken in microseconds, and a trainer has few products in flight.
const MAILBOX: usize = 256;

/// A worker that offered to serve the model.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Who.
    pub peer: PeerName,
    /// What it offered.
    pub offer: WorkerOffer,
}

/// A worker and the layers that it holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Who.
    pub peer: PeerName,
    /// Contiguous transformer layers.
    pub layers: Range<u16>,
    /// Its devices, by name.
    pub device: String,
}

/// What the user, or the list of bans, should know.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Something happened to the fleet.
    Say(String),
    /// A worker has loaded so many of so many layers.
    Loading {
        /// Who.
        peer: PeerName,
        /// Layers loaded.
        loaded: u16,
        /// Layers assigned.
        of: u16,
    },
    /// A worker lied, and must not be asked in later runs either.
    Banned {
        /// Who.
        peer: PeerName,
        /// What it did.
        why: String,
    },
}

/// What became of a worker in a run.
#[derive(Clone, Debug)]
pub struct WorkerRecord {
    /// Who.
    pub peer: PeerName,
    /// Layers that it serves, or served: from the first to the last one ever.
    pub layers: Range<u16>,
    /// Its devices, by name.
    pub device: String,
    /// Products of it that the owner used.
    pub products: u64,
    /// Whether it is there, gone, or banned.
    pub presence: Presence,
    /// What it says of itself, if it answers.
    pub health: Option<WorkerHealth>,
}

/// What a scheduler works with.
pub(crate) struct ScheduleParts {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) keys: Addr<KeyManager>,
    pub(crate) masks: Arc<MaskCache>,
    pub(crate) pads: Arc<PadStore>,
    pub(crate) table: Arc<LayerTable>,
    /// Told what happens; without a listener, the log is.
    pub(crate) notices: Option<mpsc::Sender<Notice>>,
}

/// Asks for every layer of the model to be assigned and loaded. The answer is who serves what.
#[derive(Message)]
#[rtype(result = "Result<Vec<Assignment>, ScheduleError>")]
pub struct AssignLayers {
    /// The model.
    pub model: ModelDigest,
    /// Its transformer layers.
    pub layers: u16,
    /// Who offered.
    pub candidates: Vec<Candidate>,
    /// How the workers are treated.
    pub settings: FleetSettings,
}

/// Another worker offers, or one that is known offers again.
#[derive(Message)]
#[rtype(result = "()")]
pub struct WorkerOffered(pub Candidate);

/// The connection to a peer was lost.
#[derive(Message)]
#[rtype(result = "()")]
pub struct WorkerLost(pub PeerName);

/// Asks for a base-model product; see [`crate::backend::LinearBackend`].
#[derive(Message)]
#[rtype(result = "Result<Verified<Buffer>, ScheduleError>")]
pub(crate) struct Apply {
    pub(crate) product: ProductId,
    pub(crate) rows: Arc<Buffer>,
    pub(crate) tokens: usize,
    /// The place of the micro-batch that it is of, where several go side by side.
    pub(crate) seat: Option<Seat>,
}

/// Says that calls of few rows will come: pads are made for them from now on.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct ExpectFewRows;

/// Asks what every worker that ever served did.
#[derive(Message)]
#[rtype(result = "Vec<WorkerRecord>")]
pub struct AskHealth;

/// Tells every worker that its layers are no longer needed. No product can be had after it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ReleaseLayers;

/// The actor. See the module's documentation.
pub struct LayerScheduler {
    shell: Rc<Shell>,
}

impl LayerScheduler {
    /// A scheduler without layers: [`AssignLayers`] comes first. Call it on the thread that it is to run on.
    pub(crate) fn new(parts: ScheduleParts) -> Self {
        Self { shell: Shell::new(parts) }
    }
}

impl Actor for LayerScheduler {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
        context.run_interval(TICK, |actor, _context| actor.shell.tell(Event::Tick));
    }
}

impl Supervised for LayerScheduler {}

impl Handler<AssignLayers> for LayerScheduler {
    type Result = ResponseFuture<Result<Vec<Assignment>, ScheduleError>>;

    fn handle(&mut self, message: AssignLayers, _context: &mut Self::Context) -> Self::Result {
        let shell = Rc::clone(&self.shell);
        Box::pin(async move {
            let AssignLayers { model, layers, candidates, settings } = message;
            shell.begin(Fleet::new(layers, settings), model);
            candidates.into_iter().for_each(|candidate| shell.offered(candidate));
            shell.tell(Event::Begin);
            // Nobody has failed yet: workers that are too small now are too small.
            if let Some(short) = shell.ask(|fleet| fleet.short_of_memory().cloned()).flatten() {
                return Err(ScheduleError::Memory(short));
            }
            shell.all_served().await?;
            let records = shell.ask(Fleet::records).unwrap_or_default().into_iter();
            let serving = records.filter(|record| !record.assigned.is_empty());
            let assignment =
                serving.map(|record| Assignment { peer: record.peer, layers: record.assigned, device: record.device });
            Ok(assignment.collect())
        })
    }
}

impl Handler<WorkerOffered> for LayerScheduler {
    type Result = ();

    fn handle(&mut self, WorkerOffered(candidate): WorkerOffered, _context: &mut Self::Context) {
        self.shell.offered(candidate);
    }
}

impl Handler<WorkerLost> for LayerScheduler {
    type Result = ();

    fn handle(&mut self, WorkerLost(peer): WorkerLost, _context: &mut Self::Context) {
        self.shell.tell(Event::Lost { peer, why: "the connection was closed".into() });
    }
}

impl Handler<Apply> for LayerScheduler {
    type Result = ResponseFuture<Result<Verified<Buffer>, ScheduleError>>;

    fn handle(&mut self, message: Apply, _context: &mut Self::Context) -> Self::Result {
        Box::pin(product::apply(Rc::clone(&self.shell), message))
    }
}

impl Handler<ExpectFewRows> for LayerScheduler {
    type Result = ();

    fn handle(&mut self, _message: ExpectFewRows, _context: &mut Self::Context) {
        if self.shell.pads.want() {
            actix::spawn(ahead::fill(Rc::clone(&self.shell)));
        }
    }
}

impl Handler<AskHealth> for LayerScheduler {
    type Result = ResponseFuture<Vec<WorkerRecord>>;

    fn handle(&mut self, _message: AskHealth, _context: &mut Self::Context) -> Self::Result {
        let shell = Rc::clone(&self.shell);
        Box::pin(async move {
            let records = shell.ask(Fleet::records).unwrap_or_default();
            let served = records.into_iter().filter(|record| !record.served.is_empty());
            let shell = shell.as_ref();
            let asked = served.map(|record| async move {
                let health = match record.presence {
                    Presence::Here => shell::health(shell, &record.peer).await.ok(),
                    Presence::Gone(_) | Presence::Banned(_) => None,
                };
                let layers = if record.assigned.is_empty() { record.served } else { record.assigned };
                let (peer, device, presence) = (record.peer, record.device, record.presence);
                WorkerRecord { peer, layers, device, products: record.calls, presence, health }
            });
            futures::future::join_all(asked).await
        })
    }
}

impl Handler<ReleaseLayers> for LayerScheduler {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _message: ReleaseLayers, _context: &mut Self::Context) -> Self::Result {
        let shell = Rc::clone(&self.shell);
        shell.pads.close();
        Box::pin(async move { shell.release().await })
    }
}
