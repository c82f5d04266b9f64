//! Products that are asked of the backend.

use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, LinearId, ProductId};
use protocol::model::LlamaConfig;

use super::ops::KnownPart;
use crate::backend::{BackendError, LinearBackend};

/// The product of these rows, `tokens × outer`.
pub(super) fn product(
    config: &LlamaConfig,
    backend: &dyn LinearBackend,
    product: ProductId,
    rows: Arc<Buffer>,
    tokens: usize,
) -> Result<Buffer, BackendError> {
    let (_, outer) = config.shape(product.linear.group).along(product.direction);
    let out = backend.apply(product, rows, tokens)?.into_rows();
    if out.len() != tokens * outer {
        let why = format!("the backend returned {} values for {tokens} × {outer}", out.len());
        return Err(BackendError { product, why: why.into() });
    }
    Ok(out)
}

/// A forward product with all that is known of it: for rows that nobody has taken anything out of.
pub(super) fn whole_product(
    config: &LlamaConfig,
    backend: &dyn LinearBackend,
    linear: LinearId,
    rows: &Arc<Buffer>,
    tokens: usize,
) -> Result<Buffer, BackendError> {
    let forward = linear.along(Direction::Forward);
    let Some(known) = backend.known(linear).map(KnownPart::widened) else {
        return product(config, backend, forward, Arc::clone(rows), tokens);
    };
    let (low, rest) = known.take(rows, tokens);
    let mut out = product(config, backend, forward, Arc::new(rest), tokens)?;
    known.give_back(&low, &mut out, tokens);
    Ok(out)
}
