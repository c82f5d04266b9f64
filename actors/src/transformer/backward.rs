//! The way back: from the gradient at the head to those of the adapters.
//!
//! It ends at the lowest of what is trained. What lies below has nothing to learn, so no gradient of its input is asked of
//! the backend.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use protocol::buffer::Buffer;
use protocol::ids::{Direction, Group, LinearId};
use protocol::model::Norm;

use super::LlamaError;
use super::ops::norm::{back_through, through};
use super::ops::rows::{block, for_each_block, for_each_block3};
use super::ops::{AdapterGradient, Attended, gates};
use super::pass::Pass;
use super::tape::{Kept, LayerTape};
use crate::lora::Depth;

/// What was found on the way back.
#[derive(Default)]
pub(super) struct Found {
    /// Gradients of the adapters.
    pub(super) adapters: BTreeMap<LinearId, AdapterGradient>,
    /// Those of the norms that are trained.
    pub(super) norms: HashMap<Norm, Vec<f32>>,
    /// That of the embedded text, where the way went so far.
    pub(super) embedded: Option<Buffer>,
}

/// A pass on its way back.
pub(super) struct Backward<'a> {
    pass: &'a Pass<'a>,
    /// How far down it goes.
    depth: Depth,
    found: Found,
}

impl<'a> Backward<'a> {
    pub(super) fn new(pass: &'a Pass<'a>, depth: Depth) -> Self {
        Self { pass, depth, found: Found::default() }
    }

    /// `stream` is the residual stream after the last layer, `gradient` the one at the final norm's output, and `tape`
    /// what the layers from the lowest adapted one on kept.
    pub(super) fn run(
        mut self,
        stream: &Buffer,
        mut gradient: Buffer,
        tape: Vec<LayerTape>,
    ) -> Result<Found, LlamaError> {
        let (pass, hidden) = (self.pass, self.pass.llama.config().hidden_size);
        let norm = pass.norm(Norm::Final);
        self.train(Norm::Final, stream, &gradient);
        for_each_block(pass.tokens, (&mut gradient, hidden), |first, gradient| {
            back_through(norm, block(stream, hidden, first), None, gradient);
        });
        for (layer, tape) in (0..pass.llama.config().layers).rev().zip(tape.into_iter().rev()) {
            match self.layer(layer, tape, gradient)? {
                Some(below) => gradient = below,
                None => return Ok(self.found),
            }
        }
        Ok(Found { embedded: Some(gradient), ..self.found })
    }

    /// Notes the gradient of a norm's factors, if they are trained, from the rows that it was given and the gradients of
    /// those that it made of them.
    fn train(&mut self, norm: Norm, rows: &[f32], gradients: &[f32]) {
        if let Some(of) = self.pass.norm(norm).filter(|_| self.pass.is_trained(norm)) {
            self.found.norms.insert(norm, of.gradient_of_weight(rows, gradients));
        }
    }

    /// Through one layer: from the gradient of the stream above it to that of the stream below, or `None` where the
    /// lowest adapters were reached.
    fn layer(&mut self, layer: usize, tape: LayerTape, gradient: Buffer) -> Result<Option<Buffer>, LlamaError> {
        let LayerTape { input, qkv, unnormed, attended, log_sums, middle, both, added, lows } = tape;
        let at = |group| LinearId { layer: layer as u16, group };
        let gradient = Arc::new(gradient);
        let branch = self.behind_norm(Norm::AfterFeedForward(layer), &added.of_feed_forward, &gradient);
        let Some(both) = self.feed_forward(at(Group::Down), &branch, both, &lows.down)? else { return Ok(None) };
        let norm = Norm::BeforeFeedForward(layer);
        let Some(gradient) = self.through_norm(at(Group::GateUp), norm, middle, &gradient, both, &lows.gate_up)? else {
            return Ok(None);
        };
        let gradient = Arc::new(gradient);
        let branch = self.behind_norm(Norm::AfterAttention(layer), &added.of_attention, &gradient);
        let attended = Attended { rows: Arc::new(attended.into_rows()), log_sums };
        let Some(dout) = self.output(at(Group::O), &branch, &attended.rows, &lows.o)? else { return Ok(None) };
        let mut qkv = qkv.into_rows();
        self.pass.attention.attention.backward(self.pass.attention.layer(layer), &mut qkv, &attended, &dout);
        drop((attended, dout, branch));
        self.before_qk_norms(layer, &unnormed, &mut qkv);
        self.through_norm(at(Group::Qkv), Norm::BeforeAttention(layer), input, &gradient, qkv, &lows.qkv)
    }

    /// From the gradient of the stream to that of what was added to it: another one where a norm stands between.
    fn behind_norm(&self, norm: Norm, added: &Kept, gradient: &Arc<Buffer>) -> Arc<Buffer> {
        let Some(norm) = self.pass.norm(norm) else { return Arc::clone(gradient) };
        let hidden = self.pass.llama.config().hidden_size;
        let mut branch = Buffer::scratch(gradient.len());
        for_each_block(self.pass.tokens, (&mut branch, hidden), |first, branch| {
            branch.copy_from_slice(block(gradient, hidden, first));
            norm.backward(added.block(hidden, first, &mut Buffer::default()), None, branch);
        });
        Arc::new(branch)
    }

    /// Replaces the gradients of queries and keys by those of what went into their norms, if there are any.
    fn before_qk_norms(&self, layer: usize, unnormed: &Kept, gradients: &mut Buffer) {
        let pass = self.pass;
        let (Some(query), Some(key)) = (pass.norm(Norm::Query(layer)), pass.norm(Norm::Key(layer))) else { return };
        let heads = pass.attention.attention.heads;
        let (width, turned) = (heads.width(), heads.turned_width());
        let queries = heads.queries * heads.features;
        for_each_block(pass.tokens, (gradients, width), |first, gradients| {
            let mut room = Buffer::default();
            let unnormed = unnormed.block(turned, first, &mut room).chunks_exact(turned);
            for (row, unnormed) in gradients.chunks_exact_mut(width).zip(unnormed) {
                let (of_query, of_key) = row[..turned].split_at_mut(queries);
                query.backward(&unnormed[..queries], None, of_query);
                key.backward(&unnormed[queries..], None, of_key);
            }
        });
    }

    /// Through the down projection and the gates: the gradient of `both`, or `None` where nothing below is trained.
    fn feed_forward(
        &mut self,
        linear: LinearId,
        gradient: &Arc<Buffer>,
        both: Kept,
        low: &Buffer,
    ) -> Result<Option<Buffer>, LlamaError> {
        let (pass, features) = (self.pass, self.pass.llama.config().intermediate_size);
        let (hidden, activation) = (pass.llama.config().hidden_size, pass.llama.config().traits.activation);
        let below = self.depth.is_below(linear);
        let mut gated = match below {
            true => pass.product(linear, Direction::Backward, gradient.clone())?,
            false => Buffer::scratch(pass.tokens * features),
        };
        let adapter = pass.adapter(linear)?;
        let width = adapter.as_ref().map_or(0, |adapter| adapter.width());
        let mut dlow = Buffer::scratch(pass.tokens * width);
        let (mut both, waiting) = both.opened();
        let operands = ((&mut both[..], 2 * features), (&mut gated[..], features), (&mut dlow[..], width));
        for_each_block3(pass.tokens, operands.0, operands.1, operands.2, |first, both, gated, dlow| {
            waiting.block(2 * features, first, both);
            if let Some(adapter) = &adapter {
                adapter.backward_rows(first, block(gradient, hidden, first), dlow, below.then_some(gated));
            }
            if below {
                gates::backward(activation, features, both, gated);
            } else {
                gates::forward(activation, features, both, gated);
            }
        });
        if let Some(adapter) = adapter {
            self.found.adapters.insert(linear, adapter.gradient(&gated, low, gradient, &dlow));
        }
        Ok(below.then_some(both))
    }

    /// Through a group that reads the stream behind a norm: from the gradient of its output, and of the stream that
    /// went past it, to that of the stream before.
    fn through_norm(
        &mut self,
        linear: LinearId,
        place: Norm,
        stream: Kept,
        past: &Buffer,
        dout: Buffer,
        low: &Buffer,
    ) -> Result<Option<Buffer>, LlamaError> {
        let (pass, hidden) = (self.pass, self.pass.llama.config().hidden_size);
        let (below, trained, dout) = (self.depth.is_below(linear), pass.is_trained(place), Arc::new(dout));
        let norm = pass.norm(place);
        let mut gradient = match below {
            true => pass.product(linear, Direction::Backward, dout.clone())?,
            false => Buffer::default(),
        };
        let adapter = pass.adapter(linear)?;
        let width = adapter.as_ref().map_or(0, |adapter| adapter.width());
        let mut dlow = Buffer::scratch(pass.tokens * width);
        let normed_width = if adapter.is_some() { hidden } else { 0 };
        let mut normed = Buffer::scratch(pass.tokens * normed_width);
        let gradient_width = if below { hidden } else { 0 };
        let operands = ((&mut gradient[..], gradient_width), (&mut normed[..], normed_width), (&mut dlow[..], width));
        for_each_block3(pass.tokens, operands.0, operands.1, operands.2, |first, gradient, normed, dlow| {
            let mut room = Buffer::default();
            let stream = stream.block(hidden, first, &mut room);
            if let Some(adapter) = &adapter {
                through(norm, stream, normed);
                let dout = block(&dout, adapter.shape.d_out, first);
                adapter.backward_rows(first, dout, dlow, below.then_some(&mut *gradient));
            }
            if below && !trained {
                back_through(norm, stream, Some(block(past, hidden, first)), gradient);
            }
        });
        if trained {
            let stream = stream.into_rows();
            self.train(place, &stream, &gradient);
            for_each_block(pass.tokens, (&mut gradient, hidden), |first, gradient| {
                back_through(norm, block(&stream, hidden, first), Some(block(past, hidden, first)), gradient);
            });
        }
        if let Some(adapter) = adapter {
            self.found.adapters.insert(linear, adapter.gradient(&normed, low, &dout, &dlow));
        }
        Ok(below.then_some(gradient))
    }

    /// Through the output projection of attention: the gradient of the heads' outputs.
    fn output(
        &mut self,
        linear: LinearId,
        gradient: &Arc<Buffer>,
        attended: &Buffer,
        low: &Buffer,
    ) -> Result<Option<Buffer>, LlamaError> {
        let pass = self.pass;
        let mut dout = match self.depth.is_below(linear) {
            true => Some(pass.product(linear, Direction::Backward, gradient.clone())?),
            false => None,
        };
        if let Some(adapter) = pass.adapter(linear)? {
            let dlow = adapter.backward(gradient, dout.as_deref_mut());
            self.found.adapters.insert(linear, adapter.gradient(attended, low, gradient, &dlow));
        }
        Ok(dout)
    }
}
