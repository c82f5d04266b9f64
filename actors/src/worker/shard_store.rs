//! The layers that a worker holds: who asked for which, on which devices they lie, how far loading has come, and the
//! matrices in the devices' memory.
//!
//! An owner's layers go through three states: *wanted* (assigned, in the queue), *loading* (one matrix at a time, on a
//! thread that may block), *loaded*. Matrices that no owner wants any more are dropped at once; a load that ends after
//! that is thrown away. Owners share what they both want. Who may keep layers is decided by [`super::tenants`].
//!
//! Where layers lie is decided when they are assigned ([`super::spread`]), before anything is loaded: layers for which a
//! device has no memory are refused. What another owner has stays where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use protocol::ids::LinearId;
use protocol::ids::ModelDigest;
use protocol::wire::messages::Refusal;

use super::parts::HeldLinear;
use super::place::Accounts;
use super::source::{ShardSource, SourceError};
use super::spread::{Part, Place, Spread};
use super::tenants::{Full, TenancyLimits, Tenants};
use crate::matmul::Device;
use crate::transport::PeerName;

/// Messages that may wait for the store: each is answered in microseconds.
const MAILBOX: usize = 256;

/// For whom a store holds layers.
pub struct StoreAccess {
    /// Owners at a time, and how long they keep their layers when another owner wants them.
    pub tenancy: TenancyLimits,
    /// The owners that may ask; nobody means anybody.
    pub allowed: BTreeSet<PeerName>,
    /// The accounts of those that have layers, which the store opens and closes.
    pub accounts: Arc<Accounts>,
}

/// See the module's documentation.
pub struct ShardStore {
    source: Arc<dyn ShardSource>,
    devices: Arc<[Arc<dyn Device>]>,
    spread: Spread,
    allowed: BTreeSet<PeerName>,
    accounts: Arc<Accounts>,
    tenants: Tenants,
    /// Of every wanted layer.
    places: BTreeMap<u16, Place>,
    loaded: BTreeMap<LinearId, Loaded>,
    failed: BTreeMap<LinearId, SourceError>,
    loading: Option<Loading>,
}

/// The matrix that is being loaded.
struct Loading {
    linear: LinearId,
    /// An owner has asked for its layer since the load began, perhaps because of what the load is about to fail of.
    asked_anew: bool,
}

/// A matrix in the memory of the devices on which its layer lies.
struct Loaded {
    place: Place,
    held: Arc<HeldLinear>,
}

impl ShardStore {
    /// An empty store over devices, on which layers lie as `spread` says.
    pub fn new(
        source: Arc<dyn ShardSource>,
        devices: Arc<[Arc<dyn Device>]>,
        spread: Spread,
        access: StoreAccess,
    ) -> Self {
        let StoreAccess { tenancy, allowed, accounts } = access;
        Self {
            source,
            devices,
            spread,
            allowed,
            accounts,
            tenants: Tenants::new(tenancy),
            places: BTreeMap::new(),
            loaded: BTreeMap::new(),
            failed: BTreeMap::new(),
            loading: None,
        }
    }

    fn wanted(&self) -> BTreeSet<u16> {
        self.tenants.iter().flat_map(|(_, layers)| layers).collect()
    }

    fn assign(&mut self, owner: PeerName, model: ModelDigest, layers: Range<u16>, now: Instant) -> Result<(), Refusal> {
        if !self.allowed.is_empty() && !self.allowed.contains(&owner) {
            return Err(not_allowed(&owner));
        }
        if model != self.source.digest() {
            return Err(Refusal::Model(self.source.digest()));
        }
        if layers.is_empty() {
            return Err(Refusal::Malformed("an assignment of no layers".into()));
        }
        if layers.end > self.source.layers() {
            let (start, end, count) = (layers.start, layers.end, self.source.layers());
            return Err(Refusal::Layers(format!("layers {start}..{end} of a model of {count} layers")));
        }
        let displaced = self.tenants.displaced_by(&owner, now).map_err(|Full { wait }| {
            let seconds = wait.as_secs() + 1;
            Refusal::Capacity(format!("all its places are taken by other owners, for another {seconds} s at least"))
        })?;

        let staying = self.tenants.iter().filter(|(name, _)| **name != owner && !displaced.contains(*name));
        let others: BTreeSet<u16> = staying.flat_map(|(_, layers)| layers).collect();
        let mut places = self.places.clone();
        places.retain(|layer, _| others.contains(layer));
        let fresh: Vec<u16> = layers.clone().filter(|layer| !places.contains_key(layer)).collect();
        let fresh = self.spread.place(&places, &fresh).map_err(|error| Refusal::Capacity(error.to_string()))?;
        places.extend(fresh);
        for name in displaced {
            tracing::info!(owner = %name, "an idle owner's layers are given up");
            self.tenants.remove(&name);
            self.accounts.close(&name);
        }
        tracing::info!(%owner, start = layers.start, end = layers.end, "layers assigned");
        self.failed.retain(|linear, _| !layers.contains(&linear.layer));
        if let Some(loading) = &mut self.loading {
            loading.asked_anew |= layers.contains(&loading.linear.layer);
        }
        self.accounts.open(owner.clone());
        self.tenants.assign(owner, layers, now);
        self.places = places;
        self.forget_unwanted();
        self.note_loaded(now);
        Ok(())
    }

    /// Tells the book of owners whose layers are loaded.
    fn note_loaded(&mut self, now: Instant) {
        let of_owner = |(name, layers): (&PeerName, Range<u16>)| self.is_loaded(layers).then(|| name.clone());
        let loaded: Vec<PeerName> = self.tenants.iter().filter_map(of_owner).collect();
        loaded.iter().for_each(|name| self.tenants.loaded(name, now));
    }

    fn is_loaded(&self, mut layers: Range<u16>) -> bool {
        layers.all(|layer| self.matrices_of(layer).all(|linear| self.loaded.contains_key(&linear)))
    }

    fn matrices_of(&self, layer: u16) -> impl Iterator<Item = LinearId> + use<> {
        self.source.groups(layer).iter().map(move |&group| LinearId { layer, group })
    }

    fn forget_unwanted(&mut self) {
        let wanted = self.wanted();
        self.places.retain(|layer, _| wanted.contains(layer));
        // A layer that is to lie elsewhere is loaded anew.
        self.loaded.retain(|linear, loaded| self.places.get(&linear.layer) == Some(&loaded.place));
        self.failed.retain(|linear, _| wanted.contains(&linear.layer));
    }

    fn next_to_load(&self) -> Option<LinearId> {
        let missing = |linear: &LinearId| !self.loaded.contains_key(linear) && !self.failed.contains_key(linear);
        self.places.keys().flat_map(|&layer| self.matrices_of(layer)).find(missing)
    }

    /// Begins to load the next wanted matrix, unless one is loading.
    fn advance(&mut self, context: &mut Context<Self>) {
        if self.loading.is_some() {
            return;
        }
        let Some(linear) = self.next_to_load() else { return };
        let Some(&place) = self.places.get(&linear.layer) else { return };
        self.loading = Some(Loading { linear, asked_anew: false });
        let (source, devices) = (Arc::clone(&self.source), Arc::clone(&self.devices));
        let parts = self.spread.parts(place, linear.group);
        let load = tokio::task::spawn_blocking(move || load(source.as_ref(), &devices, &parts, linear));
        context.spawn(load.into_actor(self).map(move |loaded, store, context| {
            let asked_anew = store.loading.take().is_some_and(|loading| loading.asked_anew);
            let panicked = |_| Err(SourceError { linear, why: "loading panicked; this is a bug".into() });
            match loaded.unwrap_or_else(panicked) {
                Ok(held) => drop(store.loaded.insert(linear, Loaded { place, held: Arc::new(held) })),
                // Where it is to lie elsewhere by now, or was asked for anew, that is tried next.
                Err(error) if asked_anew || store.places.get(&linear.layer) != Some(&place) => {
                    tracing::warn!(%error, "a matrix that is wanted no more, elsewhere or anew was not loaded");
                }
                Err(error) => {
                    tracing::error!(%error, "a matrix is missing");
                    store.failed.insert(linear, error);
                }
            }
            store.forget_unwanted();
            store.note_loaded(Instant::now());
            store.advance(context);
        }));
    }

    fn progress(&self, owner: &PeerName) -> Progress {
        let Some(layers) = self.tenants.layers(owner) else { return Progress::default() };
        let is_loaded = |&layer: &u16| self.is_loaded(layer..layer + 1);
        let loaded = layers.clone().filter(is_loaded).count() as u16;
        let failure = self.failed.iter().find(|(linear, _)| layers.contains(&linear.layer));
        Progress { layers, loaded, failure: failure.map(|(_, error)| error.to_string()) }
    }

    fn find(&self, owner: &PeerName, linear: LinearId) -> Result<Arc<HeldLinear>, Refusal> {
        let layers = self.tenants.layers(owner);
        if !layers.is_some_and(|layers| layers.contains(&linear.layer)) {
            return Err(Refusal::Layers(format!("{linear}: it is not assigned to this owner")));
        }
        if let Some(error) = self.failed.get(&linear) {
            return Err(Refusal::Failed(error.to_string()));
        }
        let held = self.loaded.get(&linear).map(|loaded| Arc::clone(&loaded.held));
        held.ok_or_else(|| Refusal::Layers(format!("{linear} yet: it is still loading")))
    }
}

/// What an owner is told that is not on the list.
pub(super) fn not_allowed(owner: &PeerName) -> Refusal {
    Refusal::Capacity(format!(
        "it serves only owners that it was told of; if it is yours, add {owner} to worker.owners (--owner) there"
    ))
}

/// Reads one matrix and gives the devices their parts of it.
fn load(
    source: &dyn ShardSource,
    devices: &[Arc<dyn Device>],
    parts: &[Part],
    linear: LinearId,
) -> Result<HeldLinear, SourceError> {
    let failed = |why: String| SourceError { linear, why };
    let (matrix, _) = source.load(linear)?;
    let shape = source.shape(linear);
    if matrix.shape != shape || shape.d_in.checked_mul(shape.d_out) != Some(matrix.values.len()) {
        return Err(failed("the matrix does not have the shape of its layer".into()));
    }
    HeldLinear::hold(devices, parts, &matrix).map_err(|error| failed(error.to_string()))
}

impl Actor for ShardStore {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
        // After a restart the matrix that was loading is wanted again.
        self.loading = None;
        self.advance(context);
    }
}

impl Supervised for ShardStore {}

/// Gives an owner some layers instead of those that it had; loading begins.
#[derive(Message)]
#[rtype(result = "Result<(), Refusal>")]
pub struct AssignShard {
    /// Who asks.
    pub owner: PeerName,
    /// The model that it means.
    pub model: ModelDigest,
    /// Layers of the model, the slices of its head counted on.
    pub layers: Range<u16>,
}

impl Handler<AssignShard> for ShardStore {
    type Result = Result<(), Refusal>;

    fn handle(&mut self, message: AssignShard, context: &mut Self::Context) -> Self::Result {
        let assigned = self.assign(message.owner, message.model, message.layers, Instant::now());
        self.advance(context);
        assigned
    }
}

/// An owner needs its layers no more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ReleaseShard(pub PeerName);

impl Handler<ReleaseShard> for ShardStore {
    type Result = ();

    fn handle(&mut self, ReleaseShard(owner): ReleaseShard, _context: &mut Self::Context) {
        self.tenants.remove(&owner);
        self.accounts.close(&owner);
        self.forget_unwanted();
    }
}

/// An owner asked for a product and sent what is multiplied: its time begins anew. A refusal where its layers have been
/// given up meanwhile.
#[derive(Message)]
#[rtype(result = "Result<(), Refusal>")]
pub struct RenewLease(pub PeerName);

impl Handler<RenewLease> for ShardStore {
    type Result = Result<(), Refusal>;

    fn handle(&mut self, RenewLease(owner): RenewLease, _context: &mut Self::Context) -> Self::Result {
        let used = self.tenants.used(&owner, Instant::now());
        used.then_some(()).ok_or_else(|| Refusal::Layers("this owner any more".into()))
    }
}

/// An owner's last connection was closed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct OwnerLeft(pub PeerName);

impl Handler<OwnerLeft> for ShardStore {
    type Result = ();

    fn handle(&mut self, OwnerLeft(owner): OwnerLeft, _context: &mut Self::Context) {
        self.tenants.absent(&owner, Instant::now());
    }
}

/// How far an owner's layers are.
#[derive(Message)]
#[rtype(result = "Progress")]
pub struct AskProgress(pub PeerName);

/// Answer to [`AskProgress`]; empty for an owner that was assigned nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, MessageResponse)]
pub struct Progress {
    /// Layers assigned.
    pub layers: Range<u16>,
    /// Layers of them that are loaded.
    pub loaded: u16,
    /// Why a matrix of them could not be loaded.
    pub failure: Option<String>,
}

impl Handler<AskProgress> for ShardStore {
    type Result = Progress;

    fn handle(&mut self, AskProgress(owner): AskProgress, _context: &mut Self::Context) -> Progress {
        self.progress(&owner)
    }
}

/// A matrix for one of an owner's products.
#[derive(Message)]
#[rtype(result = "Result<Arc<HeldLinear>, Refusal>")]
pub struct FindMatrix {
    /// Who asks.
    pub owner: PeerName,
    /// The served matrix.
    pub linear: LinearId,
}

impl Handler<FindMatrix> for ShardStore {
    type Result = Result<Arc<HeldLinear>, Refusal>;

    fn handle(&mut self, message: FindMatrix, _context: &mut Self::Context) -> Self::Result {
        self.find(&message.owner, message.linear)
    }
}

/// What is free for more layers?
#[derive(Message)]
#[rtype(result = "Room")]
pub struct AskRoom;

/// Answer to [`AskRoom`].
#[derive(Clone, Debug, PartialEq, Eq, MessageResponse)]
pub struct Room {
    /// Free memory of each device, bytes. Devices without memory of their own share theirs.
    pub memory_bytes: Vec<u64>,
    /// Layers that fit, at most as many as the model has.
    pub layers: u16,
}

impl Handler<AskRoom> for ShardStore {
    type Result = Room;

    fn handle(&mut self, _message: AskRoom, _context: &mut Self::Context) -> Room {
        let places = || self.places.values().copied();
        let layers = self.source.layers();
        let room = self.spread.room(places(), usize::from(layers));
        Room { memory_bytes: self.spread.free(places()), layers: u16::try_from(room).unwrap_or(layers) }
    }
}
