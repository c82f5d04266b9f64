//! Pads made ahead of the calls that use them, and taken by these.

use std::rc::Rc;
use std::time::Duration;

use protocol::he::PadRow;
use protocol::ids::ProductId;

use super::error::{ScheduleError, gone};
use super::shell::Shell;
use crate::owner::pads::{Haste, Making};
use crate::transport::PeerName;

/// Pause after a block that could not be made: whoever was to give its mask product will be asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// About as long as a block takes.
const MOMENT: Duration = Duration::from_millis(10);

/// Makes blocks of pads wherever there is room for one, until the run ends.
pub(super) async fn fill(shell: Rc<Shell>) {
    loop {
        let product = shell.pads.needed().await;
        let Some(making) = shell.pads.begin(product) else {
            // A call makes it in this moment.
            tokio::time::sleep(MOMENT).await;
            continue;
        };
        match one_block(&shell, product, making).await {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(%product, %error, "pads are made later");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Has the mask product of a product, and makes a block with it.
async fn one_block(shell: &Shell, product: ProductId, making: Making<'_>) -> Result<(), ScheduleError> {
    let peer = shell.route(product, &[]).await?;
    // Calls wait for the same product of masks: it is not waited for from somebody who is gone.
    let masks = tokio::select! {
        masks = shell.masks.product(shell.transport.as_ref(), &peer, product) => masks?,
        () = shell.gone(&peer) => return Err(gone(&peer)),
    };
    Ok(making.make(masks, Haste::Idle).await?)
}

/// Pads for one attempt of a call, made now where there are none; `None` where the call goes the way of others.
///
/// # Errors
/// When the worker does not give the mask product that pads are made with, or they cannot be made.
pub(super) async fn pads(
    shell: &Shell,
    peer: &PeerName,
    product: ProductId,
    tokens: usize,
) -> Result<Option<Vec<PadRow>>, ScheduleError> {
    if !shell.pads.serves(product, tokens) {
        return Ok(None);
    }
    if let Some(taken) = shell.pads.take(product, tokens) {
        return Ok(Some(taken));
    }
    let Some(making) = shell.pads.begin(product) else { return Ok(None) };
    let masks = shell.masks.product(shell.transport.as_ref(), peer, product).await?;
    making.make(masks, Haste::Now).await?;
    Ok(shell.pads.take(product, tokens))
}
