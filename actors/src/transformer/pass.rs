//! One micro-batch on its way through the model, forward.
//!
//! Between two base products everything that is row by row is done block of rows by block of rows: the adapters'
//! part of the product that came back, the residual sum, the norm, the adapters' part of the next one.

use std::ops::Range;
use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, Group, LinearId};
use protocol::model::Norm;

use super::ops::rows::{block, for_each_block2, for_each_block3};
use super::ops::{Adapter, CausalAttention, RmsNorm, RopeTable, Sequences, swiglu};
use super::tape::{LayerTape, Lows};
use super::{Llama, LlamaError};
use crate::backend::BackendError;
use crate::data::MicroBatch;
use crate::lora::{Draw, Dropout, LoraAdapters, Values};

/// A micro-batch and what it goes through.
pub(super) struct Pass<'a> {
    pub(super) llama: &'a Llama,
    pub(super) adapters: Option<&'a LoraAdapters>,
    /// Where the adapters' inputs are dropped at random from; `None` drops nothing.
    pub(super) draw: Option<Draw>,
    pub(super) attention: CausalAttention,
    pub(super) tokens: usize,
}

/// What leaves the last layer that was passed.
pub(super) struct Hidden {
    /// The residual stream.
    pub(super) stream: Buffer,
    /// The same after the norm that follows: the next layer's, or the final one.
    pub(super) normed: Buffer,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        llama: &'a Llama,
        batch: &MicroBatch,
        adapters: Option<&'a LoraAdapters>,
        draw: Option<Draw>,
    ) -> Self {
        let config = llama.config();
        let runs = batch.runs();
        let attention = CausalAttention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            rope: RopeTable::new(&llama.frequencies, runs.iter().copied().max().unwrap_or(0)),
            sequences: Sequences::new(&runs),
        };
        Self { llama, adapters, draw, attention, tokens: batch.tokens.len() }
    }

    /// Through some layers, of which `stream` enters the first; what those from `keep_from` on keep is pushed on `tape`.
    pub(super) fn forward(
        &self,
        mut stream: Buffer,
        layers: Range<usize>,
        keep_from: usize,
        tape: &mut Vec<LayerTape>,
    ) -> Result<Hidden, LlamaError> {
        let config = self.llama.config();
        let first = self.adapter(LinearId { layer: layers.start as u16, group: Group::Qkv })?;
        let (mut normed, mut low) = self.join(&mut stream, None, self.norm(Norm::Input(layers.start)), first);
        for layer in layers {
            let at = |group| LinearId { layer: layer as u16, group };
            let mut lows = Lows { qkv: low, ..Lows::default() };

            let mut qkv = self.product(at(Group::Qkv), Direction::Forward, Arc::new(normed))?;
            self.turn(&mut qkv, self.adapter(at(Group::Qkv))?, &lows.qkv);
            let attended = self.attention.forward(&qkv);
            lows.o = self.down(self.adapter(at(Group::O))?, &attended.rows);

            let mut middle = self.product(at(Group::O), Direction::Forward, attended.rows.clone())?;
            let part = self.adapter(at(Group::O))?.map(|adapter| (adapter, &lows.o));
            let norm = self.norm(Norm::PostAttention(layer));
            (normed, lows.gate_up) =
                self.join(&mut middle, Some((&stream, part)), norm, self.adapter(at(Group::GateUp))?);

            let mut both = self.product(at(Group::GateUp), Direction::Forward, Arc::new(normed))?;
            let gated;
            (gated, lows.down) = self.gate(&mut both, at(Group::GateUp), &lows.gate_up)?;

            let mut out = self.product(at(Group::Down), Direction::Forward, Arc::new(gated))?;
            let part = self.adapter(at(Group::Down))?.map(|adapter| (adapter, &lows.down));
            let (norm, next) = if layer + 1 < config.layers {
                let next = LinearId { layer: layer as u16 + 1, group: Group::Qkv };
                (self.norm(Norm::Input(layer + 1)), self.adapter(next)?)
            } else {
                (self.norm(Norm::Final), None)
            };
            (normed, low) = self.join(&mut out, Some((&middle, part)), norm, next);

            if layer >= keep_from {
                tape.push(LayerTape { input: stream, qkv, attended, middle, both, lows });
            }
            stream = out;
        }
        Ok(Hidden { stream, normed })
    }

    /// Asks the backend for a base product.
    pub(super) fn product(
        &self,
        linear: LinearId,
        direction: Direction,
        rows: Arc<Buffer>,
    ) -> Result<Buffer, BackendError> {
        let (_, outer) = self.llama.config().shape(linear.group).along(direction);
        let out = self.llama.backend.apply(linear.along(direction), rows, self.tokens)?.into_rows();
        if out.len() != self.tokens * outer {
            let why = format!("the backend returned {} values for {} × {outer}", out.len(), self.tokens);
            return Err(BackendError { product: linear.along(direction), why: why.into() });
        }
        Ok(out)
    }

    /// The adapters of a group, if it has any, locked against change.
    pub(super) fn adapter(&self, linear: LinearId) -> Result<Option<Adapter<'a>>, LlamaError> {
        let Some((adapters, group)) = self.adapters.and_then(|adapters| Some((adapters, adapters.group(linear)?)))
        else {
            return Ok(None);
        };
        let config = adapters.config();
        let dropout = self.draw.filter(|_| config.dropout > 0.0).map(|draw| {
            let slots = group.slots.iter();
            slots.map(|slot| Dropout::new(config.dropout, draw, linear.layer, slot.projection as u8)).collect()
        });
        Ok(Some(Adapter {
            slots: &group.slots,
            rank: config.rank,
            scaling: config.scaling(),
            shape: self.llama.config().shape(linear.group),
            a: Values::of(&group.a)?,
            b: Values::of(&group.b)?,
            dropout,
        }))
    }

    pub(super) fn norm(&self, norm: Norm) -> RmsNorm<'a> {
        let eps = self.llama.config().rms_norm_eps as f32;
        let weight = match norm {
            Norm::Input(layer) => &self.llama.norms[layer].attention,
            Norm::PostAttention(layer) => &self.llama.norms[layer].feed_forward,
            Norm::Final => &self.llama.final_norm,
        };
        RmsNorm { weight, eps }
    }

    /// Makes a product's rows the residual stream: adds the adapters' part and the stream before it, if there is one.
    /// Returns the stream's norm and what the next group's adapters make of that.
    fn join(
        &self,
        rows: &mut Buffer,
        before: Option<(&Buffer, Option<(Adapter<'_>, &Buffer)>)>,
        norm: RmsNorm<'_>,
        next: Option<Adapter<'_>>,
    ) -> (Buffer, Buffer) {
        let hidden = self.llama.config().hidden_size;
        let low_width = next.as_ref().map_or(0, Adapter::width);
        let mut normed = Buffer::scratch(rows.len());
        let mut low = Buffer::scratch(self.tokens * low_width);
        let operands = ((&mut rows[..], hidden), (&mut normed[..], hidden), (&mut low[..], low_width));
        for_each_block3(self.tokens, operands.0, operands.1, operands.2, |first, rows, normed, low| {
            if let Some((stream, part)) = &before {
                if let Some((adapter, low)) = part {
                    adapter.up_rows(block(low, adapter.width(), first), rows);
                }
                super::vector::add(rows, block(stream, hidden, first));
            }
            norm.forward(rows, normed);
            if let Some(next) = &next {
                next.down_rows(first, normed, low);
            }
        });
        (normed, low)
    }

    /// Adds the adapters' part to queries, keys and values, and turns them to their positions.
    fn turn(&self, qkv: &mut Buffer, adapter: Option<Adapter<'_>>, low: &Buffer) {
        let width = self.attention.width();
        for_each_block2(self.tokens, (qkv, width), (&mut [], 0), |first, qkv, _| {
            if let Some(adapter) = &adapter {
                adapter.up_rows(block(low, adapter.width(), first), qkv);
            }
            self.attention.turn_rows(first, qkv);
        });
    }

    /// What a group's adapters make of its input between their projections; empty without adapters.
    fn down(&self, adapter: Option<Adapter<'_>>, x: &Buffer) -> Buffer {
        let Some(adapter) = adapter else { return Buffer::default() };
        let mut low = Buffer::scratch(self.tokens * adapter.width());
        for_each_block2(self.tokens, (&mut low, adapter.width()), (&mut [], 0), |first, low, _| {
            adapter.down_rows(first, block(x, adapter.shape.d_in, first), low);
        });
        low
    }

    /// Adds the adapters' part to the gates and what they let through. Returns the gated features and what the next
    /// group's adapters make of these.
    fn gate(&self, both: &mut Buffer, linear: LinearId, low: &Buffer) -> Result<(Buffer, Buffer), LlamaError> {
        let features = self.llama.config().intermediate_size;
        let adapter = self.adapter(linear)?;
        let next = self.adapter(LinearId { group: Group::Down, ..linear })?;
        let next_width = next.as_ref().map_or(0, Adapter::width);
        let mut gated = Buffer::scratch(self.tokens * features);
        let mut next_low = Buffer::scratch(self.tokens * next_width);
        let operands = ((&mut both[..], 2 * features), (&mut gated[..], features), (&mut next_low[..], next_width));
        for_each_block3(self.tokens, operands.0, operands.1, operands.2, |first, both, gated, next_low| {
            if let Some(adapter) = &adapter {
                adapter.up_rows(block(low, adapter.width(), first), both);
            }
            swiglu::forward(features, both, gated);
            if let Some(next) = &next {
                next.down_rows(first, gated, next_low);
            }
        });
        Ok((gated, next_low))
    }
}
