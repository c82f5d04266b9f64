//! A call of few rows, encrypted and decrypted with pads on the thread that asks for it.
//!
//! What is left to be done for a row is rotating, sketching, adding and subtracting, some microseconds: other threads are asked only
//! from some thousand values on. All that holds for other calls holds here: the ticket is a value that its answer takes, nothing computed from an
//! answer leaves before all of it is verified, and whoever drops a call wipes its pads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::buffer::Buffer;
use protocol::he::{MaskDomain, PadRow, PadTicket, Plaintext, encrypt_with_pads};
use protocol::ids::ProductId;
use protocol::quant::RowScales;
use protocol::sketch::{Checked, Checks, Expected};
use protocol::wire::messages::{Operand, PROTOCOL_VERSION, ProductHeader};

use super::clock::PhaseClock;
use super::keys::{Encrypt, KeyError, Sealed};
use super::table::LayerTable;
use crate::heavy::by_size;
use crate::trace::WORK;
use crate::transport::{TileStream, TransportError};

/// A call that was sent and has no answer yet.
pub(super) struct Waiting {
    call: u64,
    product: ProductId,
    tokens: usize,
    outer: usize,
    ticket: PadTicket,
    scales: RowScales,
    checks: Arc<Checks>,
    expected: Expected,
}

/// Rotates, encodes and encrypts rows with one pad row each, under this number of a call.
///
/// # Errors
/// When the rows cannot be encoded, or the pads are not this product's.
pub(super) async fn seal(
    table: &Arc<LayerTable>,
    clock: &PhaseClock,
    call: u64,
    message: Encrypt,
    pads: Vec<PadRow>,
) -> Result<(Sealed, Waiting), KeyError> {
    let (start, values, table) = (Instant::now(), message.rows.len(), Arc::clone(table));
    let sealed = by_size(values, move || encrypt(&table, call, &message, pads)).await?;
    clock.add_encrypt(start.elapsed());
    sealed
}

fn encrypt(table: &LayerTable, call: u64, message: &Encrypt, pads: Vec<PadRow>) -> Result<(Sealed, Waiting), KeyError> {
    let Encrypt { product, ref rows, tokens, step } = *message;
    let _span = tracing::info_span!(target: WORK, "encrypt", call, %product, tokens).entered();
    let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
    let (codec, checks) = (entry.codec(product.direction), entry.checks(product.direction));
    let precision = codec.precision(step);
    let (prepared, expected) = codec.prepare_expecting(rows, tokens, &checks.sketch, step)?;
    let (features, outer) = entry.shape().along(product.direction);
    let domain = MaskDomain { set: precision.set, product };
    let plaintext = Plaintext { rows: &prepared.rows, tokens, features, steps: &prepared.steps };
    let (body, ticket) = encrypt_with_pads(pads, &domain, precision, plaintext)?;
    let operand = Operand::Body { tokens: u32::try_from(tokens).unwrap_or(u32::MAX) };
    let header = ProductHeader { version: PROTOCOL_VERSION, call, product, precision, operand };
    let waiting = Waiting { call, product, tokens, outer, ticket, scales: prepared.scales, checks, expected };
    Ok((Sealed { header, body: Arc::new(body), outer }, waiting))
}

impl Waiting {
    /// Decrypts the answer to a call that was sent at that moment, and verifies, scales and un-rotates the whole.
    ///
    /// # Errors
    /// When the answer does not come whole, does not fit the product, or is refused.
    pub(super) async fn open(
        self,
        table: &Arc<LayerTable>,
        clock: &PhaseClock,
        mut tiles: TileStream<TransportError>,
        sent: Instant,
    ) -> Result<Checked<Buffer>, KeyError> {
        let Self { call, product, tokens, outer, ticket, scales, checks, expected } = self;
        let mut decryption = ticket.open(Buffer::scratch(tokens * outer))?;
        let mut decrypting = Duration::ZERO;
        while let Some(tile) = tiles.recv().await {
            let (tile, start) = (tile?, Instant::now());
            let values = tokens * tile.rows.columns();
            decryption = by_size(values, move || {
                let _span = tracing::info_span!(target: WORK, "decrypt", call, columns = tile.rows.columns()).entered();
                decryption.tile(&tile)?;
                Ok::<_, KeyError>(decryption)
            })
            .await??;
            decrypting += start.elapsed();
        }
        let exchange = sent.elapsed().saturating_sub(decrypting);
        let (decrypted, start, table) = (decryption.finish()?, Instant::now(), Arc::clone(table));
        let opened = by_size(tokens * outer, move || {
            let _span = tracing::info_span!(target: WORK, "verify and decode", call, %product).entered();
            let entry = table.entry(product.linear).ok_or(KeyError::UnknownLinear(product.linear))?;
            let decode = entry.codec(product.direction).decoder(&scales);
            Ok::<_, KeyError>(checks.sketch.verify(decrypted, &expected, decode)?)
        })
        .await??;
        clock.add_product_with_pads(exchange, decrypting + start.elapsed());
        Ok(opened)
    }
}
