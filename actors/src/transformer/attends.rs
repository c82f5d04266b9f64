//! How the rows of a pass attend: each sequence to itself alone, as in training, or to what it kept of earlier passes too.

use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::model::LlamaConfig;

use super::ops::{
    Attended, CachedAttention, CausalAttention, Heads, KeptSequences, LayerAttention, Piece, RopeRows, RopeTables,
    Sequences,
};

/// See the module's documentation.
pub(super) trait Attends: Sync {
    /// What attends.
    fn heads(&self) -> Heads;

    /// Turns the queries and keys of some rows, of which the first has number `first`, to their positions.
    fn turn_rows(&self, layer: usize, first: usize, qkv: &mut [f32]);

    /// Attention over rows whose queries and keys are turned already.
    fn attend(&self, layer: usize, qkv: &[f32]) -> Attended;
}

/// The heads of a model.
fn heads_of(config: &LlamaConfig) -> Heads {
    Heads {
        queries: config.heads,
        keys: config.kv_heads,
        features: config.head_dim,
        scale: config.score_scale() as f32,
        cap: config.traits.score_cap.map(|cap| cap as f32),
    }
}

/// Whether a layer turns by the rotations of layers with a window, if it turns.
fn turns_locally(config: &LlamaConfig, layer: usize) -> Option<bool> {
    config.rope_of(layer).map(|rope| config.traits.local_rope.as_ref() == Some(rope))
}

/// Whole sequences, one after the other.
pub(super) struct Whole<'a> {
    config: &'a LlamaConfig,
    pub(super) attention: CausalAttention,
    /// Rotations of the texts' positions.
    rope: RopeTables,
    /// Those of layers with a window, where they differ.
    local_rope: Option<RopeTables>,
}

impl<'a> Whole<'a> {
    /// Sequences of these lengths.
    pub(super) fn new(config: &'a LlamaConfig, lengths: &[usize]) -> Self {
        Self {
            config,
            attention: CausalAttention { heads: heads_of(config), sequences: Sequences::new(lengths) },
            rope: RopeTables::new(&config.rope, lengths),
            local_rope: config.traits.local_rope.as_ref().map(|rope| RopeTables::new(rope, lengths)),
        }
    }

    /// How a layer attends.
    pub(super) fn layer(&self, layer: usize) -> LayerAttention<'_> {
        let rope = turns_locally(self.config, layer).map(|local| match &self.local_rope {
            Some(of_window) if local => of_window,
            _ => &self.rope,
        });
        LayerAttention { rope, window: self.config.window_of(layer).unwrap_or(usize::MAX) }
    }
}

impl Attends for Whole<'_> {
    fn heads(&self) -> Heads {
        self.attention.heads
    }

    fn turn_rows(&self, layer: usize, first: usize, qkv: &mut [f32]) {
        self.attention.turn_rows(self.layer(layer), first, qkv);
    }

    fn attend(&self, layer: usize, qkv: &[f32]) -> Attended {
        self.attention.forward(self.layer(layer), qkv)
    }
}

/// By what frequencies a sequence turns.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Turns {
    usual: Vec<f32>,
    /// Those of layers with a window, where they differ.
    local: Option<Vec<f32>>,
}

impl Turns {
    /// A text of so many tokens.
    pub(super) fn of(config: &LlamaConfig, length: usize) -> Self {
        let local = config.traits.local_rope.as_ref();
        Self { usual: config.rope.frequencies(length), local: local.map(|rope| rope.frequencies(length)) }
    }
}

/// Rows that follow what their sequences have kept.
pub(super) struct Continued<'a> {
    config: &'a LlamaConfig,
    attention: CachedAttention,
    kept: KeptSequences<'a>,
    rope: RopeRows,
    local_rope: Option<RopeRows>,
}

impl<'a> Continued<'a> {
    /// Pieces of sequences, each with what it turns by, and what each sequence has kept.
    pub(super) fn new(config: &'a LlamaConfig, pieces: Vec<(Piece, Turns)>, kept: KeptSequences<'a>) -> Self {
        let mut rope = RopeRows::new(config.rope.features / 2);
        let mut local = config.traits.local_rope.as_ref().map(|rope| (rope, RopeRows::new(rope.features / 2)));
        for (piece, turns) in &pieces {
            rope.extend(&turns.usual, config.rope.attention_factor() as f32, piece.past, piece.rows);
            if let (Some((of_window, rows)), Some(frequencies)) = (&mut local, &turns.local) {
                rows.extend(frequencies, of_window.attention_factor() as f32, piece.past, piece.rows);
            }
        }
        let pieces = pieces.into_iter().map(|(piece, _)| piece).collect();
        let attention = CachedAttention { heads: heads_of(config), pieces };
        Self { config, attention, kept, rope, local_rope: local.map(|(_, rows)| rows) }
    }
}

impl Attends for Continued<'_> {
    fn heads(&self) -> Heads {
        self.attention.heads
    }

    fn turn_rows(&self, layer: usize, first: usize, qkv: &mut [f32]) {
        let Some(local) = turns_locally(self.config, layer) else { return };
        let rope = self.local_rope.as_ref().filter(|_| local).unwrap_or(&self.rope);
        let Heads { features, .. } = self.attention.heads;
        let (width, turned) = (self.attention.heads.width(), self.attention.heads.turned_width());
        for (row, number) in qkv.chunks_exact_mut(width).zip(first..) {
            row[..turned].chunks_exact_mut(features).for_each(|head| rope.turn(number, head));
        }
    }

    fn attend(&self, layer: usize, qkv: &[f32]) -> Attended {
        let window = self.config.window_of(layer).unwrap_or(usize::MAX);
        let rows: Arc<Buffer> = self.kept.attend(&self.attention, layer, window, qkv);
        // Nothing goes back through these rows.
        Attended { rows, log_sums: Buffer::default() }
    }
}
