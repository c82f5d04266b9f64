//! The layers below the lowest adapted one: through them once a text, and then out of the cache.

use std::sync::Arc;

use protocol::buffer::Buffer;

use super::pass::Pass;
use super::{Llama, LlamaError};
use crate::data::MicroBatch;
use crate::lora::LoraAdapters;
use crate::prefix::PrefixCache;

/// What is kept of the states that enter the lowest adapted layer.
#[derive(Clone)]
pub struct Prefix {
    /// Where.
    pub cache: Arc<PrefixCache>,
    /// Whether those of texts that are trained on are: whether they are trained on again.
    pub training: bool,
}

impl Prefix {
    /// What there is for these adapters: they must be in no layer below.
    pub(super) fn of<'a>(prefix: &'a Option<Self>, adapters: Option<&LoraAdapters>) -> Option<&'a Self> {
        // Without adapters every layer is the same for a text each time.
        let lowest = adapters.and_then(LoraAdapters::depth).map_or(usize::MAX, |depth| depth.layer);
        prefix.as_ref().filter(|prefix| prefix.cache.layer() <= lowest)
    }
}

impl Llama {
    /// The residual stream that enters the cache's layer. What the cache has not is computed, and stored if `store` says so.
    ///
    /// Only texts that the cache has not go through the layers below, made up to the same multiple of tokens as every
    /// micro-batch.
    pub(super) fn entering(&self, batch: &MicroBatch, cache: &PrefixCache, store: bool) -> Result<Buffer, LlamaError> {
        let features = self.config().hidden_size;
        let of_rows = |rows: &std::ops::Range<usize>| rows.start * features..rows.end * features;
        let sequences: Vec<_> = batch.sequences().collect();
        // What makes the batch up may be anything that is the same each time.
        let mut stream = self.embed(&batch.tokens)?;
        let missing = |&number: &usize| {
            let rows = &sequences[number];
            !cache.read(&batch.tokens[rows.clone()], &mut stream[of_rows(rows)])
        };
        let missing: Vec<usize> = (0..sequences.len()).filter(missing).collect();
        if missing.is_empty() {
            return Ok(stream);
        }
        let below = batch.only(&missing);
        let pass = Pass::new(self, &below, None, None)?;
        let embedded = self.embed(&below.tokens)?;
        let mut computed = pass.forward(embedded, 0..cache.layer(), usize::MAX, &mut Vec::new())?.stream;
        for (number, rows) in missing.into_iter().zip(below.sequences()) {
            let states = &mut computed[of_rows(&rows)];
            cache.settle(states);
            if store {
                cache.write(&below.tokens[rows], states);
            }
            stream[of_rows(&sequences[number])].copy_from_slice(states);
        }
        Ok(stream)
    }
}
