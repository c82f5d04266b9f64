//! The text of single tokens, as log-probabilities name them.

use protocol::model::TextTokenizer;

/// Tells what each token says where it stands behind another: some tokenizers leave the space out that a text begins with.
pub(super) struct Pieces<'a> {
    tokenizer: &'a TextTokenizer,
    /// What stands before, and its text.
    before: Option<(u32, String)>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(tokenizer: &'a TextTokenizer) -> Self {
        let before = tokenizer.encode("a", false).ok().and_then(|tokens| {
            let last = *tokens.last()?;
            Some((last, tokenizer.decode(&[last]).ok()?))
        });
        Self { tokenizer, before }
    }

    /// The text of a token; `\u{fffd}` for each part of a character that it has not whole.
    pub(super) fn of(&self, token: u32) -> String {
        if let Some((before, text)) = &self.before
            && let Ok(both) = self.tokenizer.decode(&[*before, token])
            && let Some(rest) = both.strip_prefix(text.as_str())
        {
            return rest.to_owned();
        }
        self.tokenizer.decode(&[token]).unwrap_or_default()
    }

    /// The bytes of a piece, if it has whole characters.
    pub(super) fn bytes(piece: &str) -> Option<&[u8]> {
        (!piece.contains('\u{fffd}')).then_some(piece.as_bytes())
    }
}
