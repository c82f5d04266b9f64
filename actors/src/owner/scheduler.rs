//! The layer scheduler: which worker holds which layers, and the way of each product through them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use protocol::ids::ModelDigest;
use protocol::ids::{LinearId, ProductId};
use protocol::quant::Step;
use protocol::sketch::Refuted;
use protocol::wire::messages::{ControlReply, ControlRequest, Refusal, WorkerHealth, WorkerOffer};
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::assignment::{Capacity, NotEnoughMemory, split_layers};
use super::keys::{Decrypt, Discard, Encrypt, KeyError, KeyManager, Opened};
use super::masks::{MaskCache, MaskError};
use crate::buffer::Buffer;
use crate::trace::FLIGHT;
use crate::transport::{PeerName, ProductRequest, Transport, TransportError};

/// Times that a product is sent to a worker that does not answer before the scheduler gives up on it.
const ATTEMPTS: u32 = 3;
/// Times that it is sent to one that answers that it is busy: with the pauses between them, about a minute.
const ATTEMPTS_BUSY: u32 = 10;
/// Pause before the second attempt; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often a worker that loads its layers is asked how far it is.
const LOADING_POLL: Duration = Duration::from_millis(200);

/// How long a worker may take for one more layer: many times what a slow disk needs for the largest, so that only a
/// worker that hangs, or says that it loads and does not, is given up.
const LOADING_PATIENCE: Duration = Duration::from_secs(120);

/// Why a product or an assignment failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// No worker holds the layer.
    #[error("no worker serves {0}")]
    NoRoute(LinearId),
    /// The workers found are too small.
    #[error(transparent)]
    Memory(#[from] NotEnoughMemory),
    /// A worker failed, and went on failing.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The product of a mask could not be had.
    #[error(transparent)]
    Masks(#[from] MaskError),
    /// Encryption or decryption failed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A worker could not load what it was assigned.
    #[error("{peer} could not load its layers: {why}")]
    Loading {
        /// The worker.
        peer: PeerName,
        /// What it said.
        why: String,
    },
    /// A worker answered something else than it was asked.
    #[error("{0} gave an answer to another question")]
    WrongAnswer(PeerName),
    /// The key manager is gone.
    #[error("the key manager is gone ({0})")]
    Mailbox(#[from] MailboxError),
}

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

/// How loading goes: so many of so many layers at this worker.
#[derive(Clone, Debug)]
pub struct LoadingProgress {
    /// The worker.
    pub assignment: Assignment,
    /// Layers loaded.
    pub loaded: u16,
}

/// Asks for every layer of the model to be assigned and loaded.
#[derive(Message)]
#[rtype(result = "Result<Vec<Assignment>, ScheduleError>")]
pub struct AssignLayers {
    /// The model.
    pub model: ModelDigest,
    /// Its transformer layers.
    pub layers: u16,
    /// Who offered.
    pub candidates: Vec<Candidate>,
    /// Told of the loading; progress is dropped where nobody listens or the channel is full.
    pub progress: mpsc::Sender<LoadingProgress>,
}

/// Asks for a base-model product; see [`crate::backend::LinearBackend`].
#[derive(Message)]
#[rtype(result = "Result<Buffer, ScheduleError>")]
pub(crate) struct Apply {
    pub(crate) product: ProductId,
    pub(crate) rows: Arc<Buffer>,
    pub(crate) tokens: usize,
}

/// Asks every worker how it does.
#[derive(Message)]
#[rtype(result = "Vec<(Assignment, Result<WorkerHealth, TransportError>)>")]
pub struct AskHealth;

/// Tells every worker that its layers are no longer needed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ReleaseLayers;

/// The actor. See the module's documentation.
pub struct LayerScheduler {
    transport: Arc<dyn Transport>,
    keys: Addr<KeyManager>,
    masks: Arc<MaskCache>,
    assignments: Vec<Assignment>,
}

impl LayerScheduler {
    /// A scheduler without layers: [`AssignLayers`] comes first.
    pub(crate) fn new(transport: Arc<dyn Transport>, keys: Addr<KeyManager>, masks: Arc<MaskCache>) -> Self {
        Self { transport, keys, masks, assignments: Vec::new() }
    }

    fn route(&self, linear: LinearId) -> Result<PeerName, ScheduleError> {
        let holder = self.assignments.iter().find(|assignment| assignment.layers.contains(&linear.layer));
        holder.map(|assignment| assignment.peer.clone()).ok_or(ScheduleError::NoRoute(linear))
    }
}

impl Actor for LayerScheduler {
    type Context = Context<Self>;
}

impl Supervised for LayerScheduler {}

impl Handler<AssignLayers> for LayerScheduler {
    type Result = ResponseActFuture<Self, Result<Vec<Assignment>, ScheduleError>>;

    fn handle(&mut self, message: AssignLayers, _context: &mut Self::Context) -> Self::Result {
        let transport = Arc::clone(&self.transport);
        let work = async move {
            let assignments = plan(&message)?;
            let loading = assignments.iter().map(|assignment| {
                load(transport.as_ref(), message.model, assignment, &message.progress, LOADING_PATIENCE)
            });
            futures::future::try_join_all(loading).await?;
            Ok(assignments)
        };
        Box::pin(work.into_actor(self).map(|result: Result<Vec<Assignment>, ScheduleError>, actor, _context| {
            actor.assignments = result?;
            Ok(actor.assignments.clone())
        }))
    }
}

/// Layer ranges for the candidates; those that get none are left out.
fn plan(message: &AssignLayers) -> Result<Vec<Assignment>, ScheduleError> {
    let capacity = |candidate: &Candidate| Capacity {
        speed: candidate.offer.devices.iter().map(|device| device.macs_per_second).sum(),
        layers: candidate.offer.room,
    };
    let capacities: Vec<_> = message.candidates.iter().map(capacity).collect();
    let ranges = split_layers(message.layers, &capacities)?;
    let assignments = message.candidates.iter().zip(ranges).filter(|(_, layers)| !layers.is_empty());
    Ok(assignments
        .map(|(candidate, layers)| Assignment {
            peer: candidate.peer.clone(),
            layers,
            device: candidate.offer.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(" and "),
        })
        .collect())
}

/// Has one worker load its layers and waits until it has, as long as another layer comes within `patience`.
pub(super) async fn load(
    transport: &dyn Transport,
    model: ModelDigest,
    assignment: &Assignment,
    progress: &mpsc::Sender<LoadingProgress>,
    patience: Duration,
) -> Result<(), ScheduleError> {
    let peer = &assignment.peer;
    let request = ControlRequest::Assign { model, layers: assignment.layers.clone() };
    if transport.control(peer, request).await? != ControlReply::Assigned {
        return Err(ScheduleError::WrongAnswer(peer.clone()));
    }
    let (mut loaded, mut since) = (0, Instant::now());
    loop {
        let health = health(transport, peer).await?;
        if let Some(why) = health.failure {
            return Err(ScheduleError::Loading { peer: peer.clone(), why });
        }
        // Progress is for the eye: a full channel loses it without harm.
        let _ = progress.try_send(LoadingProgress { assignment: assignment.clone(), loaded: health.loaded });
        if usize::from(health.loaded) >= assignment.layers.len() {
            return Ok(());
        }
        if health.loaded > loaded {
            (loaded, since) = (health.loaded, Instant::now());
        } else if since.elapsed() > patience {
            let why = format!("{loaded} of {} were loaded, and no other within {patience:?}", assignment.layers.len());
            return Err(ScheduleError::Loading { peer: peer.clone(), why });
        }
        tokio::time::sleep(LOADING_POLL).await;
    }
}

async fn health(transport: &dyn Transport, peer: &PeerName) -> Result<WorkerHealth, ScheduleError> {
    match transport.control(peer, ControlRequest::Health).await? {
        ControlReply::Health(health) => Ok(health),
        _ => Err(ScheduleError::WrongAnswer(peer.clone())),
    }
}

impl Handler<Apply> for LayerScheduler {
    type Result = ResponseFuture<Result<Buffer, ScheduleError>>;

    fn handle(&mut self, message: Apply, _context: &mut Self::Context) -> Self::Result {
        let (transport, keys, masks) = (Arc::clone(&self.transport), self.keys.clone(), Arc::clone(&self.masks));
        let route = self.route(message.product.linear);
        Box::pin(async move {
            let peer = route?;
            let (mut attempt, mut pause) = (1, FIRST_PAUSE);
            loop {
                match whole_product(transport.as_ref(), &keys, &masks, &peer, &message).await {
                    Err(error) if attempt < attempts(&error) => {
                        tracing::warn!(%peer, product = %message.product, attempt, %error, "sending the product again");
                        tokio::time::sleep(pause).await;
                        pause = LONGEST_PAUSE.min(2 * pause);
                        attempt += 1;
                    }
                    result => return result,
                }
            }
        })
    }
}

/// Times that a product may be sent, each time encrypted anew, if it fails so: more than once only where the connection
/// failed or the worker was busy, not where it said no or lied.
fn attempts(error: &ScheduleError) -> u32 {
    let (ScheduleError::Transport(error)
    | ScheduleError::Masks(MaskError::Transport(error))
    | ScheduleError::Key(KeyError::Transport(error))) = error
    else {
        return 1;
    };
    match error {
        TransportError::Unreachable { .. } => ATTEMPTS,
        TransportError::Refused { refusal: Refusal::Busy(_), .. } => ATTEMPTS_BUSY,
        _ => 1,
    }
}

/// A product with the sketched step, and once more, with the provable one, of those rows that wrapped more than once.
async fn whole_product(
    transport: &dyn Transport,
    keys: &Addr<KeyManager>,
    masks: &MaskCache,
    peer: &PeerName,
    message: &Apply,
) -> Result<Buffer, ScheduleError> {
    let opened = match attempt_product(transport, keys, masks, peer, message, Step::Sketched).await?.whole() {
        Ok(rows) => return Ok(rows),
        Err(opened) => opened,
    };
    let inner = message.rows.len() / message.tokens;
    let rows: Vec<f32> = opened.again().iter().flat_map(|row| &message.rows[row * inner..][..inner]).copied().collect();
    let missing = Apply { product: message.product, rows: Arc::new(rows.into()), tokens: opened.again().len() };
    tracing::debug!(product = %message.product, rows = missing.tokens, "rows wrapped more than once");
    let missing = attempt_product(transport, keys, masks, peer, &missing, Step::Provable).await?;
    // At the provable step no row of an honest answer wraps.
    let missing = missing.whole().map_err(|_| {
        ScheduleError::Key(KeyError::Refuted(Refuted::Wraps {
            wrapped: opened.again().len(),
            rows: opened.again().len(),
        }))
    })?;
    Ok(opened.fill(&missing))
}

async fn attempt_product(
    transport: &dyn Transport,
    keys: &Addr<KeyManager>,
    masks: &MaskCache,
    peer: &PeerName,
    message: &Apply,
    step: Step,
) -> Result<Opened, ScheduleError> {
    let Apply { product, ref rows, tokens } = *message;
    let encrypt = Encrypt { product, rows: Arc::clone(rows), tokens, step };
    let (sealed, early) = futures::join!(keys.send(encrypt), masks.unless_filed(transport, peer, product));
    let sealed = sealed??;
    let (call, sent) = (sealed.header.call, Instant::now());
    let request = ProductRequest { header: sealed.header, body: Some(sealed.body), outer: sealed.outer };
    let flight = tracing::info_span!(target: FLIGHT, "product", call, %product, tokens);
    let answer = async {
        let masks = async {
            Ok(match early? {
                Some(masks) => masks,
                // It is read while the body travels.
                None => masks.product(transport, peer, product).await?,
            })
        };
        let tiles = async { Ok::<_, ScheduleError>(transport.product(peer, request).await?) };
        match futures::try_join!(masks, tiles) {
            Ok((masks, tiles)) => Ok(keys.send(Decrypt { call, masks, tiles, sent }).await??),
            Err(error) => {
                keys.send(Discard(call)).await?;
                Err(error)
            }
        }
    };
    answer.instrument(flight).await
}

impl Handler<AskHealth> for LayerScheduler {
    type Result = ResponseFuture<Vec<(Assignment, Result<WorkerHealth, TransportError>)>>;

    fn handle(&mut self, _message: AskHealth, _context: &mut Self::Context) -> Self::Result {
        let (transport, assignments) = (Arc::clone(&self.transport), self.assignments.clone());
        Box::pin(async move {
            let asked = assignments.into_iter().map(|assignment| async {
                let reply = transport.control(&assignment.peer, ControlRequest::Health).await;
                let health = reply.and_then(|reply| match reply {
                    ControlReply::Health(health) => Ok(health),
                    other => Err(TransportError::Protocol {
                        peer: assignment.peer.clone(),
                        what: format!("{other:?} answers no question about its health"),
                    }),
                });
                (assignment, health)
            });
            futures::future::join_all(asked).await
        })
    }
}

impl Handler<ReleaseLayers> for LayerScheduler {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _message: ReleaseLayers, _context: &mut Self::Context) -> Self::Result {
        let (transport, assignments) = (Arc::clone(&self.transport), std::mem::take(&mut self.assignments));
        Box::pin(async move {
            let released =
                assignments.iter().map(|assignment| transport.control(&assignment.peer, ControlRequest::Release));
            for (assignment, reply) in assignments.iter().zip(futures::future::join_all(released).await) {
                if let Err(error) = reply {
                    tracing::debug!(peer = %assignment.peer, %error, "a worker was not told that it is released");
                }
            }
        })
    }
}
