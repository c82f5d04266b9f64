//! The key manager: where the secrets of calls live.
//!
//! Rows come in, a ciphertext and the number of a ticket go out; tiles of the answer come in with that number, verified rows
//! go out. Nothing computed from an answer is handed out before all of it has been verified ([`protocol::sketch`]). The ticket, which holds the one-time secrets, never leaves the actor's own futures: it is taken out of
//! the table by the first decryption and destroyed with it, whether decryption succeeds or not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use protocol::buffer::Buffer;
use protocol::he::{MaskProduct, MaskSeed, Plaintext, Planes, RowError, Ticket, encrypt};
use protocol::ids::{LinearId, ProductId};
use protocol::quant::{QuantError, Step};
use protocol::sketch::{Checked, Refuted};
use protocol::wire::messages::ProductHeader;

use super::CallNumbers;
use super::call::{self, Call, Opened};
use super::clock::PhaseClock;
use super::table::LayerTable;
use crate::heavy::{Panicked, on_rayon};
use crate::transport::{TileStream, TransportError};

/// Tickets that may be out or in the making at a time: far above what micro-batches in flight can need, so that reaching it means
/// that tickets are being lost.
const TICKETS_OUT: usize = 256;

/// Why a product was not encrypted or not decrypted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The owner has no scales for this layer.
    #[error("{0} is not in the owner's layer table")]
    UnknownLinear(LinearId),
    /// Rows that cannot be encoded.
    #[error("rows cannot be encoded: {0}")]
    Encode(#[from] QuantError),
    /// The product came back in another size than it was decrypted to.
    #[error("decrypted rows cannot be decoded: {0}")]
    Decode(QuantError),
    /// Encryption refused its input.
    #[error("encryption failed: {0}")]
    Encrypt(#[from] protocol::he::EncryptError),
    /// The answer does not fit the product.
    #[error("the answer cannot be decrypted: {0}")]
    Decrypt(#[from] protocol::he::DecryptError),
    /// The answer is not the product that was asked for: the worker lied, or its memory did.
    #[error("the answer is refused: {0}")]
    Refuted(#[from] Refuted),
    /// The answer did not arrive whole.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No such ticket: it was used, discarded, or never issued.
    #[error("ticket {0} does not exist: a secret is used once")]
    NoTicket(u64),
    /// Tickets are being lost.
    #[error("{TICKETS_OUT} products wait for an answer: no more are encrypted")]
    TooManyTickets,
    /// A bug.
    #[error(transparent)]
    Panicked(#[from] Panicked),
}

impl From<RowError<QuantError>> for KeyError {
    fn from(error: RowError<QuantError>) -> Self {
        match error {
            RowError::Make(error) => Self::Encode(error),
            RowError::Encrypt(error) => Self::Encrypt(error),
        }
    }
}

/// A product ready to be sent.
#[derive(Debug)]
pub(crate) struct Sealed {
    /// Names the call and its ticket.
    pub(crate) header: ProductHeader,
    /// `tokens × inner` values of `body_bits`.
    pub(crate) body: Arc<Planes>,
    /// Columns of the answer.
    pub(crate) outer: usize,
}

/// Asks for rows to be encrypted for one product.
#[derive(Message)]
#[rtype(result = "Result<Sealed, KeyError>")]
pub(crate) struct Encrypt {
    pub(crate) product: ProductId,
    /// `tokens × inner`, row-major.
    pub(crate) rows: Arc<Buffer>,
    pub(crate) tokens: usize,
    /// How fine.
    pub(crate) step: Step,
}

/// Asks for an answer to be decrypted as its tiles arrive, and verified; the reply is `tokens × outer`, row-major.
#[derive(Message)]
#[rtype(result = "Result<Checked<Buffer>, KeyError>")]
pub(crate) struct Decrypt {
    pub(crate) call: u64,
    /// The product of the mask by the same matrix.
    pub(crate) masks: Arc<MaskProduct>,
    pub(crate) tiles: TileStream<TransportError>,
    /// When the product was sent, for the phase clock.
    pub(crate) sent: Instant,
}

/// Destroys the ticket of a product that will get no answer.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Discard(pub(crate) u64);

/// The actor. See the module's documentation.
pub struct KeyManager {
    seed: MaskSeed,
    table: Arc<LayerTable>,
    clock: Arc<PhaseClock>,
    tickets: HashMap<u64, Call<Ticket>>,
    /// Encryptions under way, whose tickets are still to come.
    sealing: usize,
    calls: CallNumbers,
}

impl KeyManager {
    /// A key manager for the layers of `table` that encrypts under the masks of `seed`, numbers its calls by
    /// `calls` and counts its time on `clock`.
    pub(super) fn new(seed: MaskSeed, table: Arc<LayerTable>, calls: CallNumbers, clock: Arc<PhaseClock>) -> Self {
        Self { seed, table, clock, tickets: HashMap::new(), sealing: 0, calls }
    }
}

impl Actor for KeyManager {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(2 * TICKETS_OUT);
    }
}

impl Supervised for KeyManager {}

impl Handler<Encrypt> for KeyManager {
    type Result = ResponseActFuture<Self, Result<Sealed, KeyError>>;

    fn handle(&mut self, message: Encrypt, _context: &mut Self::Context) -> Self::Result {
        let (calls, seed) = (self.calls.clone(), self.seed);
        let (table, clock) = (Arc::clone(&self.table), Arc::clone(&self.clock));
        let crowded = self.tickets.len() + self.sealing >= TICKETS_OUT;
        self.sealing += 1;
        let work = async move {
            if crowded {
                return Err(KeyError::TooManyTickets);
            }
            on_rayon(move || {
                let start = Instant::now();
                // Calls may be counted in a file: no actor waits for that.
                let under_fresh_secrets =
                    |domain: &_, precision, plaintext: Plaintext<'_>| encrypt(&seed, domain, precision, plaintext);
                let sealed = call::seal(&table, calls.next(), &message, under_fresh_secrets);
                clock.add_encrypt(start.elapsed());
                sealed
            })
            .await?
        };
        Box::pin(work.into_actor(self).map(|result, actor, _context| {
            actor.sealing -= 1;
            let (sealed, call) = result?;
            actor.tickets.insert(sealed.header.call, call);
            Ok(sealed)
        }))
    }
}

impl Handler<Decrypt> for KeyManager {
    type Result = ResponseFuture<Result<Checked<Buffer>, KeyError>>;

    fn handle(&mut self, message: Decrypt, _context: &mut Self::Context) -> Self::Result {
        let call = self.tickets.remove(&message.call).ok_or(KeyError::NoTicket(message.call));
        let (table, clock) = (Arc::clone(&self.table), Arc::clone(&self.clock));
        Box::pin(async move {
            let Decrypt { masks, tiles, sent, .. } = message;
            let Opened { rows, exchange, decrypting } = call?.with(masks).open(&table, tiles, sent).await?;
            clock.add_product(exchange, decrypting);
            Ok(rows)
        })
    }
}

impl Handler<Discard> for KeyManager {
    type Result = ();

    fn handle(&mut self, Discard(call): Discard, _context: &mut Self::Context) {
        self.tickets.remove(&call);
    }
}
