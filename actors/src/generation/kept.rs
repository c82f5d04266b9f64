//! Keys and values of finished texts, for texts that begin with the same tokens: the next turn of a conversation.

use std::sync::Arc;

use super::sequence::Sequence;
use crate::lora::LoraAdapters;
use crate::transformer::KvCache;

/// Fewer tokens than this are not worth it.
const FEWEST: usize = 8;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Kept {
    /// Those that were used last are at the end.
    texts: Vec<Text>,
}

struct Text {
    tokens: Vec<u32>,
    adapter: Option<Arc<LoraAdapters>>,
    cache: KvCache,
    bytes: u64,
}

impl Kept {
    /// Keeps what a finished text has.
    pub(super) fn put(&mut self, sequence: Sequence) {
        let (tokens, adapter, cache) = sequence.into_kept();
        let bytes = cache.held_bytes();
        self.texts.push(Text { tokens, adapter, cache, bytes });
    }

    /// What is kept of the longest beginning of a text that another one has too, with the same adapters; at least the last
    /// token is left to compute.
    pub(super) fn take(&mut self, tokens: &[u32], adapter: Option<&Arc<LoraAdapters>>) -> Option<KvCache> {
        let common = |text: &Text| match (&text.adapter, adapter) {
            (None, None) => shared(&text.tokens, tokens),
            (Some(one), Some(other)) if Arc::ptr_eq(one, other) => shared(&text.tokens, tokens),
            _ => 0,
        };
        // Of a text that has less in common than it has besides, more would be lost than is gained.
        let worth = |text: &Text| {
            let length = common(text).min(text.cache.len());
            (length >= FEWEST && 2 * length >= text.cache.len()).then_some(length)
        };
        let best = self.texts.iter().enumerate().filter_map(|(place, text)| Some((worth(text)?, place))).max();
        let (length, place) = best?;
        let mut cache = self.texts.remove(place).cache;
        cache.truncate(length.min(tokens.len() - 1));
        Some(cache)
    }

    /// Lets go of the oldest until all take no more than this.
    pub(super) fn shrink(&mut self, bytes: u64) {
        let mut held: u64 = self.texts.iter().map(|text| text.bytes).sum();
        let oldest = self.texts.iter().take_while(|text| {
            let too_many = held > bytes;
            held = if too_many { held - text.bytes } else { held };
            too_many
        });
        let count = oldest.count();
        self.texts.drain(..count);
    }
}

/// Tokens with which both begin.
fn shared(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}
