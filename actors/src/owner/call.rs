//! One call: rows rotated, encoded and encrypted, however that is done, and the answer decrypted as it comes and verified as a whole.
//!
//! The key manager encrypts with the secrets of the call itself. Where transforms were made before it, for a few rows with pads, or for those of
//! a micro-batch with its part of a block, what is left to be done for a row is rotating, sketching, adding and subtracting, some
//! microseconds: for a few rows with pads that is done on the thread that asks for it. All calls are alike in this: the ticket is a
//! value that its answer takes, nothing computed from an answer leaves before all of it is verified, and whoever drops a call
//! wipes what it was encrypted with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::buffer::Buffer;
use protocol::he::{
    DecryptError, Decryption, EncryptError, MaskDomain, MaskProduct, PadTicket, Plaintext, Planes, Precision,
    SharedAnswer, SharedRows, SharedTicket, Ticket,
};
use protocol::ids::ProductId;
use protocol::quant::RowScales;
use protocol::sketch::{Checked, Checks, Expected};
use protocol::wire::messages::{Operand, PROTOCOL_VERSION, ProductHeader};

use super::keys::{Encrypt, KeyError, Sealed};
use super::table::{LayerTable, TableEntry};
use crate::heavy::by_size;
use crate::trace::WORK;
use crate::transport::{TileStream, TransportError};

/// Tiles that are decrypted one after the other before others get their turn, where so many have come.
const TILES_AT_ONCE: usize = 8;

/// What an answer is decrypted with.
pub(super) trait Opens: Send + 'static {
    /// Whether few values take so little time that they are decrypted where they come: not where it takes transforms, or
    /// other threads are asked for parts of it.
    const QUICK: bool = false;

    /// Begins its decryption.
    fn open(self, out: Buffer) -> Result<Decryption<Buffer>, DecryptError>;
}

impl Opens for (Ticket, Arc<MaskProduct>) {
    fn open(self, out: Buffer) -> Result<Decryption<Buffer>, DecryptError> {
        let (ticket, masks) = self;
        let precision = ticket.precision();
        ticket.open(masks, precision, out)
    }
}

impl Opens for PadTicket {
    const QUICK: bool = true;

    fn open(self, out: Buffer) -> Result<Decryption<Buffer>, DecryptError> {
        Self::open(self, out)
    }
}

impl Opens for (SharedTicket, SharedAnswer) {
    fn open(self, out: Buffer) -> Result<Decryption<Buffer>, DecryptError> {
        let (ticket, answer) = self;
        ticket.open(answer, out)
    }
}

/// A call that was encrypted and has no answer yet.
pub(super) struct Call<T> {
    number: u64,
    product: ProductId,
    tokens: usize,
    outer: usize,
    ticket: T,
    scales: RowScales,
    checks: Arc<Checks>,
    expected: Expected,
}

/// What was opened, and how long it took: on the network and at the worker, and in decryption.
pub(super) struct Opened {
    pub(super) rows: Checked<Buffer>,
    pub(super) exchange: Duration,
    pub(super) decrypting: Duration,
}

/// Rotates and encodes rows and has them encrypted, under this number of a call.
///
/// # Errors
/// When the rows cannot be encoded or encrypted.
pub(super) fn seal<T>(
    table: &LayerTable,
    number: u64,
    message: &Encrypt,
    encrypt: impl FnOnce(&MaskDomain, Precision, Plaintext<'_>) -> Result<(Planes, T), EncryptError>,
) -> Result<(Sealed, Call<T>), KeyError> {
    let Encrypt { product, ref rows, tokens, step } = *message;
    let _span = tracing::info_span!(target: WORK, "encrypt", call = number, %product, tokens).entered();
    let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
    let (codec, checks) = (entry.codec(product.direction), entry.checks(product.direction));
    let precision = codec.precision(step);
    let (prepared, expected) = codec.prepare_expecting(rows, tokens, &checks.sketch, step)?;
    let (features, _) = entry.shape().along(product.direction);
    let domain = MaskDomain { set: precision.set, product };
    let plaintext = Plaintext { rows: &prepared.rows, tokens, features, steps: &prepared.steps };
    let (body, ticket) = encrypt(&domain, precision, plaintext)?;
    Ok(sealed(entry, (number, product, precision), body, (ticket, prepared.scales, expected)))
}

/// The same with rows of a block that is shared, each encrypted as soon as it is encoded.
///
/// # Errors
/// Those of [`seal`].
pub(super) fn seal_in_block(
    table: &LayerTable,
    number: u64,
    message: &Encrypt,
    block: SharedRows,
) -> Result<(Sealed, Call<SharedTicket>), KeyError> {
    let Encrypt { product, ref rows, tokens, step } = *message;
    let _span = tracing::info_span!(target: WORK, "encrypt", call = number, %product, tokens).entered();
    let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
    let (codec, checks) = (entry.codec(product.direction), entry.checks(product.direction));
    let precision = codec.precision(step);
    let (features, _) = entry.shape().along(product.direction);
    let domain = MaskDomain { set: precision.set, product };
    let ((body, ticket), scales, expected) = codec.preparing(rows, tokens, &checks.sketch, step, |tasks| {
        Ok::<_, KeyError>(block.encrypt(&domain, precision, features, tasks)?)
    })?;
    Ok(sealed(entry, (number, product, precision), body, (ticket, scales, expected)))
}

/// What is sent, and what waits for its answer.
fn sealed<T>(
    entry: &TableEntry,
    (number, product, precision): (u64, ProductId, Precision),
    body: Planes,
    (ticket, scales, expected): (T, RowScales, Expected),
) -> (Sealed, Call<T>) {
    let (tokens, (_, outer)) = (body.rows(), entry.shape().along(product.direction));
    let operand = Operand::Body { tokens: u32::try_from(tokens).unwrap_or(u32::MAX) };
    let header = ProductHeader { version: PROTOCOL_VERSION, call: number, product, precision, operand };
    let checks = entry.checks(product.direction);
    let call = Call { number, product, tokens, outer, ticket, scales, checks, expected };
    (Sealed { header, body: Arc::new(body), outer }, call)
}

impl<T> Call<T> {
    /// The same with more to open it with.
    pub(super) fn with<U>(self, more: U) -> Call<(T, U)> {
        let Self { number, product, tokens, outer, ticket, scales, checks, expected } = self;
        Call { number, product, tokens, outer, ticket: (ticket, more), scales, checks, expected }
    }
}

impl<T: Opens> Call<T> {
    /// Decrypts the answer to a call that was sent at that moment, tiles as they come, and verifies, scales and un-rotates the whole.
    ///
    /// # Errors
    /// When the answer does not come whole, does not fit the product, or is refused.
    pub(super) async fn open(
        self,
        table: &Arc<LayerTable>,
        mut tiles: TileStream<TransportError>,
        sent: Instant,
    ) -> Result<Opened, KeyError> {
        let Self { number, product, tokens, outer, ticket, scales, checks, expected } = self;
        let mut decryption = ticket.open(Buffer::scratch(tokens * outer))?;
        let (mut decrypting, mut come) = (Duration::ZERO, Vec::with_capacity(TILES_AT_ONCE));
        while tiles.recv_many(&mut come, TILES_AT_ONCE).await > 0 {
            let tiles = come.drain(..).collect::<Result<Vec<_>, _>>()?;
            let (start, columns) = (Instant::now(), tiles.iter().map(|tile| tile.rows.columns()).sum::<usize>());
            let values = if T::QUICK { tokens.saturating_mul(columns) } else { usize::MAX };
            decryption = by_size(values, move || {
                let _span = tracing::info_span!(target: WORK, "decrypt", call = number, columns).entered();
                tiles.into_iter().try_for_each(|tile| decryption.tile(tile))?;
                Ok::<_, KeyError>(decryption)
            })
            .await??;
            decrypting += start.elapsed();
        }
        let exchange = sent.elapsed().saturating_sub(decrypting);
        let (decrypted, start, table) = (decryption.finish()?, Instant::now(), Arc::clone(table));
        let rows = by_size(tokens * outer, move || {
            let _span = tracing::info_span!(target: WORK, "verify and decode", call = number, %product).entered();
            let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
            let decode = entry.codec(product.direction).decoder(&scales);
            Ok::<_, KeyError>(checks.sketch.verify(decrypted, &expected, decode)?)
        })
        .await??;
        Ok(Opened { rows, exchange, decrypting: decrypting + start.elapsed() })
    }
}
