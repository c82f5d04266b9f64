//! Text of tokens as they come: whole characters only, and nothing that may turn out to be the beginning of a stop.
//!
//! A token's text may depend on those before it (a space that is left out at a text's beginning, a character of several
//! tokens), so that it is the difference that the token makes to the text of the last few.

use protocol::model::{ModelError, TextTokenizer};

/// Tokens of the prompt that the answer's first token is read behind.
const CONTEXT: usize = 6;
/// What bytes that are no character are read as.
const BROKEN: char = '\u{fffd}';

/// The text of one answer.
pub(super) struct TextStream {
    /// The last tokens whose text is known, and those behind them.
    tokens: Vec<u32>,
    /// How many of them are known.
    known: usize,
    /// Whether special tokens are spelled out.
    special: bool,
    stops: Vec<String>,
    /// What is known and not told yet.
    held: String,
}

/// What a token made certain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// The text.
    pub(super) text: String,
    /// The stop that ends it.
    pub(super) stop: Option<String>,
}

impl TextStream {
    /// Of an answer to a prompt.
    pub(super) fn new(prompt: &[u32], stops: Vec<String>, special: bool) -> Self {
        let tokens = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Self { known: tokens.len(), tokens, special, stops, held: String::new() }
    }

    /// The next token of the answer.
    ///
    /// # Errors
    /// When the tokenizer cannot read its own tokens.
    pub(super) fn push(&mut self, tokenizer: &TextTokenizer, token: u32) -> Result<Told, ModelError> {
        self.tokens.push(token);
        let new = self.new_text(tokenizer)?;
        if new.ends_with(BROKEN) {
            return Ok(Told::default());
        }
        self.tokens.drain(..self.known);
        self.known = self.tokens.len();
        self.held.push_str(&new);
        Ok(self.tell())
    }

    /// What is left when no token follows: the text of an incomplete character is none.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub(super) fn finish(&mut self, tokenizer: &TextTokenizer) -> Result<Told, ModelError> {
        let new = self.new_text(tokenizer)?;
        self.tokens.clear();
        self.known = 0;
        self.held.push_str(new.trim_end_matches(BROKEN));
        let told = self.tell();
        let rest = std::mem::take(&mut self.held);
        // What may have begun a stop has not.
        Ok(if told.stop.is_some() { told } else { Told { text: told.text + &rest, stop: None } })
    }

    /// The text that the tokens which are not known yet add to that of those before.
    fn new_text(&self, tokenizer: &TextTokenizer) -> Result<String, ModelError> {
        let read = |tokens: &[u32]| match self.special {
            true => tokenizer.decode(tokens),
            false => tokenizer.decode_plain(tokens),
        };
        let (before, all) = (read(&self.tokens[..self.known])?, read(&self.tokens)?);
        // A prompt may end within a character.
        let before = before.trim_end_matches(BROKEN);
        Ok(all.strip_prefix(before).map_or_else(|| common_removed(before, &all), str::to_owned))
    }

    /// Takes out of what is held what is certain.
    fn tell(&mut self) -> Told {
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|&(at, stop)| (at, std::cmp::Reverse(stop.len()))) {
            let (text, stop) = (self.held[..at].to_owned(), Some(stop.clone()));
            self.held.clear();
            return Told { text, stop };
        }
        let begins = |from: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[from..]));
        let starts = self.held.char_indices().map(|(at, _)| at);
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let kept = starts.filter(|at| self.held.len() - at < longest).find(|&at| begins(at)).unwrap_or(self.held.len());
        let later = self.held.split_off(kept);
        Told { text: std::mem::replace(&mut self.held, later), stop: None }
    }
}

/// A text without what it has in common with another at the beginning.
fn common_removed(before: &str, all: &str) -> String {
    all.chars()
        .zip(before.chars())
        .take_while(|(a, b)| a == b)
        .fold(all, |rest, (c, _)| &rest[c.len_utf8()..])
        .to_owned()
}
