//! What the forward pass keeps for the backward pass: inputs of what cannot be computed again without a worker.
//!
//! Norms' outputs, attention's probabilities and the gated features are not here: they follow from what is.
//!
//! It is most of an owner's memory. Where products carry the noise of integers and encryption, some percent of a value, all
//! of it but the adapters' values is rounded to bfloat16 while it waits, by 0.4 % at most and without a bias. Rows are
//! rounded where they are made and widened where they are read, block by block, while the processor's cache has them:
//! passes of its own over all rows cost almost twice as much, since memory is what they wait for.

use std::sync::Arc;

use half::bf16;
use protocol::buffer::{Buffer, Reused};
use protocol::parts::Part;
use rayon::prelude::*;

use super::ops::rows::block;
use super::vector::vectorised;

/// Values that a thread rounds or widens at a time.
const CHUNK: usize = 1 << 14;

/// One layer's part.
pub(super) struct LayerTape {
    /// The residual stream as it entered, `tokens × hidden_size`.
    pub(super) input: Kept,
    /// Queries and keys, turned to their positions, and values.
    pub(super) qkv: Kept,
    /// Queries and keys before their norms, where a family has these; empty elsewhere.
    pub(super) unnormed: Kept,
    /// What attention made of them.
    pub(super) attended: Kept,
    /// For each sequence, head and query the logarithm of the sum of its scores' exponentials.
    pub(super) log_sums: Buffer,
    /// The residual stream after attention.
    pub(super) middle: Kept,
    /// Gates and what they let through, `tokens × 2·intermediate_size`.
    pub(super) both: Kept,
    /// What was added to the stream.
    pub(super) added: Added,
    /// Values between the projections of what is beside the products.
    pub(super) lows: Lows,
}

/// What attention and the feed-forward block give, where a norm stands between that and the stream; empty elsewhere.
pub(super) struct Added {
    pub(super) of_attention: Kept,
    pub(super) of_feed_forward: Kept,
}

/// Of each group, `tokens ×` the slots' ranks together, of which the adapters' way back reads each row; behind them those of a known part,
/// which it does not need. Empty where a group has neither.
#[derive(Default)]
pub(super) struct Lows {
    pub(super) qkv: Buffer,
    pub(super) o: Buffer,
    pub(super) gate_up: Buffer,
    pub(super) down: Buffer,
}

/// Rows while they wait.
pub(super) enum Kept {
    /// As they are.
    Exact(Arc<Buffer>),
    /// In bfloat16.
    Rounded(Reused<u16>),
}

/// How rows are laid by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Not at all.
    Nothing,
    /// As they are.
    Exact,
    /// Rounded to bfloat16.
    Rounded,
}

impl Keep {
    /// Room for `count` values that are to be rounded; none, if they are not.
    pub(super) fn room(self, count: usize) -> Reused<u16> {
        Reused::scratch(if self == Self::Rounded { count } else { 0 })
    }

    /// The width of [`Self::room`] for rows of `width` values.
    pub(super) fn width(self, width: usize) -> usize {
        if self == Self::Rounded { width } else { 0 }
    }

    /// Lays rows by that nothing has rounded yet.
    pub(super) fn rows(self, rows: Arc<Buffer>) -> Kept {
        if self != Self::Rounded {
            return Kept::Exact(rows);
        }
        let mut bits = self.room(rows.len());
        bits.par_chunks_mut(CHUNK).zip(rows.par_chunks(CHUNK)).for_each(|(bits, rows)| {
            let _part = Part::Own.mark();
            round(rows, bits);
        });
        Kept::Rounded(bits)
    }

    /// Lays rows by of which `bits` was made by [`round_block`] where they are to be rounded.
    pub(super) fn either(self, rows: Buffer, bits: Reused<u16>) -> Kept {
        if self == Self::Rounded { Kept::Rounded(bits) } else { Kept::Exact(Arc::new(rows)) }
    }
}

/// Rounds a block of rows into the room that is there for it; there may be none.
pub(super) fn round_block(rows: &[f32], bits: &mut [u16]) {
    if !bits.is_empty() {
        round(rows, bits);
    }
}

impl Kept {
    /// The block of rows of `width` values that begins with row `first`; `room` is memory for it.
    pub(super) fn block<'a>(&'a self, width: usize, first: usize, room: &'a mut Buffer) -> &'a [f32] {
        match self {
            Self::Exact(rows) => block(rows, width, first),
            Self::Rounded(bits) => {
                let bits = block(bits, width, first);
                *room = Buffer::scratch(bits.len());
                widen(bits, room);
                room
            }
        }
    }

    /// All rows.
    pub(super) fn into_rows(self) -> Buffer {
        let (mut rows, waiting) = self.opened();
        if let Some(bits) = waiting.0 {
            rows.par_chunks_mut(CHUNK).zip(bits.par_chunks(CHUNK)).for_each(|(rows, bits)| {
                let _part = Part::Own.mark();
                widen(bits, rows);
            });
        }
        rows
    }

    /// Memory for all rows, and what [`ToWiden::block`] has still to write there.
    pub(super) fn opened(self) -> (Buffer, ToWiden) {
        match self {
            Self::Exact(rows) => {
                (Arc::try_unwrap(rows).unwrap_or_else(|shared| Buffer::copy_of(&shared)), ToWiden(None))
            }
            Self::Rounded(bits) => (Buffer::scratch(bits.len()), ToWiden(Some(bits))),
        }
    }
}

/// What is still to be widened of rows; nothing, if they were kept as they are.
pub(super) struct ToWiden(Option<Reused<u16>>);

impl ToWiden {
    /// Writes the block of rows of `width` values that begins with row `first`, if that is still to be done.
    pub(super) fn block(&self, width: usize, first: usize, rows: &mut [f32]) {
        if let Some(bits) = &self.0 {
            widen(block(bits, width, first), rows);
        }
    }
}

vectorised! {
    fn round(values: &[f32], bits: &mut [u16]) {
        bits.iter_mut().zip(values).for_each(|(bits, &value)| *bits = bf16::from_f32(value).to_bits());
    }

    fn widen(bits: &[u16], values: &mut [f32]) {
        values.iter_mut().zip(bits).for_each(|(value, &bits)| *value = bf16::from_bits(bits).to_f32());
    }
}
