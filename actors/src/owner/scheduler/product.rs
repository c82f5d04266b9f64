//! The way of one product: encrypted, sent to the worker that the fleet names, and sent again, always encrypted anew,
//! to the same or another one where that fails.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use futures::future::LocalBoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use protocol::buffer::Buffer;
use protocol::he::{MaskProduct, PadRow, Plaintext, encrypt_with_pads};
use protocol::ids::ProductId;
use protocol::quant::Step;
use protocol::sketch::{Checked, Refuted, Verified};
use protocol::wire::messages::ProductHeader;
use tracing::Instrument as _;

use super::Apply;
use super::ahead;
use super::error::{ScheduleError, Verdict, gone, verdict};
use super::shell::Shell;
use crate::heavy::{Panicked, by_size};
use crate::owner::call::{self, Call, Opened};
use crate::owner::convoy::{Place, Seat};
use crate::owner::fleet::{Event, Failure, Measured};
use crate::owner::keys::{Decrypt, Discard, Encrypt, KeyError, KeyManager, Sealed};
use crate::owner::masks::MaskError;
use crate::owner::table::LayerTable;
use crate::trace::FLIGHT;
use crate::transport::{PeerName, ProductRequest};

/// Pause before a product is sent again to a worker at which it failed; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Times that workers may say that they are unable to compute a product, before it is given up: with the pauses between
/// them, about a minute.
const UNABLE: u32 = 10;

/// Which attempt at a product this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// None failed before it.
    First,
    /// A worker failed before it.
    Again,
    /// An answer was wrong: what is sent now must not be explained by an unlucky step of the encoding.
    AfterRefutation,
}

impl Attempt {
    /// How fine the rows are encoded.
    fn step(self) -> Step {
        match self {
            Self::First | Self::Again => Step::Sketched,
            Self::AfterRefutation => Step::Provable,
        }
    }
}

/// What became of earlier attempts at a product.
struct Trials {
    attempt: Attempt,
    pause: Duration,
    failing_since: Option<Instant>,
    unable: u32,
    /// At whom it failed last.
    last: Vec<PeerName>,
    /// Who will never take it.
    refused_by: Vec<PeerName>,
}

/// Has a product computed, however many attempts it takes.
///
/// # Errors
/// What is wrong with it, if no worker can help that; that workers refuse it; that none is left.
pub(super) async fn apply(shell: Rc<Shell>, message: Apply) -> Result<Verified<Buffer>, ScheduleError> {
    if shell.table.entry(message.product.linear).is_none() {
        return Err(ScheduleError::NoRoute(message.product.linear));
    }
    let mut trials = Trials {
        attempt: Attempt::First,
        pause: FIRST_PAUSE,
        failing_since: None,
        unable: 0,
        last: Vec::new(),
        refused_by: Vec::new(),
    };
    loop {
        let peer = shell.route(message.product, &trials.except()).await?;
        let (peer, error) = match race(&shell, peer, &message, trials.attempt).await {
            Ok(rows) => return Ok(rows),
            Err(failed) => failed,
        };
        trials.failed(&shell, &message, peer, error)?;
        // Another worker need not be waited for.
        let another = shell.ask(|fleet| fleet.route(message.product, &trials.except()).is_some());
        if !another.unwrap_or(false) {
            tokio::time::sleep(trials.pause).await;
            trials.pause = LONGEST_PAUSE.min(2 * trials.pause);
        }
    }
}

impl Trials {
    /// Workers that are asked only where there is no other.
    fn except(&self) -> Vec<PeerName> {
        self.last.iter().chain(&self.refused_by).cloned().collect()
    }

    /// Enters a failed attempt.
    ///
    /// # Errors
    /// The error, if another attempt would not help.
    fn failed(
        &mut self,
        shell: &Rc<Shell>,
        message: &Apply,
        peer: PeerName,
        error: ScheduleError,
    ) -> Result<(), ScheduleError> {
        let (product, verdict) = (message.product, verdict(&error));
        match verdict {
            Verdict::Own => return Err(error),
            Verdict::Refuses => {
                self.refused_by.push(peer.clone());
                let others = shell.ask(|fleet| fleet.route(product, &self.refused_by).is_some());
                if !others.unwrap_or(false) {
                    return Err(error);
                }
            }
            Verdict::Worker(Failure::Unable) => {
                self.unable += 1;
                if self.unable >= UNABLE {
                    return Err(error);
                }
            }
            Verdict::Worker(_) => {}
        }
        let patience = shell.ask(|fleet| fleet.patience()).ok_or(ScheduleError::NotBegun)?;
        if self.failing_since.get_or_insert_with(Instant::now).elapsed() > patience {
            return Err(ScheduleError::LostWorkers(format!("{product} failed for {patience:?}, at last so: {error}")));
        }
        tracing::warn!(%peer, %product, %error, "the product is sent again");
        self.attempt = match verdict {
            Verdict::Worker(Failure::Garbled | Failure::BodyRefuted | Failure::MaskRefuted) => Attempt::AfterRefutation,
            _ if self.attempt == Attempt::AfterRefutation => Attempt::AfterRefutation,
            _ => Attempt::Again,
        };
        self.last = vec![peer];
        Ok(())
    }
}

type Ended = (PeerName, Result<Verified<Buffer>, ScheduleError>);

/// Begins an attempt at a worker.
fn start<'a>(
    shell: &'a Rc<Shell>,
    peer: PeerName,
    message: &'a Apply,
    attempt: Attempt,
    macs: f64,
) -> LocalBoxFuture<'a, Ended> {
    async move {
        let result = try_at(shell, &peer, message, attempt, macs).await;
        (peer, result)
    }
    .boxed_local()
}

/// One attempt; beside a slow one a second, at another worker that serves the layer. The first good answer wins.
async fn race(
    shell: &Rc<Shell>,
    peer: PeerName,
    message: &Apply,
    attempt: Attempt,
) -> Result<Verified<Buffer>, (PeerName, ScheduleError)> {
    let (product, macs) = (message.product, macs(shell, message));
    let slow_after = shell.ask(|fleet| fleet.slow_after(product, macs)).unwrap_or(LONGEST_PAUSE);
    let run = |peer| start(shell, peer, message, attempt, macs);
    let mut running = FuturesUnordered::from_iter([run(peer.clone())]);
    let mut asked = vec![peer];
    let mut slow = Box::pin(tokio::time::sleep(slow_after));
    loop {
        tokio::select! {
            biased;
            Some((peer, result)) = running.next() => match result {
                Ok(rows) => return Ok(rows),
                Err(error) if running.is_empty() => return Err((peer, error)),
                Err(error) => tracing::warn!(%peer, %product, %error, "the other attempt at the product goes on"),
            },
            () = &mut slow => {
                slow.as_mut().reset(tokio::time::Instant::now() + slow_after);
                for peer in asked.iter().cloned() {
                    shell.tell(Event::Slow { peer });
                }
                let another = shell.ask(|fleet| fleet.route(product, &asked).cloned()).flatten();
                if let Some(another) = another.filter(|_| running.len() < 2) {
                    tracing::info!(%product, slow = %asked[0], beside = %another, "a slow product is sent twice");
                    asked.push(another.clone());
                    running.push(run(another));
                }
            }
        }
    }
}

/// Multiply-accumulates of values by weights.
fn macs(shell: &Shell, message: &Apply) -> f64 {
    let shape = shell.table.entry(message.product.linear).map(|entry| entry.shape());
    shape.map_or(0.0, |shape| (shape.d_in * shape.d_out) as f64 * message.tokens as f64)
}

/// A product that was sent: the fleet learns how it ended, also where it is waited for no more.
struct Flight {
    shell: Rc<Shell>,
    peer: PeerName,
    product: ProductId,
    macs: f64,
    began: Instant,
    landed: bool,
}

impl Flight {
    fn new(shell: &Rc<Shell>, peer: &PeerName, product: ProductId, macs: f64) -> Self {
        shell.tell(Event::Sent { peer: peer.clone() });
        Self { shell: Rc::clone(shell), peer: peer.clone(), product, macs, began: Instant::now(), landed: false }
    }

    /// How long the product takes that was sent then.
    fn measured(&self, sent: Instant) -> Measured {
        Measured { product: self.product, macs: self.macs, seconds: sent.elapsed().as_secs_f64() }
    }

    fn land(mut self, event: Event) {
        self.landed = true;
        self.shell.tell(event);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            self.shell.tell(Event::Dropped { peer: self.peer.clone(), waited: self.measured(self.began) });
        }
    }
}

/// One attempt at one worker, which the fleet is told of.
async fn try_at(
    shell: &Rc<Shell>,
    peer: &PeerName,
    message: &Apply,
    attempt: Attempt,
    macs: f64,
) -> Result<Verified<Buffer>, ScheduleError> {
    let product = message.product;
    let flight = Flight::new(shell, peer, product, macs);
    let result = tokio::select! {
        result = whole(shell, peer, message, attempt) => result,
        () = shell.gone(peer) => Err(gone(peer)),
    };
    match result {
        Ok((rows, sent)) => {
            let measured = flight.measured(sent);
            flight.land(Event::Done { peer: peer.clone(), measured });
            Ok(rows)
        }
        Err(error) => {
            // What is nobody's failure drops the flight.
            if let Verdict::Worker(failure) = verdict(&error) {
                let (layer, why) = (product.linear.layer, error.to_string());
                flight.land(Event::Failed { peer: peer.clone(), layer, failure, why });
            }
            Err(error)
        }
    }
}

/// A ciphertext whose ticket is destroyed, unless its answer is decrypted.
struct Issued {
    keys: Addr<KeyManager>,
    header: ProductHeader,
    decrypted: bool,
}

impl Drop for Issued {
    fn drop(&mut self) {
        let call = self.header.call;
        if !self.decrypted && self.keys.try_send(Discard(call)).is_err() {
            tracing::warn!(call, "the ticket of a product that gets no answer was not destroyed");
        }
    }
}

/// Encrypts. A task of its own, so that no ticket is lost where nobody waits for it any more.
async fn issue(keys: Addr<KeyManager>, encrypt: Encrypt) -> Result<(Issued, Sealed), ScheduleError> {
    let sealing = async move {
        let sealed = keys.send(encrypt).await??;
        Ok((Issued { keys, header: sealed.header.clone(), decrypted: false }, sealed))
    };
    actix::spawn(sealing).await.unwrap_or(Err(ScheduleError::Sealing))
}

/// All rows of a product, with the moment at which they were sent. Rows that wrapped more than once are asked for anew.
async fn whole(
    shell: &Shell,
    peer: &PeerName,
    message: &Apply,
    attempt: Attempt,
) -> Result<(Verified<Buffer>, Instant), ScheduleError> {
    // Rows of a block serve one attempt.
    let seat = message.seat.as_ref().filter(|_| attempt == Attempt::First);
    let shared = match seat {
        Some(seat) => exchange_in_convoy(shell, peer, message, seat).await?,
        None => None,
    };
    let (opened, sent) = match shared {
        Some(opened) => opened,
        None => exchange(shell, peer, message, attempt.step()).await?,
    };
    let opened = match opened.complete() {
        Ok(rows) => return Ok((rows, sent)),
        Err(opened) => opened,
    };
    let (inner, tokens) = (message.rows.len() / message.tokens, opened.again().len());
    tracing::debug!(product = %message.product, rows = tokens, "rows wrapped more than once");
    let rows: Vec<f32> = opened.again().iter().flat_map(|row| &message.rows[row * inner..][..inner]).copied().collect();
    let missing = Apply { product: message.product, rows: Arc::new(rows.into()), tokens, seat: None };
    let (missing, _) = exchange(shell, peer, &missing, Step::Provable).await?;
    // At that step no row of an honest answer wraps.
    let missing =
        missing.complete().map_err(|_| KeyError::Refuted(Refuted::Wraps { wrapped: tokens, rows: tokens }))?;
    Ok((opened.fill(missing), sent))
}

/// Encrypts rows, sends them and decrypts what comes back; with the rows comes the moment at which they were sent.
async fn exchange(
    shell: &Shell,
    peer: &PeerName,
    message: &Apply,
    step: Step,
) -> Result<(Checked<Buffer>, Instant), ScheduleError> {
    let Apply { product, ref rows, tokens, .. } = *message;
    let (transport, masks) = (shell.transport.as_ref(), &shell.masks);
    let encrypt = Encrypt { product, rows: Arc::clone(rows), tokens, step };
    if let Some(pads) = ahead::pads(shell, peer, product, tokens).await? {
        return exchange_with_pads(shell, peer, encrypt, pads).await;
    }
    let (sealed, early) =
        futures::join!(issue(shell.keys.clone(), encrypt), masks.unless_filed(transport, peer, product));
    let (mut issued, sealed) = sealed?;
    let (call, sent) = (issued.header.call, Instant::now());
    let request = ProductRequest { header: sealed.header, body: Some(sealed.body), outer: sealed.outer };
    let flight = tracing::info_span!(target: FLIGHT, "product", call, %product, tokens, ?step);
    let answer = async {
        let masks = mask_product(shell, peer, product, early);
        let tiles = async { Ok::<_, ScheduleError>(transport.product(peer, request).await?) };
        let (masks, tiles) = futures::try_join!(masks, tiles)?;
        issued.decrypted = true;
        let rows = shell.keys.send(Decrypt { call, masks, tiles, sent }).await??;
        Ok((rows, sent))
    };
    answer.instrument(flight).await
}

/// The same with pads: without a ticket that anybody else holds, and without the product of the mask.
async fn exchange_with_pads(
    shell: &Shell,
    peer: &PeerName,
    encrypt: Encrypt,
    pads: Vec<PadRow>,
) -> Result<(Checked<Buffer>, Instant), ScheduleError> {
    let (product, tokens, step, maker) = (encrypt.product, encrypt.tokens, encrypt.step, &shell.pads.maker);
    let call = maker.calls.next_of_pads();
    let with_pads =
        move |domain: &_, precision, plaintext: Plaintext<'_>| encrypt_with_pads(pads, domain, precision, plaintext);
    let values = encrypt.rows.len();
    let sealing = move |table: &_, message: &_| call::seal(table, call, message, with_pads);
    let (sealed, waiting) = seal(shell, values, encrypt, sealing).await?;
    let sent = Instant::now();
    let request = ProductRequest { header: sealed.header, body: Some(sealed.body), outer: sealed.outer };
    let flight = tracing::info_span!(target: FLIGHT, "product", call, %product, tokens, ?step);
    let answer = async {
        let tiles = shell.transport.product(peer, request).await?;
        let Opened { rows, exchange, decrypting } = waiting.open(&shell.table, tiles, sent).await?;
        maker.clock.add_product_with_pads(exchange, decrypting);
        Ok((rows, sent))
    };
    answer.instrument(flight).await
}

/// The same with a member's rows of a convoy's block; `None` where it has none, or the other half of them was lost.
async fn exchange_in_convoy(
    shell: &Shell,
    peer: &PeerName,
    message: &Apply,
    seat: &Seat,
) -> Result<Option<(Checked<Buffer>, Instant)>, ScheduleError> {
    let (Apply { product, rows, tokens, .. }, maker) = (message, &shell.pads.maker);
    let (product, tokens, step, transport) = (*product, *tokens, Step::Sketched, shell.transport.as_ref());
    let Some(Place { rows: part, block }) = seat.take(maker, product, tokens).await? else { return Ok(None) };
    let early = async {
        match block.wants_masks() {
            true => shell.masks.unless_filed(transport, peer, product).await,
            false => Ok(None),
        }
    };
    let call = maker.calls.next_of_pads();
    let encrypt = Encrypt { product, rows: Arc::clone(rows), tokens, step };
    let sealing = move |table: &_, message: &_| call::seal_in_block(table, call, message, part);
    // Other threads do parts of it: no actor waits for them.
    let (sealed, early) = futures::join!(seal(shell, usize::MAX, encrypt, sealing), early);
    let (sealed, waiting) = sealed?;
    let sent = Instant::now();
    let request = ProductRequest { header: sealed.header, body: Some(sealed.body), outer: sealed.outer };
    let flight = tracing::info_span!(target: FLIGHT, "product", call, %product, tokens, ?step);
    let answer = async {
        let other = async {
            let masks = match early? {
                Some(masks) => Some(masks),
                None if block.wants_masks() => Some(shell.masks.product(transport, peer, product).await?),
                // Another member makes it, or has made it.
                None => None,
            };
            Ok::<_, ScheduleError>(seat.answer(maker, product, block, masks).await?)
        };
        let tiles = async { Ok::<_, ScheduleError>(transport.product(peer, request).await?) };
        let (other, tiles) = futures::try_join!(other, tiles)?;
        let Some(other) = other else { return Ok(None) };
        let table = Arc::clone(&shell.table);
        // A task of its own: who answers after another has is heard to the end, as by the key manager.
        let opening = actix::spawn(async move { waiting.with(other).open(&table, tiles, sent).await });
        let Opened { rows, exchange, decrypting } = opening.await.unwrap_or(Err(Panicked.into()))?;
        maker.clock.add_product(exchange, decrypting);
        Ok(Some((rows, sent)))
    };
    answer.instrument(flight).await
}

/// Encrypts with what was made ahead, which takes as long as it does for so many values on this thread.
async fn seal<T: Send + 'static>(
    shell: &Shell,
    values: usize,
    message: Encrypt,
    seal: impl FnOnce(&LayerTable, &Encrypt) -> Result<(Sealed, Call<T>), KeyError> + Send + 'static,
) -> Result<(Sealed, Call<T>), KeyError> {
    let (start, table) = (Instant::now(), Arc::clone(&shell.table));
    let sealed = by_size(values, move || seal(&table, &message)).await?;
    shell.pads.maker.clock.add_encrypt(start.elapsed());
    sealed
}

/// The product of the mask, as it was had while the rows were encrypted, or as it is read while the body travels.
async fn mask_product(
    shell: &Shell,
    peer: &PeerName,
    product: ProductId,
    early: Result<Option<Arc<MaskProduct>>, MaskError>,
) -> Result<Arc<MaskProduct>, ScheduleError> {
    Ok(match early? {
        Some(masks) => masks,
        None => shell.masks.product(shell.transport.as_ref(), peer, product).await?,
    })
}
