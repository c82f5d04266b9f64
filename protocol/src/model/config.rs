//! A model's dimensions and constants, whichever file they come from, checked before anything trusts them.

use std::path::Path;

use super::error::ModelError;
use super::family::{Family, QkNorm, Rope, Traits};
use super::{Norm, Projection};
use crate::ids::{Group, LinearId, LinearShape};

/// Most features that a product sums over: 65,000 products of a byte by an int8 cannot overflow 32 bits.
pub const MAX_FEATURES: usize = 65_000;
const MAX_LAYERS: usize = 1_024;
const MAX_VOCABULARY: usize = 1 << 21;
const MAX_POSITIONS: usize = 1 << 26;

/// Configuration of a model, of Llama or another family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// What it has in common with others.
    pub family: &'static Family,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features inside the feed-forward block.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head; even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: Rope,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Longest sequence that the model was made for.
    pub max_positions: usize,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text or a turn; the first one is the one to write.
    pub eos: Vec<u32>,
    /// What it computes that is not a plain Llama's.
    pub traits: Traits,
}

impl LlamaConfig {
    /// Dimensions of a served matrix: those of a group are the same in every layer, those of the head in every slice.
    pub fn shape(&self, group: Group) -> LinearShape {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (d_in, d_out) = match group {
            Group::Qkv => (self.hidden_size, queries + 2 * keys),
            Group::O => (queries, self.hidden_size),
            Group::GateUp => (self.hidden_size, 2 * self.intermediate_size),
            Group::Down => (self.intermediate_size, self.hidden_size),
            Group::Head => return self.head_shape(),
        };
        LinearShape { d_in, d_out }
    }

    /// Every served matrix of the layers, in the order of the forward pass: the head's slices are beside them
    /// ([`Self::head_linear`]).
    pub fn linears(&self) -> impl Iterator<Item = LinearId> + use<> {
        let layers = u16::try_from(self.layers).unwrap_or(u16::MAX);
        (0..layers).flat_map(|layer| Group::ALL.map(|group| LinearId { layer, group }))
    }

    /// The projections of a group as the checkpoint has them, in the order of the product's columns; none of the head.
    pub fn projections(&self, group: Group) -> &'static [Projection] {
        self.family.projections(group)
    }

    /// The rotary positions of a layer, if it has any.
    pub fn rope_of(&self, layer: usize) -> Option<&Rope> {
        if self.traits.unrotated.contains(layer) {
            return None;
        }
        let local = self.traits.local_rope.as_ref().filter(|_| self.window_of(layer).is_some());
        Some(local.unwrap_or(&self.rope))
    }

    /// How many keys a query of a layer sees, its own among them, if not all.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.traits.window.as_ref().filter(|window| window.layers.contains(layer)).map(|window| window.keys)
    }

    /// What scores are multiplied by.
    pub fn score_scale(&self) -> f64 {
        self.traits.query_scalar.unwrap_or(self.head_dim as f64).sqrt().recip()
    }

    /// Scales of a norm; 0 where the family has none there.
    pub fn norm_width(&self, norm: Norm) -> usize {
        let heads = match norm {
            Norm::Query(_) => self.heads,
            Norm::Key(_) => self.kv_heads,
            _ if self.family.norm_name(norm).is_none() => return 0,
            _ => return self.hidden_size,
        };
        match self.family.qk_norm {
            None => 0,
            Some(QkNorm::PerHead) => self.head_dim,
            Some(QkNorm::Whole) => heads * self.head_dim,
        }
    }

    /// Checks that the numbers are possible and that the products fit the integer kernels.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the file and the setting.
    pub fn validate(&self, path: &Path) -> Result<(), ModelError> {
        let fail = |what: String| Err(ModelError::config(path, what));
        for (name, value, limit) in [
            ("hidden_size", self.hidden_size, MAX_FEATURES),
            ("intermediate_size", self.intermediate_size, MAX_FEATURES),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_FEATURES),
            ("num_key_value_heads", self.kv_heads, self.heads),
            ("head_dim", self.head_dim, MAX_FEATURES),
            ("vocab_size", self.vocabulary, MAX_VOCABULARY),
            ("max_position_embeddings", self.max_positions, MAX_POSITIONS),
        ] {
            if value == 0 || value > limit {
                return fail(format!("{name} is {value}; it must be from 1 to {limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail(format!(
                "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                self.heads, self.kv_heads
            ));
        }
        for group in Group::ALL {
            let LinearShape { d_in, d_out } = self.shape(group);
            if d_in.max(d_out) > MAX_FEATURES {
                return fail(format!(
                    "the {group:?} products are {d_in} × {d_out}; more than {MAX_FEATURES} features overflow the integer kernels"
                ));
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return fail(format!("rms_norm_eps is {}; it must be a positive number", self.rms_norm_eps));
        }
        if let Some(&id) = self.bos.iter().chain(&self.eos).find(|&&id| id as usize >= self.vocabulary) {
            return fail(format!("the special token {id} is outside the vocabulary of {}", self.vocabulary));
        }
        let rope = self.rope.validate(self.head_dim).and_then(|()| self.traits.validate(self.head_dim));
        rope.map_err(|what| ModelError::config(path, what))
    }
}

/// The number of layers, if it is a possible one: whatever is made for each of them is made after this.
pub(crate) fn possible_layers(path: &Path, layers: usize) -> Result<usize, ModelError> {
    if layers == 0 || layers > MAX_LAYERS {
        let what = format!("num_hidden_layers is {layers}; it must be from 1 to {MAX_LAYERS}");
        return Err(ModelError::config(path, what));
    }
    Ok(layers)
}

/// Head size when it is not given: the hidden features divided among the query heads.
pub(crate) fn divided_heads(path: &Path, hidden_size: usize, heads: usize) -> Result<usize, ModelError> {
    match hidden_size.checked_rem(heads) {
        Some(0) => Ok(hidden_size / heads),
        _ => Err(ModelError::config(
            path,
            format!("the hidden size {hidden_size} cannot be divided among {heads} heads"),
        )),
    }
}
