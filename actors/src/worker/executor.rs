//! One device's work: products are queued, computed one after another on a thread of its own, and their answers given
//! away in tiles.
//!
//! Whoever has a product puts it into the [`DeviceQueue`] itself: a product of one row is computed in the time that it would take to
//! ask an actor for that. The actor ends the queue.
//!
//! A product that waits holds its body and nothing else: masks are expanded when their turn has come. Tiles go into a
//! channel that has room for a whole answer: a device never waits for a reader, who may need the threads that it works
//! on. How many answers may be unread is bounded by the places that their products hold ([`super::place`]).

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use actix::prelude::*;
use protocol::he::ProductTile;
use protocol::wire::messages::Refusal;
use tokio::sync::{mpsc, oneshot};

use super::place::Place;
use crate::matmul::{Device, DeviceError, HeldMatrix, ProductTask, answer_columns};
use crate::trace::WORK;
use crate::transport::TileStream;

/// Messages that may wait for the actor: it is told to end once.
const MAILBOX: usize = 4;

/// See the module's documentation.
pub struct MatmulExecutor {
    queue: Arc<DeviceQueue>,
    ended: Option<oneshot::Receiver<()>>,
}

/// Products that wait for a device.
pub struct DeviceQueue {
    /// `None` after [`Drain`].
    jobs: Mutex<Option<SyncSender<Job>>>,
}

struct Job {
    message: Multiply,
    tiles: mpsc::Sender<Result<ProductTile, Refusal>>,
}

impl MatmulExecutor {
    /// Starts the thread of a device. `waiting` products may stand in its queue beside the one that it computes.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(device: Arc<dyn Device>, waiting: usize) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel(waiting);
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new().name(format!("device {}", device.name())).spawn(move || {
            serve(&device.name(), &jobs);
            // Nobody may be waiting for the end.
            let _ = end.send(());
        })?;
        let queue = Arc::new(DeviceQueue { jobs: Mutex::new(Some(queue)) });
        Ok(Self { queue, ended: Some(ended) })
    }

    /// Where products for the device go.
    pub fn queue(&self) -> Arc<DeviceQueue> {
        Arc::clone(&self.queue)
    }
}

impl DeviceQueue {
    /// Has a product computed. The answer's tiles come on the stream in any order; dropping the stream breaks the product off.
    ///
    /// # Errors
    /// Where the queue is full or ended.
    pub fn enqueue(&self, message: Multiply) -> Result<TileStream<Refusal>, Refusal> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = &*jobs else {
            return Err(Refusal::Capacity("it is shutting down".into()));
        };
        let (_, outer) = message.weights.shape().along(message.task.direction);
        // However narrow the tiles are, and an error has a place, too. Places that are not taken cost nothing.
        let (tiles, stream) = mpsc::channel(outer + 1);
        match queue.try_send(Job { message, tiles }) {
            Ok(()) => Ok(stream),
            Err(TrySendError::Full(_)) => Err(Refusal::Busy("its queue is full".into())),
            Err(TrySendError::Disconnected(_)) => Err(Refusal::Failed("its device has stopped".into())),
        }
    }
}

/// The thread of a device: computes until the queue is closed and empty.
fn serve(device: &str, jobs: &Receiver<Job>) {
    for job in jobs {
        if job.tiles.is_closed() || job.message.place.is_lost() {
            continue;
        }
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| compute(device, &job)));
        let outcome = outcome.unwrap_or_else(|_| Err(Refusal::Failed("a computation panicked; this is a bug".into())));
        job.message.place.charge(u64::from(job.message.counts), start.elapsed().as_secs_f64());
        if let Err(refusal) = outcome {
            tracing::error!(device, %refusal, "a product failed");
            // The reader may be gone.
            let _ = job.tiles.try_send(Err(refusal));
        }
    }
}

fn compute(device: &str, job: &Job) -> Result<(), Refusal> {
    let Multiply { task, weights, .. } = &job.message;
    let (inner, outer) = weights.shape().along(task.direction);
    let rows = task.rows.count();
    let _span = tracing::info_span!(target: WORK, "multiply", device, rows, inner, outer).entered();
    let send = |tile| match job.tiles.try_send(Ok(tile)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    weights.multiply(task, answer_columns(rows, outer), &send).map_err(refusal)
}

/// What an owner is told of a product that a device did not compute.
fn refusal(error: DeviceError) -> Refusal {
    match error {
        DeviceError::Product(error) => Refusal::Malformed(error.to_string()),
        // Room for products was planned before layers were taken, so that it is missing for a moment, to others.
        DeviceError::OutOfMemory { .. } => Refusal::Busy(error.to_string()),
        error => Refusal::Failed(error.to_string()),
    }
}

impl Actor for MatmulExecutor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Supervised for MatmulExecutor {}

/// One product, or one device's part of it.
pub struct Multiply {
    /// The served matrix, or a part of it, in the device's memory.
    pub weights: Arc<dyn HeldMatrix>,
    /// What is computed.
    pub task: ProductTask,
    /// Whether it counts as a product: of several parts one does.
    pub counts: bool,
    /// The product's place, which is held until the product is computed or broken off.
    pub place: Arc<Place>,
}

/// Takes no more products and answers when those in the queue are computed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Drain;

impl Handler<Drain> for MatmulExecutor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _message: Drain, _context: &mut Self::Context) -> Self::Result {
        *self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let ended = self.ended.take();
        Box::pin(async move {
            if let Some(ended) = ended {
                // An error means that the thread panicked, which also is an end.
                let _ = ended.await;
            }
        })
    }
}
