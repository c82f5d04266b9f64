//! What the fleet decides, carried out: its commands become control requests, and what comes of these its events.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use protocol::ids::{ModelDigest, ProductId};
use protocol::wire::messages::{ControlReply, ControlRequest, PROTOCOL_VERSION, Refusal, WorkerHealth};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::error::ScheduleError;
use super::{Candidate, Notice, ScheduleParts};
use crate::owner::fleet::{Command, Event, Fleet, Health};
use crate::owner::keys::KeyManager;
use crate::owner::masks::MaskCache;
use crate::owner::pads::PadStore;
use crate::owner::table::LayerTable;
use crate::transport::{PeerName, Transport, TransportError};

/// How long a worker may take to say how it does: it answers from memory, but perhaps on a busy machine. One that took
/// longer is gone until it answers again, and loses nothing by that.
const ANSWER: Duration = Duration::from_secs(6);
/// Pause after an answer that the worker is too busy to answer.
const BUSY_PAUSE: Duration = Duration::from_millis(300);
/// How long a worker may take to be told that it is released: the run is over, and its lease ends by itself.
const RELEASE: Duration = Duration::from_secs(3);

/// All that the scheduler's tasks share; they run on its thread.
pub(super) struct Shell {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) keys: Addr<KeyManager>,
    pub(super) masks: Arc<MaskCache>,
    pub(super) pads: Arc<PadStore>,
    pub(super) table: Arc<LayerTable>,
    began: Instant,
    fleet: RefCell<Option<Fleet>>,
    model: Cell<ModelDigest>,
    /// Woken whenever the fleet may have changed.
    changed: watch::Sender<()>,
    notices: Option<mpsc::Sender<Notice>>,
}

impl Shell {
    pub(super) fn new(parts: ScheduleParts) -> Rc<Self> {
        let ScheduleParts { transport, keys, masks, pads, table, notices } = parts;
        Rc::new(Self {
            transport,
            keys,
            masks,
            pads,
            table,
            began: Instant::now(),
            fleet: RefCell::new(None),
            model: Cell::new(ModelDigest([0; 32])),
            changed: watch::Sender::new(()),
            notices,
        })
    }

    /// Begins with a fleet that has no members yet.
    pub(super) fn begin(&self, fleet: Fleet, model: ModelDigest) {
        self.model.set(model);
        *self.fleet.borrow_mut() = Some(fleet);
    }

    /// What a question to the fleet gives; `None` before the run and after it.
    pub(super) fn ask<T>(&self, question: impl FnOnce(&Fleet) -> T) -> Option<T> {
        self.fleet.borrow().as_ref().map(question)
    }

    /// Tells the fleet what happened, and does what it says. Without a fleet, nothing matters any more.
    pub(super) fn tell(self: &Rc<Self>, event: Event) {
        let now = self.began.elapsed();
        let Some(commands) = self.fleet.borrow_mut().as_mut().map(|fleet| fleet.on(event, now)) else { return };
        self.changed.send_replace(());
        for command in commands {
            self.execute(command);
        }
    }

    /// A worker offers.
    pub(super) fn offered(self: &Rc<Self>, candidate: Candidate) {
        let Candidate { peer, offer } = candidate;
        let claimed = offer.devices.iter().map(|device| device.macs_per_second).sum();
        let names: Vec<_> = offer.devices.iter().map(|device| device.name.as_str()).collect();
        self.tell(Event::Offered { peer, room: offer.room, claimed, device: names.join(" and ") });
    }

    /// Something that may change where a product goes.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Waits until a worker cannot be asked any more.
    ///
    /// # Cancel safety
    /// It holds nothing.
    pub(super) async fn gone(&self, peer: &PeerName) {
        let mut changed = self.changes();
        while self.ask(|fleet| fleet.is_here(peer)).unwrap_or(false) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until every layer is served.
    ///
    /// # Errors
    /// When the patience is over.
    pub(super) async fn all_served(&self) -> Result<(), ScheduleError> {
        let mut changed = self.changes();
        loop {
            let ready = self.ask(|fleet| match fleet.given_up() {
                Some(why) => Err(ScheduleError::LostWorkers(why.to_owned())),
                None => Ok(fleet.serves_all()),
            });
            if ready.ok_or(ScheduleError::NotBegun)?? {
                return Ok(());
            }
            changed.changed().await.map_err(|_| ScheduleError::NotBegun)?;
        }
    }

    /// The worker for a product, waited for where there is none: one of those that it did not fail at, if possible.
    ///
    /// # Errors
    /// When the patience is over.
    pub(super) async fn route(&self, product: ProductId, except: &[PeerName]) -> Result<PeerName, ScheduleError> {
        let mut changed = self.changes();
        loop {
            let found = self.ask(|fleet| match fleet.given_up() {
                Some(why) => Err(ScheduleError::LostWorkers(why.to_owned())),
                None => Ok(fleet.route(product, except).or_else(|| fleet.route(product, &[])).cloned()),
            });
            if let Some(peer) = found.ok_or(ScheduleError::NotBegun)?? {
                return Ok(peer);
            }
            changed.changed().await.map_err(|_| ScheduleError::NotBegun)?;
        }
    }

    /// Ends the run: every worker that has layers is told that they are no longer needed.
    pub(super) async fn release(&self) {
        let Some(fleet) = self.fleet.borrow_mut().take() else { return };
        self.changed.send_replace(());
        let serving = fleet.records().into_iter().filter(|record| !record.assigned.is_empty());
        let released = serving.map(|record| async move {
            let told = timeout(RELEASE, self.transport.control(&record.peer, ControlRequest::Release)).await;
            if !matches!(told, Ok(Ok(_))) {
                tracing::debug!(peer = %record.peer, "a worker was not told that it is released");
            }
        });
        futures::future::join_all(released).await;
    }

    fn execute(self: &Rc<Self>, command: Command) {
        match command {
            Command::Say(text) => self.notify(Notice::Say(text)),
            Command::GiveUp(why) => self.notify(Notice::Say(format!("{why}: the run ends here"))),
            Command::Ban { peer, why, served } => {
                self.notify(Notice::Banned { peer, why });
                let table = Arc::clone(&self.table);
                // What it was caught with tells it something of the checks.
                drop(tokio::task::spawn_blocking(move || {
                    if let Err(error) = table.redraw(served) {
                        tracing::error!(%error, "the checks of a banned worker's layers stay as they are");
                    }
                }));
            }
            Command::Assign { .. } | Command::Release { .. } | Command::Ask { .. } => {
                let shell = Rc::clone(self);
                actix::spawn(async move {
                    let event = shell.exchange(command).await;
                    shell.tell(event);
                });
            }
        }
    }

    /// For people, and for the list of bans. A full channel loses it, which the log keeps.
    fn notify(&self, notice: Notice) {
        let lost = match &self.notices {
            Some(notices) => notices.try_send(notice).err().map(|error| error.into_inner()),
            None => Some(notice),
        };
        match lost {
            Some(Notice::Say(text)) => tracing::info!("{text}"),
            Some(Notice::Banned { peer, why }) => tracing::warn!(%peer, why, "a worker is banned for this run"),
            Some(Notice::Loading { .. }) | None => {}
        }
    }

    /// One question to a worker, and its answer or what stands for it.
    async fn exchange(&self, command: Command) -> Event {
        match command {
            Command::Assign { peer, layers } => {
                let request = ControlRequest::Assign { model: self.model.get(), layers };
                match self.control(&peer, request).await {
                    Ok(ControlReply::Assigned) => Event::Assigned { peer },
                    Ok(_) => Event::Silent { peer, why: "it gave an answer to another question".into() },
                    Err(TransportError::Refused { refusal, .. }) => Event::Refused { peer, why: refusal.to_string() },
                    Err(error) => Event::Silent { peer, why: what(error) },
                }
            }
            Command::Ask { peer, offer } => match self.how_it_does(&peer, offer).await {
                Ok(health) => Event::Health { peer, health },
                Err(error) => Event::Silent { peer, why: what(error) },
            },
            Command::Release { peer } => {
                if let Err(error) = self.control(&peer, ControlRequest::Release).await {
                    tracing::debug!(%peer, %error, "a worker was not told that it is released");
                }
                Event::Released { peer }
            }
            Command::Ban { .. } | Command::Say(_) | Command::GiveUp(_) => Event::Tick,
        }
    }

    async fn how_it_does(&self, peer: &PeerName, offer: bool) -> Result<Health, TransportError> {
        let beside = match offer {
            false => None,
            true => match self.control(peer, ControlRequest::Offer { version: PROTOCOL_VERSION }).await? {
                ControlReply::Offer(offer) if offer.model == self.model.get() => Some(offer.room),
                ControlReply::Offer(offer) => {
                    let what = format!("it serves model {} now", offer.model);
                    return Err(TransportError::Protocol { peer: peer.clone(), what });
                }
                other => return Err(another_question(peer, &other)),
            },
        };
        let WorkerHealth { layers, loaded, failure, .. } = health(self, peer).await?;
        if !layers.is_empty() {
            // Progress is for the eye: a full channel loses it without harm.
            let of = u16::try_from(layers.len()).unwrap_or(u16::MAX);
            self.notify(Notice::Loading { peer: peer.clone(), loaded, of });
        }
        Ok(Health { layers, loaded, failure, beside })
    }

    /// A control request, repeated while the worker says that it is busy.
    pub(super) async fn control(
        &self,
        peer: &PeerName,
        request: ControlRequest,
    ) -> Result<ControlReply, TransportError> {
        let ask = async {
            loop {
                match self.transport.control(peer, request.clone()).await {
                    Err(TransportError::Refused { refusal: Refusal::Busy(_), .. }) => {
                        tokio::time::sleep(BUSY_PAUSE).await;
                    }
                    reply => return reply,
                }
            }
        };
        let late = |_| TransportError::Unreachable { peer: peer.clone(), what: format!("no answer within {ANSWER:?}") };
        timeout(ANSWER, ask).await.map_err(late)?
    }
}

/// What a worker says of its health.
pub(super) async fn health(shell: &Shell, peer: &PeerName) -> Result<WorkerHealth, TransportError> {
    match shell.control(peer, ControlRequest::Health).await? {
        ControlReply::Health(health) => Ok(health),
        other => Err(another_question(peer, &other)),
    }
}

fn another_question(peer: &PeerName, reply: &ControlReply) -> TransportError {
    TransportError::Protocol { peer: peer.clone(), what: format!("{reply:?} answers another question") }
}

/// What happened, without the peer's name.
fn what(error: TransportError) -> String {
    match error {
        TransportError::Unreachable { what, .. } | TransportError::Protocol { what, .. } => what,
        error => error.to_string(),
    }
}
