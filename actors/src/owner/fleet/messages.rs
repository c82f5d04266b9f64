//! What a fleet is told and what it answers.

use std::ops::Range;
use std::time::Duration;

use super::member::Presence;
use super::speed::Measured;
use crate::transport::PeerName;

/// How a fleet is run.
#[derive(Clone, Debug)]
pub struct FleetSettings {
    /// Workers that are to serve each layer, where there are enough.
    pub replicas: u16,
    /// How long a run waits for a layer that nobody serves.
    pub patience: Duration,
    /// Workers that are never asked.
    pub banned: Vec<PeerName>,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self { replicas: 1, patience: Duration::from_secs(600), banned: Vec::new() }
    }
}

/// How a product failed, as far as it is the worker's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It did not answer, or not to the end.
    Away,
    /// It has too much to do.
    Busy,
    /// It says that it does not serve the layer.
    NotServing,
    /// It says that it cannot.
    Unable,
    /// Its answer is no answer.
    Garbled,
    /// Its product of a body is not the product.
    BodyRefuted,
    /// Its product of a mask is not the product: no honest worker makes that mistake.
    MaskRefuted,
}

/// How a worker says that it does.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    /// Layers that it was told to serve.
    pub(crate) layers: Range<u16>,
    /// Layers of these that it has loaded.
    pub(crate) loaded: u16,
    /// Why it cannot load them.
    pub(crate) failure: Option<String>,
    /// Layers that it has room for beside these, if it was asked.
    pub(crate) beside: Option<u16>,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A worker offers: room for so many layers, if it has none for this owner yet.
    Offered { peer: PeerName, room: u16, claimed: f64, device: String },
    /// All that offered so far are known: layers may be assigned from now on.
    Begin,
    /// The connection to a worker was lost.
    Lost { peer: PeerName, why: String },
    /// A worker said how it does.
    Health { peer: PeerName, health: Health },
    /// A worker accepted its layers.
    Assigned { peer: PeerName },
    /// A worker refused its layers.
    Refused { peer: PeerName, why: String },
    /// A worker was told that it has no layers any more, or could not be told.
    Released { peer: PeerName },
    /// A worker did not answer a question.
    Silent { peer: PeerName, why: String },
    /// A product was sent.
    Sent { peer: PeerName },
    /// A product came back whole.
    Done { peer: PeerName, measured: Measured },
    /// A product did not.
    Failed { peer: PeerName, layer: u16, failure: Failure, why: String },
    /// A product that was sent is waited for no more: it would have taken longer than this.
    Dropped { peer: PeerName, waited: Measured },
    /// A product takes many times the usual.
    Slow { peer: PeerName },
    /// Time went on.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Command {
    /// Have a worker serve these layers and no others. Ends with `Assigned`, `Refused` or `Silent`.
    Assign { peer: PeerName, layers: Range<u16> },
    /// Tell a worker that it has no layers any more. Ends with `Released`.
    Release { peer: PeerName },
    /// Ask a worker how it does, after its offer if that is wanted. Ends with `Health` or `Silent`.
    Ask { peer: PeerName, offer: bool },
    /// Never ask a worker again, in no run. It ever served these layers, or some of them.
    Ban { peer: PeerName, why: String, served: Range<u16> },
    /// Tell the user.
    Say(String),
    /// Nobody serves a layer, and the patience is over.
    GiveUp(String),
}

/// What became of a worker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) peer: PeerName,
    pub(crate) device: String,
    pub(crate) presence: Presence,
    /// Layers that it was told to serve.
    pub(crate) assigned: Range<u16>,
    /// Layers of these that it has loaded.
    pub(crate) loaded: u16,
    /// From the first to the last layer that it ever served.
    pub(crate) served: Range<u16>,
    /// Products that came back whole.
    pub(crate) calls: u64,
}
