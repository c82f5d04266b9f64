//! What the forward pass keeps for the backward pass: inputs of what cannot be computed again without a worker.
//!
//! Norms' outputs, attention's probabilities and the gated features are not here: they follow from what is.
//!
//! It is most of an owner's memory. Where products carry the noise of integers and encryption, some percent of a value, all
//! of it but the adapters' values is rounded to bfloat16 while it waits, by 0.4 % at most and without a bias.

use std::sync::Arc;

use half::bf16;
use protocol::buffer::{Buffer, Reused};
use protocol::parts::Part;
use rayon::prelude::*;

use super::ops::Attended;
use super::vector::vectorised;

/// Values that a thread rounds at a time.
const CHUNK: usize = 1 << 14;

/// One layer's part.
pub(super) struct LayerTape {
    /// The residual stream as it entered, `tokens × hidden_size`.
    pub(super) input: Buffer,
    /// Queries and keys, turned to their positions, and values.
    pub(super) qkv: Buffer,
    /// Queries and keys before their norms, where a family has these; empty elsewhere.
    pub(super) unnormed: Buffer,
    /// What attention made of them.
    pub(super) attended: Attended,
    /// The residual stream after attention.
    pub(super) middle: Buffer,
    /// Gates and what they let through, `tokens × 2·intermediate_size`.
    pub(super) both: Buffer,
    /// What was added to the stream.
    pub(super) added: Added,
    /// Values between the down and the up projections of the adapters.
    pub(super) lows: Lows,
}

/// What attention and the feed-forward block give, where a norm stands between that and the stream; empty elsewhere.
pub(super) struct Added {
    pub(super) of_attention: Buffer,
    pub(super) of_feed_forward: Buffer,
}

/// Of each group's adapters, `tokens ×` the slots' ranks together; empty where a group has none.
#[derive(Default)]
pub(super) struct Lows {
    pub(super) qkv: Buffer,
    pub(super) o: Buffer,
    pub(super) gate_up: Buffer,
    pub(super) down: Buffer,
}

/// A layer's part while it waits.
pub(super) enum Waiting {
    /// As it is.
    Exact(LayerTape),
    /// Rounded to bfloat16.
    Rounded(RoundedTape),
}

/// [`LayerTape`], rounded.
pub(super) struct RoundedTape {
    input: Rounded,
    qkv: Rounded,
    unnormed: Rounded,
    attended: Rounded,
    log_sums: Buffer,
    middle: Rounded,
    both: Rounded,
    of_attention: Rounded,
    of_feed_forward: Rounded,
    lows: Lows,
}

impl LayerTape {
    /// Lays it by until the way back, as it is or rounded.
    pub(super) fn wait(self, rounded: bool) -> Waiting {
        if !rounded {
            return Waiting::Exact(self);
        }
        let Self { input, qkv, unnormed, attended, middle, both, added, lows } = self;
        Waiting::Rounded(RoundedTape {
            input: Rounded::new(&input),
            qkv: Rounded::new(&qkv),
            unnormed: Rounded::new(&unnormed),
            attended: Rounded::new(&attended.rows),
            log_sums: attended.log_sums,
            middle: Rounded::new(&middle),
            both: Rounded::new(&both),
            of_attention: Rounded::new(&added.of_attention),
            of_feed_forward: Rounded::new(&added.of_feed_forward),
            lows,
        })
    }
}

impl Waiting {
    /// What was laid by.
    pub(super) fn take(self) -> LayerTape {
        match self {
            Self::Exact(tape) => tape,
            Self::Rounded(tape) => LayerTape {
                input: tape.input.widened(),
                qkv: tape.qkv.widened(),
                unnormed: tape.unnormed.widened(),
                attended: Attended { rows: Arc::new(tape.attended.widened()), log_sums: tape.log_sums },
                middle: tape.middle.widened(),
                both: tape.both.widened(),
                added: Added {
                    of_attention: tape.of_attention.widened(),
                    of_feed_forward: tape.of_feed_forward.widened(),
                },
                lows: tape.lows,
            },
        }
    }
}

/// Values in bfloat16.
struct Rounded(Reused<u16>);

impl Rounded {
    fn new(values: &[f32]) -> Self {
        let mut bits = Reused::scratch(values.len());
        bits.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(bits, values)| {
            let _part = Part::Own.mark();
            round(values, bits);
        });
        Self(bits)
    }

    fn widened(&self) -> Buffer {
        let mut values = Buffer::scratch(self.0.len());
        values.par_chunks_mut(CHUNK).zip(self.0.par_chunks(CHUNK)).for_each(|(values, bits)| {
            let _part = Part::Own.mark();
            widen(bits, values);
        });
        values
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
