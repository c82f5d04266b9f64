//! Where in a text its tokens are.
//!
//! A tokenizer's own offsets are not to be relied on: they leave white space out (`trim_offsets`), or take in what stands
//! around a token (`lstrip`, `rstrip`), and are empty for what is not in the text. So a token begins where the one before it
//! ends, and one that was added to the vocabulary lies where it is spelled.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::Encoding;

/// A token with its place in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedToken {
    /// The token.
    pub id: u32,
    /// Bytes of the text. Of several tokens of one character all but the first have none.
    pub span: Range<usize>,
    /// The tokenizer put it there by itself, before or behind the text.
    pub framing: bool,
}

pub(super) fn places(text: &str, encoding: &Encoding, added: &HashMap<u32, String>) -> Vec<PlacedToken> {
    let mut cursor = 0;
    let tokens = encoding.get_ids().iter().zip(encoding.get_offsets()).zip(encoding.get_special_tokens_mask());
    let place = |((&id, &(start, end)), &framing): ((&u32, &(usize, usize)), &u32)| {
        let framing = framing == 1;
        let span = match added.get(&id) {
            _ if framing => cursor..cursor,
            Some(spelled) => added_place(text, spelled, cursor, start..end),
            None => cursor..end.clamp(cursor, text.len()),
        };
        cursor = span.end;
        PlacedToken { id, span, framing }
    };
    tokens.map(place).collect()
}

/// Where an added token is spelled: within its offsets, or else next behind what came before.
fn added_place(text: &str, spelled: &str, cursor: usize, offsets: Range<usize>) -> Range<usize> {
    let within = |range: Range<usize>| {
        let part = text.get(range.clone())?;
        part.find(spelled).map(|at| range.start + at..range.start + at + spelled.len())
    };
    let start = offsets.start.max(cursor);
    let place = within(start..offsets.end.max(start)).or_else(|| within(cursor..text.len()));
    // A normalised one may be spelled otherwise.
    place.unwrap_or(cursor..offsets.end.clamp(cursor, text.len()))
}
