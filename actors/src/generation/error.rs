//! Why a text is not written.

use std::sync::Arc;

use crate::transformer::LlamaError;

/// Why a request was refused, or ended before its time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// There is nothing to go on with.
    #[error("the prompt has no tokens: begin it with the token that begins a text, or with some text")]
    Empty,
    /// A token of the request is not the model's.
    #[error("token {token} is outside the model's vocabulary of {vocabulary}")]
    Vocabulary {
        /// The token.
        token: u32,
        /// Tokens that there are.
        vocabulary: usize,
    },
    /// The prompt leaves no room for a token.
    #[error("the prompt has {tokens} tokens, and the context of the model takes {context}: shorten the prompt")]
    Context {
        /// Tokens of the prompt.
        tokens: usize,
        /// Longest text, the answer included.
        context: usize,
    },
    /// Keys and values of the text would not fit the memory that is set apart for them, even alone.
    #[error(
        "a text of {tokens} tokens needs {needed} MiB for its keys and values, and the limit for all texts is {limit} MiB: \
         ask for fewer tokens, or raise the limit"
    )]
    Memory {
        /// Tokens of the prompt and of the longest answer that was asked for.
        tokens: usize,
        /// MiB that these take.
        needed: u64,
        /// MiB that there are.
        limit: u64,
    },
    /// A setting of the request is impossible.
    #[error("{0}")]
    Setting(String),
    /// More requests wait than may.
    #[error("{waiting} requests are waiting already: try again later")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// A pass through the model failed.
    #[error("{0}")]
    Pass(Arc<LlamaError>),
    /// The model's tokenizer cannot be used.
    #[error(transparent)]
    Model(#[from] protocol::model::ModelError),
    /// The system has no thread, or no randomness.
    #[error("generation cannot begin: {0}")]
    System(#[from] std::io::Error),
    /// The engine has ended.
    #[error("the engine has ended")]
    Ended,
}

impl From<LlamaError> for GenerationError {
    fn from(error: LlamaError) -> Self {
        Self::Pass(Arc::new(error))
    }
}

impl GenerationError {
    /// Whether there are no workers to go on with: the same request may be done when there are.
    pub fn is_lost_workers(&self) -> bool {
        matches!(self, Self::Pass(error) if matches!(&**error, LlamaError::Product(why) if why.is_lost_workers()))
    }
}
