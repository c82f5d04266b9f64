//! The actor of one device: takes products, computes them one after another on a thread of its own, gives the answers
//! away in tiles.
//!
//! The thread uses the rayon pool, so that one product has all cores; a product that waits holds its body and nothing
//! else, and masks are expanded when their turn has come. Tiles go into a channel that has room for a whole answer: the pool never waits for a reader, who may need the
//! same pool. How many answers may be unread is the caller's to bound ([`super::service`]).

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use actix::prelude::*;
use protocol::he::mask::expand;
use protocol::he::{MaskDomain, MaskSeed, Planes, Precision};
use protocol::model::Direction;
use protocol::wire::messages::Refusal;
use rayon::prelude::*;
use tokio::sync::{mpsc, oneshot};

use crate::matmul::{Kernel, PackedLinear, Product, Rows, tile_columns};
use crate::trace::WORK;
use crate::transport::TileStream;

/// Messages that may wait for the actor: each is answered in microseconds.
const MAILBOX: usize = 64;
/// Mask columns that one task expands: a few hundred kilobytes of keystream.
const COLUMNS_PER_TASK: usize = 32;

/// What a device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, MessageResponse)]
pub struct Work {
    /// Products computed, those broken off included.
    pub calls: u64,
    /// Seconds spent on them.
    pub busy_seconds: f64,
}

/// See the module's documentation.
pub struct MatmulExecutor {
    /// `None` after [`Drain`].
    queue: Option<SyncSender<Job>>,
    work: Arc<Mutex<Work>>,
    ended: Option<oneshot::Receiver<()>>,
}

struct Job {
    message: Multiply,
    tiles: mpsc::Sender<Result<protocol::he::ProductTile, Refusal>>,
}

impl MatmulExecutor {
    /// Starts the thread of a device. `waiting` products may stand in its queue beside the one that it computes.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(kernel: Arc<dyn Kernel>, waiting: usize) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel(waiting);
        let (end, ended) = oneshot::channel();
        let work = Arc::new(Mutex::new(Work::default()));
        let of_thread = Arc::clone(&work);
        let name = format!("device {}", kernel.name());
        std::thread::Builder::new().name(name).spawn(move || {
            serve(kernel.as_ref(), &jobs, &of_thread);
            // Nobody may be waiting for the end.
            let _ = end.send(());
        })?;
        Ok(Self { queue: Some(queue), work, ended: Some(ended) })
    }

    fn enqueue(&mut self, message: Multiply) -> Result<TileStream<Refusal>, Refusal> {
        let Some(queue) = &self.queue else {
            return Err(Refusal::Capacity("it is shutting down".into()));
        };
        let outer = message.weights.along(message.direction).outer();
        // One place more than there are tiles, for an error.
        let (tiles, stream) = mpsc::channel(outer.div_ceil(tile_columns(outer)) + 1);
        match queue.try_send(Job { message, tiles }) {
            Ok(()) => Ok(stream),
            Err(TrySendError::Full(_)) => Err(Refusal::Capacity("its queue is full".into())),
            Err(TrySendError::Disconnected(_)) => Err(Refusal::Failed("its device has stopped".into())),
        }
    }
}

/// The thread of a device: computes until the queue is closed and empty.
fn serve(kernel: &dyn Kernel, jobs: &Receiver<Job>, work: &Mutex<Work>) {
    for job in jobs {
        if job.tiles.is_closed() {
            continue;
        }
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| compute(kernel, &job)));
        let outcome = outcome.unwrap_or_else(|_| Err(Refusal::Failed("a computation panicked; this is a bug".into())));
        let seconds = start.elapsed().as_secs_f64();
        {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.calls += 1;
            work.busy_seconds += seconds;
        }
        if let Err(refusal) = outcome {
            tracing::error!(%refusal, "a product failed");
            // The reader may be gone.
            let _ = job.tiles.try_send(Err(refusal));
        }
    }
}

fn compute(kernel: &dyn Kernel, job: &Job) -> Result<(), Refusal> {
    let Multiply { precision, direction, weights, rows } = &job.message;
    let weights = weights.along(*direction);
    let (inner, outer) = (weights.inner(), weights.outer());
    let keystream;
    let product = match rows {
        Multiplicand::Masks { seed, domain } => {
            keystream = expand_masks(seed, domain, inner);
            Product {
                weights,
                limbs: precision.set.limbs(),
                output_limbs: usize::from(precision.mask_limbs),
                rows: Rows::Masks { keystream: &keystream, rows: precision.set.mask_rows() },
            }
        }
        Multiplicand::Body(body) => Product {
            weights,
            limbs: usize::from(precision.body_limbs),
            output_limbs: usize::from(precision.output_limbs),
            rows: Rows::Body(body),
        },
    };
    let _span = tracing::info_span!(target: WORK, "multiply", rows = product.rows.count(), inner, outer).entered();
    let send = |tile| match job.tiles.try_send(Ok(tile)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    kernel.multiply(&product, tile_columns(outer), &send).map_err(|error| Refusal::Malformed(error.to_string()))
}

/// The mask columns of all features, as the kernels take them ([`Rows::Masks`]).
pub fn expand_masks(seed: &MaskSeed, domain: &MaskDomain, features: usize) -> Vec<u8> {
    let _span = tracing::info_span!(target: WORK, "expand masks", linear = %domain.linear, features).entered();
    let mut keystream = vec![0; features * domain.column_bytes()];
    keystream.par_chunks_mut(COLUMNS_PER_TASK * domain.column_bytes()).enumerate().for_each(|(task, bytes)| {
        let first = task * COLUMNS_PER_TASK;
        expand(seed, domain, first..first + bytes.len() / domain.column_bytes(), bytes);
    });
    keystream
}

impl Actor for MatmulExecutor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Supervised for MatmulExecutor {}

/// What a matrix is multiplied by.
#[derive(Debug)]
pub enum Multiplicand {
    /// The mask of a seed, which is expanded here.
    Masks {
        /// Its seed.
        seed: MaskSeed,
        /// What it is for.
        domain: MaskDomain,
    },
    /// The body of a ciphertext, `body_limbs × tokens × inner`.
    Body(Arc<Planes>),
}

/// One product. The answer's tiles come on the stream in any order; dropping the stream breaks the product off.
#[derive(Message)]
#[rtype(result = "Result<TileStream<Refusal>, Refusal>")]
pub struct Multiply {
    /// Parameter set, and bytes of the values.
    pub precision: Precision,
    /// `X·W` or `dY·Wᵀ`.
    pub direction: Direction,
    /// The served matrix.
    pub weights: Arc<PackedLinear>,
    /// What it is multiplied by.
    pub rows: Multiplicand,
}

impl Handler<Multiply> for MatmulExecutor {
    type Result = Result<TileStream<Refusal>, Refusal>;

    fn handle(&mut self, message: Multiply, _context: &mut Self::Context) -> Self::Result {
        self.enqueue(message)
    }
}

/// What has the device done?
#[derive(Message)]
#[rtype(result = "Work")]
pub struct AskWork;

impl Handler<AskWork> for MatmulExecutor {
    type Result = Work;

    fn handle(&mut self, _message: AskWork, _context: &mut Self::Context) -> Work {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes no more products and answers when those in the queue are computed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Drain;

impl Handler<Drain> for MatmulExecutor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _message: Drain, _context: &mut Self::Context) -> Self::Result {
        self.queue = None;
        let ended = self.ended.take();
        Box::pin(async move {
            if let Some(ended) = ended {
                // An error means that the thread panicked, which also is an end.
                let _ = ended.await;
            }
        })
    }
}
