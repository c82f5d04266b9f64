//! What the forward pass keeps for the backward pass: inputs of what cannot be computed again without a worker.
//!
//! Norms' outputs, attention's probabilities and the gated features are not here: they follow from what is.

use protocol::buffer::Buffer;

use super::ops::Attended;

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
