//! What is served: an engine, the names under which models are asked for, and what everybody shares.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actors::generation::{Engine, GenerationError};
use actors::lora::LoraAdapters;
use protocol::model::ChatTemplate;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::gate::Gate;

use crate::roles::chat_style::ChatStyle;

/// When to come again where too many wait.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Answers that are written or waited for at a time.
    pub(crate) answers: usize,
    /// Bytes of a request.
    pub(crate) body_bytes: usize,
    /// Time for a request's body to come.
    pub(crate) body_time: Duration,
    /// Time in which a client reads something of a stream, or it has left.
    pub(crate) patience: Duration,
    /// Time that answers have to end once the server is told to stop.
    pub(crate) grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            answers: 64,
            body_bytes: 4 << 20,
            body_time: Duration::from_secs(30),
            patience: Duration::from_secs(60),
            grace: Duration::from_secs(30),
        }
    }
}

/// The models of one server.
pub(crate) struct Models {
    pub(crate) engine: Engine,
    /// What the base model is called.
    pub(crate) base: String,
    /// The adapters by name.
    pub(crate) adapters: Vec<(String, Arc<LoraAdapters>)>,
    /// How conversations are written; its values are those that requests need not give.
    pub(crate) style: ChatStyle,
}

impl Models {
    /// How the model writes a conversation.
    pub(super) fn template(&self) -> Option<&ChatTemplate> {
        self.style.template(self.engine.tokenizer())
    }

    /// The adapter of a name, or the base model.
    ///
    /// # Errors
    /// When nothing has this name.
    pub(super) fn find(&self, name: &str) -> Result<Option<&Arc<LoraAdapters>>, ApiError> {
        if name == self.base {
            return Ok(None);
        }
        let found = self.adapters.iter().find(|(known, _)| known == name);
        found.map(|(_, adapter)| Some(adapter)).ok_or_else(|| ApiError::no_such_model(name, &self.names()))
    }

    /// All names, the base model's first.
    pub(crate) fn names(&self) -> Vec<&str> {
        std::iter::once(&self.base).chain(self.adapters.iter().map(|(name, _)| name)).map(String::as_str).collect()
    }
}

/// A server's state.
pub(super) struct Served {
    pub(super) models: Models,
    pub(super) gate: Gate,
    pub(super) limits: Limits,
    /// Seconds since 1970 when it began.
    pub(super) since: u64,
    /// Set when no more requests are taken.
    stopping: AtomicBool,
    seats: Arc<Semaphore>,
    /// Of the names of answers: a number that no other server has, and one that counts.
    names: (u64, AtomicU64),
}

impl Served {
    /// `number` is one that no other server has.
    pub(super) fn new(models: Models, gate: Gate, limits: Limits, number: u64) -> Self {
        Self {
            models,
            gate,
            limits,
            since: now(),
            stopping: AtomicBool::new(false),
            seats: Arc::new(Semaphore::new(limits.answers)),
            names: (number, AtomicU64::new(0)),
        }
    }

    /// Takes no more requests.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Seats for so many answers, which they have until the value is dropped.
    ///
    /// # Errors
    /// When there are not enough, now or ever, and when the server is being stopped.
    pub(super) fn seats(&self, answers: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::stopping());
        }
        if answers > self.limits.answers {
            let why = format_args!("asks for {answers} answers, and {} may be written at a time", self.limits.answers);
            return Err(ApiError::field("n", why.to_string()));
        }
        let seats = u32::try_from(answers).ok().and_then(|n| Arc::clone(&self.seats).try_acquire_many_owned(n).ok());
        seats.ok_or_else(|| ApiError::busy(RETRY_AFTER))
    }

    /// A name for an answer.
    pub(super) fn answer_id(&self, prefix: &str) -> String {
        let (server, count) = &self.names;
        format!("{prefix}-{server:016x}{:08x}", count.fetch_add(1, Ordering::Relaxed))
    }

    /// What `/v1/models` says of each.
    pub(super) fn model_card(&self, name: &str) -> Value {
        json!({"id": name, "object": "model", "created": self.since, "owned_by": "velum"})
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What clients are told of a request that the engine refused, or could not finish; `field` has the prompt.
pub(super) fn refused(error: &GenerationError, field: &str) -> ApiError {
    match error {
        GenerationError::Empty | GenerationError::Vocabulary { .. } => {
            ApiError::field(field, format_args!("cannot be gone on from: {error}"))
        }
        GenerationError::Context { .. } | GenerationError::Memory { .. } => ApiError::too_long(error.to_string()),
        GenerationError::Setting(why) => ApiError::body(format_args!("asks for what cannot be: {why}")),
        GenerationError::Busy { .. } => ApiError::busy(RETRY_AFTER),
        GenerationError::Ended => ApiError::stopping(),
        other => ApiError::failed(other),
    }
}
