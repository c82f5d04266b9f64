//! Settings of an engine.

use super::error::GenerationError;
use super::writer::ROWS;

/// Guesses at a time, where nothing else is said.
const GUESSES: usize = 7;

/// How texts are guessed ahead: tokens that followed the same words earlier in the text are computed with the next one, in
/// the same pass. What is written is the same with and without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Drafts {
    /// Where the products come from workers: there a pass costs its round trips, whatever it carries.
    #[default]
    Auto,
    /// At most so many tokens ahead; 0 guesses nothing.
    UpTo(usize),
}

/// Settings of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Texts that are written side by side.
    pub sequences: usize,
    /// Requests that may wait for their turn.
    pub waiting: usize,
    /// Longest text, prompt and answer together; the model's own context if that is shorter or this is not given.
    pub context: Option<usize>,
    /// Bytes for keys and values of all texts.
    pub memory: u64,
    /// How texts are guessed ahead.
    pub drafts: Drafts,
    /// Whether keys and values of finished texts are kept, while there is memory, for requests that begin with the same
    /// tokens.
    pub reuse: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { sequences: 8, waiting: 1024, context: None, memory: 2 << 30, drafts: Drafts::Auto, reuse: false }
    }
}

impl Drafts {
    /// Guesses at a time, at most.
    pub(super) fn most(self, workers: bool) -> usize {
        match self {
            Self::Auto if workers => GUESSES,
            Self::Auto => 0,
            Self::UpTo(most) => most.min(ROWS - 1),
        }
    }
}

impl EngineConfig {
    /// Checks that the numbers are possible.
    ///
    /// # Errors
    /// Names the one that is not.
    pub fn validate(&self) -> Result<(), GenerationError> {
        let fail = |what: String| Err(GenerationError::Setting(what));
        if !(1..=ROWS).contains(&self.sequences) {
            return fail(format!(
                "{} texts side by side cannot be written: it must be from 1 to {ROWS}",
                self.sequences
            ));
        }
        if self.waiting == 0 {
            return fail("no request may wait: it must be at least 1".to_owned());
        }
        if self.context == Some(0) {
            return fail("the longest text has no tokens: it must be at least 1".to_owned());
        }
        Ok(())
    }
}
