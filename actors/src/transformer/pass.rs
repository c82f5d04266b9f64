//! Rows on their way through the model, forward: a micro-batch, or what texts go on with.
//!
//! Between two base products everything that is row by row is done block of rows by block of rows: the adapters'
//! part of the product that came back, the residual sum, the norm, the adapters' part of the next one.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use protocol::buffer::{Buffer, Reused};
use protocol::ids::{Direction, Group, LinearId};
use protocol::model::Norm;

use super::attends::{Attends, Whole};
use super::beside::Beside;
use super::ops::norm::through;
use super::ops::rows::{block, for_each_block2, for_each_block3, for_each_block4};
use super::ops::{Adapter, KnownPart, RmsNorm, gates};
use super::products::product;
use super::tape::{Added, Keep, Kept, LayerTape, Lows, round_block};
use super::token_rows::Rows;
use super::vector::add;
use super::{Llama, LlamaError};
use crate::backend::BackendError;
use crate::data::MicroBatch;
use crate::lora::{Draw, Dropout, LoraAdapters, Values};

/// Rows and what they go through.
pub(super) struct Pass<'a, A = Whole<'a>> {
    pub(super) llama: &'a Llama,
    /// The adapters, each with the rows that it is beside.
    adapters: Vec<(Range<usize>, &'a LoraAdapters)>,
    /// Where the adapters' inputs are dropped at random from; `None` drops nothing.
    draw: Option<Draw>,
    pub(super) attention: A,
    pub(super) tokens: usize,
    /// The norms that are trained, as they are now.
    norms: HashMap<Norm, Values<'a>>,
}

/// What leaves the last layer that was passed.
pub(super) struct Hidden {
    /// The residual stream.
    pub(super) stream: Buffer,
    /// The same after the final norm; below the last layer what the next one's product is asked for with.
    pub(super) normed: Buffer,
}

impl<'a> Pass<'a> {
    /// A micro-batch.
    pub(super) fn new(
        llama: &'a Llama,
        batch: &MicroBatch,
        adapters: Option<&'a LoraAdapters>,
        draw: Option<Draw>,
    ) -> Result<Self, LlamaError> {
        let tokens = batch.tokens.len();
        let attention = Whole::new(llama.config(), &batch.runs());
        let beside = adapters.map(|adapters| (0..tokens, adapters)).into_iter().collect();
        Ok(Self { draw, ..Self::of_rows(llama, tokens, attention, beside)? })
    }

    /// The adapters of a group, if it has any, locked against change.
    pub(super) fn adapter(&self, linear: LinearId) -> Result<Option<Adapter<'a>>, LlamaError> {
        let Some((_, adapters)) = self.adapters.first() else { return Ok(None) };
        self.adapter_of(adapters, linear)
    }
}

impl<'a, A: Attends> Pass<'a, A> {
    /// So many rows that attend in this way, each with the adapters beside it. Norms that are trained are those of the first
    /// adapters: the others must have none, or be the same.
    pub(super) fn of_rows(
        llama: &'a Llama,
        tokens: usize,
        attention: A,
        adapters: Vec<(Range<usize>, &'a LoraAdapters)>,
    ) -> Result<Self, LlamaError> {
        let trained = adapters.iter().take(1).flat_map(|(_, adapters)| adapters.norms());
        let norms =
            trained.map(|saved| Ok((saved.norm, Values::of(&saved.factors)?))).collect::<Result<_, LlamaError>>()?;
        Ok(Self { llama, adapters, draw: None, attention, tokens, norms })
    }

    /// The residual stream as it enters the first layer: the embeddings of its rows' tokens, of which an adapter may have its own.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Buffer, LlamaError> {
        let (config, mut stream) = (self.llama.config(), self.llama.embed(tokens)?);
        for (rows, adapters) in &self.adapters {
            if let Some(trained) = Rows::of(adapters, config)? {
                let features = config.hidden_size;
                trained.embed(&tokens[rows.clone()], &mut stream[rows.start * features..rows.end * features]);
            }
        }
        Ok(stream)
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
        let first = self.beside(LinearId { layer: layers.start as u16, group: Group::Qkv })?;
        let way = if self.llama.backend.asks_workers() { Keep::Rounded } else { Keep::Exact };
        let keep_in = |layer| if layer >= keep_from { way } else { Keep::Nothing };
        let norm = self.norm(Norm::BeforeAttention(layers.start));
        let mut entered = self.enter(&mut stream, None, norm, &first, keep_in(layers.start));
        for layer in layers {
            let at = |group| LinearId { layer: layer as u16, group };
            let keep = keep_in(layer);
            let Entered { normed, low, rounded: input } = entered;
            let mut lows = Lows { qkv: low, ..Lows::default() };

            let mut qkv = self.product(at(Group::Qkv), Direction::Forward, Arc::new(normed))?;
            let (unnormed, turned) = self.turn(layer, &mut qkv, &lows.qkv, keep)?;
            let attended = self.attention.attend(layer, &qkv);
            let qkv = keep.either(qkv, turned);
            let beside = self.beside(at(Group::O))?;
            let rows;
            (lows.o, rows) = self.down(&beside, &attended.rows);

            let out = self.product(at(Group::O), Direction::Forward, rows)?;
            let branch = Branch {
                stream: &stream,
                part: (&beside, &lows.o),
                bias: self.bias(at(Group::O)),
                norm: self.norm(Norm::AfterAttention(layer)),
            };
            let norm = self.norm(Norm::BeforeFeedForward(layer));
            let joined = self.join(out, branch, norm, &self.beside(at(Group::GateUp))?, keep);
            let (middle, of_attention) = (joined.stream, joined.added);
            lows.gate_up = joined.entered.low;

            let normed = Arc::new(joined.entered.normed);
            let product = self.product(at(Group::GateUp), Direction::Forward, normed)?;
            let (gated, both);
            (gated, lows.down, both) = self.gate(product, at(Group::GateUp), &lows.gate_up, keep)?;

            let out = self.product(at(Group::Down), Direction::Forward, Arc::new(gated))?;
            let beside = self.beside(at(Group::Down))?;
            let branch = Branch {
                stream: &middle,
                part: (&beside, &lows.down),
                bias: self.bias(at(Group::Down)),
                norm: self.norm(Norm::AfterFeedForward(layer)),
            };
            let (norm, next) = if layer + 1 < config.layers {
                let next = LinearId { layer: layer as u16 + 1, group: Group::Qkv };
                (self.norm(Norm::BeforeAttention(layer + 1)), self.beside(next)?)
            } else {
                (self.norm(Norm::Final), Beside::nothing())
            };
            let after = self.join(out, branch, norm, &next, keep_in(layer + 1));

            if keep != Keep::Nothing {
                let of = |added: Buffer| keep.rows(Arc::new(added));
                tape.push(LayerTape {
                    input: keep.either(stream, input),
                    qkv,
                    unnormed: of(unnormed),
                    attended: keep.rows(attended.rows),
                    log_sums: attended.log_sums,
                    middle: keep.either(middle, joined.entered.rounded),
                    both,
                    added: Added { of_attention: of(of_attention), of_feed_forward: of(after.added) },
                    lows,
                });
            }
            (stream, entered) = (after.stream, after.entered);
        }
        Ok(Hidden { stream, normed: entered.normed })
    }

    /// Asks the backend for a base product.
    pub(super) fn product(
        &self,
        linear: LinearId,
        direction: Direction,
        rows: Arc<Buffer>,
    ) -> Result<Buffer, BackendError> {
        product(self.llama.config(), &*self.llama.backend, linear.along(direction), rows, self.tokens)
    }

    /// A group's adapters of all rows, locked against change, and what is known of its product.
    fn beside(&self, linear: LinearId) -> Result<Beside<'a>, LlamaError> {
        let parts = self
            .adapters
            .iter()
            .map(|(rows, adapters)| Ok(self.adapter_of(adapters, linear)?.map(|adapter| (rows.clone(), adapter))));
        let parts = parts.filter_map(Result::transpose).collect::<Result<_, LlamaError>>()?;
        Ok(Beside::new(parts, self.llama.backend.known(linear).map(KnownPart::widened)))
    }

    /// The adapters of a group, if it has any, locked against change.
    fn adapter_of(&self, adapters: &'a LoraAdapters, linear: LinearId) -> Result<Option<Adapter<'a>>, LlamaError> {
        let Some(group) = adapters.group(linear) else { return Ok(None) };
        let config = adapters.config();
        let dropout = self.draw.filter(|_| config.dropout > 0.0).map(|draw| {
            let slots = group.slots.iter();
            slots.map(|slot| Dropout::new(config.dropout, draw, linear.layer, slot.projection as u8)).collect()
        });
        Ok(Some(Adapter {
            slots: &group.slots,
            shape: self.llama.config().shape(linear.group),
            a: Values::of(&group.a)?,
            b: Values::of(&group.b)?,
            dropout,
        }))
    }

    /// Whether a norm is trained.
    pub(super) fn is_trained(&self, norm: Norm) -> bool {
        self.norms.contains_key(&norm)
    }

    /// One of the norms, if the family has it.
    pub(super) fn norm(&self, norm: Norm) -> Option<RmsNorm<'_>> {
        let eps = self.llama.config().rms_norm_eps as f32;
        if let Some(weight) = self.norms.get(&norm) {
            return Some(RmsNorm { weight, eps });
        }
        match norm {
            Norm::BeforeAttention(layer)
            | Norm::Query(layer)
            | Norm::Key(layer)
            | Norm::AfterAttention(layer)
            | Norm::BeforeFeedForward(layer)
            | Norm::AfterFeedForward(layer) => self.llama.layers[layer].norm(norm, eps),
            Norm::Final => Some(RmsNorm { weight: &self.llama.final_norm, eps }),
        }
    }

    /// What is added to each row of a group's product.
    fn bias(&self, linear: LinearId) -> Option<&'a [f32]> {
        self.llama.layers[usize::from(linear.layer)].bias(linear.group)
    }

    /// Adds to the residual stream what a product gives, and takes its next norm. What the product gave, with all that is
    /// added to its rows, is kept where a norm stands behind it.
    fn join(
        &self,
        mut out: Buffer,
        branch: Branch<'_>,
        norm: Option<RmsNorm<'_>>,
        next: &Beside<'_>,
        keep: Keep,
    ) -> Joined {
        let hidden = self.llama.config().hidden_size;
        let Some(behind) = branch.norm else {
            let entered = self.enter(&mut out, Some(branch), norm, next, keep);
            return Joined { stream: out, added: Buffer::default(), entered };
        };
        let mut stream = Buffer::scratch(out.len());
        for_each_block2(self.tokens, (&mut out, hidden), (&mut stream, hidden), |first, out, stream| {
            branch.complete(first, out);
            behind.forward(out, stream);
            add(stream, block(branch.stream, hidden, first));
        });
        let entered = self.enter(&mut stream, None, norm, next, keep);
        Joined { stream, added: out, entered }
    }

    /// Makes a product's rows the residual stream, if they are not yet: adds all that is added to them, and the stream
    /// before. Returns what the next group's product is asked for with, the stream's norm or what is left of it; what else is made of
    /// that; and the stream as it is to be kept.
    fn enter(
        &self,
        rows: &mut Buffer,
        branch: Option<Branch<'_>>,
        norm: Option<RmsNorm<'_>>,
        next: &Beside<'_>,
        keep: Keep,
    ) -> Entered {
        let hidden = self.llama.config().hidden_size;
        let low_width = next.width();
        let mut rounded = keep.room(rows.len());
        let mut normed = Buffer::scratch(rows.len());
        let mut low = Buffer::scratch(self.tokens * low_width);
        let (rows, normed_rows, low_rows) =
            ((&mut rows[..], hidden), (&mut normed[..], hidden), (&mut low[..], low_width));
        let rounded_rows = (&mut rounded[..], keep.width(hidden));
        for_each_block4(self.tokens, rows, normed_rows, low_rows, rounded_rows, |first, rows, normed, low, rounded| {
            if let Some(branch) = &branch {
                branch.complete(first, rows);
                add(rows, block(branch.stream, hidden, first));
            }
            round_block(rows, rounded);
            through(norm, rows, normed);
            next.down_rows(first, normed, low);
            next.take_rows(normed, low);
        });
        Entered { normed, low, rounded }
    }

    /// Adds to queries, keys and values what is added to their product, takes the norms of queries and keys where the
    /// family has them, and turns them to their positions. Returns queries and keys as they were before their norms, and
    /// all as they are afterwards, rounded, each if it is to be kept so.
    fn turn(
        &self,
        layer: usize,
        qkv: &mut Buffer,
        low: &Buffer,
        keep: Keep,
    ) -> Result<(Buffer, Reused<u16>), LlamaError> {
        let linear = LinearId { layer: layer as u16, group: Group::Qkv };
        let (beside, bias) = (self.beside(linear)?, self.bias(linear));
        let (query, key) = (self.norm(Norm::Query(layer)), self.norm(Norm::Key(layer)));
        let heads = self.attention.heads();
        let (width, turned) = (heads.width(), heads.turned_width());
        let queries = heads.queries * heads.features;
        let kept_width = if keep != Keep::Nothing && query.is_some() { turned } else { 0 };
        let mut kept = Buffer::scratch(self.tokens * kept_width);
        let mut rounded = keep.room(qkv.len());
        let operands = ((&mut qkv[..], width), (&mut kept[..], kept_width), (&mut rounded[..], keep.width(width)));
        for_each_block3(self.tokens, operands.0, operands.1, operands.2, |first, qkv, kept, rounded| {
            complete(bias, &beside, low, first, qkv);
            if kept_width > 0 {
                kept.chunks_exact_mut(turned).zip(qkv.chunks_exact(width)).for_each(|(to, from)| {
                    to.copy_from_slice(&from[..turned]);
                });
            }
            if let (Some(query), Some(key)) = (query, key) {
                for row in qkv.chunks_exact_mut(width) {
                    let (of_query, of_key) = row[..turned].split_at_mut(queries);
                    query.replace(of_query);
                    key.replace(of_key);
                }
            }
            self.attention.turn_rows(layer, first, qkv);
            round_block(qkv, rounded);
        });
        Ok((kept, rounded))
    }

    /// What is made of a group's input between the projections of what is beside it; and the rows that its product is asked for with,
    /// others than these where something is taken out of them.
    fn down(&self, beside: &Beside<'_>, x: &Arc<Buffer>) -> (Buffer, Arc<Buffer>) {
        let features = x.len() / self.tokens;
        let mut low = Buffer::scratch(self.tokens * beside.width());
        let left_width = if beside.takes() { features } else { 0 };
        let mut left = Buffer::scratch(self.tokens * left_width);
        if beside.width() > 0 {
            let operands = ((&mut low[..], beside.width()), (&mut left[..], left_width));
            for_each_block2(self.tokens, operands.0, operands.1, |first, low, left| {
                let x = block(x, features, first);
                beside.down_rows(first, x, low);
                if beside.takes() {
                    left.copy_from_slice(x);
                    beside.take_rows(left, low);
                }
            });
        }
        (low, if beside.takes() { Arc::new(left) } else { Arc::clone(x) })
    }

    /// Adds to the gates and what they let through what is added to their product. Returns the gated features, or what
    /// is left of them, what else is made of these, and the former as they are to be kept.
    fn gate(
        &self,
        mut both: Buffer,
        linear: LinearId,
        low: &Buffer,
        keep: Keep,
    ) -> Result<(Buffer, Buffer, Kept), LlamaError> {
        let features = self.llama.config().intermediate_size;
        let (beside, bias) = (self.beside(linear)?, self.bias(linear));
        let next = self.beside(LinearId { group: Group::Down, ..linear })?;
        let next_width = next.width();
        let activation = self.llama.config().traits.activation;
        let mut gated = Buffer::scratch(self.tokens * features);
        let mut next_low = Buffer::scratch(self.tokens * next_width);
        let mut rounded = keep.room(both.len());
        let (gates, out) = ((&mut both[..], 2 * features), (&mut gated[..], features));
        let (lows, bits) = ((&mut next_low[..], next_width), (&mut rounded[..], keep.width(2 * features)));
        for_each_block4(self.tokens, gates, out, lows, bits, |first, both, gated, next_low, rounded| {
            complete(bias, &beside, low, first, both);
            gates::forward(activation, features, both, gated);
            round_block(both, rounded);
            next.down_rows(first, gated, next_low);
            next.take_rows(gated, next_low);
        });
        Ok((gated, next_low, keep.either(both, rounded)))
    }
}

/// What a product adds to the residual stream.
struct Branch<'a> {
    /// The stream that it is added to.
    stream: &'a Buffer,
    /// The product's adapters, and what they made of its input between their projections.
    part: (&'a Beside<'a>, &'a Buffer),
    bias: Option<&'a [f32]>,
    /// The norm that it goes through first.
    norm: Option<RmsNorm<'a>>,
}

impl Branch<'_> {
    fn complete(&self, first: usize, rows: &mut [f32]) {
        let (beside, low) = self.part;
        complete(self.bias, beside, low, first, rows);
    }
}

/// Adds to a product's rows, of which the first has number `first`, what the owner adds to them.
fn complete(bias: Option<&[f32]>, beside: &Beside<'_>, low: &Buffer, first: usize, rows: &mut [f32]) {
    if let Some(bias) = bias {
        rows.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
    }
    if beside.width() > 0 {
        beside.up_rows(first, block(low, beside.width(), first), rows);
    }
}

/// The residual stream, and what was added to it where a norm stands between.
struct Joined {
    stream: Buffer,
    added: Buffer,
    entered: Entered,
}

/// What the next group's product is asked for with, and what is beside it between the projections.
struct Entered {
    normed: Buffer,
    low: Buffer,
    /// The stream, if it is to be kept so.
    rounded: Reused<u16>,
}
