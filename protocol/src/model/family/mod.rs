//! Families of models as descriptions: what each calls its tensors, where its norms stand, and how its configuration says
//! what else it computes. Whoever reads or computes a model interprets the description; none of them has code for one family.
//!
//! What is the same in all of a family's models is in [`Family`]; what a model's configuration chooses is in [`Traits`].

mod gguf;
mod hf;
mod known;
mod rope;
mod rope_json;
mod settings;
mod traits;

pub use self::gguf::GgufPlace;
pub(crate) use self::gguf::{GgufLayout, GgufSource, gguf_name};
pub use self::rope::{Llama3RopeScaling, LongRopeScaling, Rope, RopeScaling, YarnRopeScaling};
pub use self::traits::{Activation, Biases, LayerSet, Traits, Window};

use super::{Norm, Projection};
use crate::ids::Group;

/// What all models of a family have in common.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// `model_type` of a `config.json`.
    pub model_type: &'static str,
    /// The class that `architectures` of a `config.json` names.
    pub(crate) class: &'static str,
    /// How models of it are part of larger ones.
    pub(crate) whole: Option<&'static Whole>,
    /// Where the norms of a layer stand.
    pub norms: LayerNorms,
    /// Norms of queries and keys, before they are turned.
    pub qk_norm: Option<QkNorm>,
    /// Whether norms store how far their scales are from one.
    pub(crate) centred_norms: bool,
    /// Whether queries, keys and values are one projection, and gates and what they let through another.
    pub(crate) fused: bool,
    /// Whether heads may turn in part.
    pub(crate) partial_rotary: bool,
    /// Whether embeddings are multiplied by the square root of the hidden size.
    pub(crate) scaled_embeddings: bool,
    /// How a configuration speaks of biases.
    pub(crate) biases: BiasRules,
    /// How it speaks of windows.
    pub(crate) windows: WindowRule,
    /// The setting that names the activation.
    pub(crate) activation: &'static str,
    /// Values of settings that are left out.
    pub(crate) defaults: Defaults,
    /// How llama.cpp lays it out.
    pub(crate) gguf: GgufLayout,
}

/// Models that take images, too, and have a model of a family for their text.
#[derive(Debug, PartialEq)]
pub(crate) struct Whole {
    /// `model_type` of a `config.json`, whose `text_config` describes the text's model.
    pub(crate) model_type: &'static str,
    /// The class that `architectures` of a `config.json` names.
    pub(crate) class: &'static str,
    /// Sizes that such a `text_config` leaves out.
    pub(crate) sizes: &'static [(&'static str, usize)],
}

/// Names of a layer's norms in a checkpoint; `None` where a family has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNorms {
    /// Of what attention reads.
    pub before_attention: Option<&'static str>,
    /// Of what attention adds to the stream.
    pub after_attention: Option<&'static str>,
    /// Of what the feed-forward block reads.
    pub before_feed_forward: Option<&'static str>,
    /// Of what the feed-forward block adds to the stream.
    pub after_feed_forward: Option<&'static str>,
}

/// What one norm of queries or keys goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// One head's features; all heads have the same scales.
    PerHead,
    /// The features of all heads.
    Whole,
}

/// Whether some projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BiasRule {
    Never,
    Always,
    /// If a setting says so.
    Flag(&'static str),
}

/// How a family's configuration speaks of biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BiasRules {
    pub(crate) qkv: BiasRule,
    pub(crate) o: BiasRule,
    pub(crate) mlp: BiasRule,
}

/// How a family's configuration says which layers have a window; where `layer_types` names the kind of each layer, all but
/// the first two rules follow it. `default` is the window where the setting is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// None has.
    Never,
    /// Every layer, if there is a `sliding_window`.
    Every { default: Option<usize> },
    /// If `use_sliding_window`, those from `max_window_layers` on, or from `first`.
    FromLayer { default: usize, first: usize },
    /// If `use_sliding_window`, those without rotary positions.
    Unrotated,
    /// All but each so-manieth, which `setting` may say.
    AllBut { default: usize, each: usize, setting: Option<&'static str> },
}

/// Values of settings that a configuration leaves out, as Hugging Face has them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Defaults {
    pub(crate) head_dim: Option<usize>,
    pub(crate) rms_norm_eps: f64,
    pub(crate) rope_theta: f64,
    /// Base of the rotary frequencies of layers with a window, where they have their own.
    pub(crate) local_rope_theta: Option<f64>,
    pub(crate) max_positions: usize,
    pub(crate) tied: bool,
    pub(crate) activation: Activation,
    pub(crate) query_scalar: Option<f64>,
    pub(crate) score_cap: Cap,
    pub(crate) logit_cap: Cap,
    /// The context of long rotary positions, in families whose configuration always has one.
    pub(crate) original_context: Option<usize>,
    /// Each so-manieth layer is without rotary positions; `no_rope_layers` may say which.
    pub(crate) unrotated_each: Option<usize>,
}

/// Whether a family's models bound scores or logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cap {
    /// They do not.
    Never,
    /// By a setting; this is its value where it is left out, and `null` is no bound.
    UnlessSaid(Option<f64>),
}

impl Family {
    /// Every family that is known.
    pub const ALL: &'static [&'static Self] = known::FAMILIES;
    /// Llama, which the others are described by their differences from.
    pub const LLAMA: &'static Self = &known::LLAMA;

    /// By the `model_type` of a configuration, or the class in its `architectures`.
    pub fn of_model_type(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().copied().find(|family| family.model_type == name || family.class == name)
    }

    /// The family of the text's model in a larger one.
    pub(crate) fn of_whole(name: &str) -> Option<(&'static Self, &'static Whole)> {
        let wholes = Self::ALL.iter().filter_map(|&family| Some((family, family.whole?)));
        wholes.into_iter().find(|(_, whole)| whole.model_type == name || whole.class == name)
    }

    /// By the `general.architecture` of a GGUF file.
    pub fn of_gguf(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().copied().find(|family| family.gguf.architecture == name)
    }

    /// The projections of a group as its checkpoints have them, in the order of the product's columns; none of the head.
    pub fn projections(&self, group: Group) -> &'static [Projection] {
        match (group, self.fused) {
            (Group::Qkv, false) => &[Projection::Q, Projection::K, Projection::V],
            (Group::Qkv, true) => &[Projection::Qkv],
            (Group::O, _) => &[Projection::O],
            (Group::GateUp, false) => &[Projection::Gate, Projection::Up],
            (Group::GateUp, true) => &[Projection::GateUp],
            (Group::Down, _) => &[Projection::Down],
            (Group::Head, _) => &[],
        }
    }

    /// The projections of a layer in the order of the forward pass.
    pub fn layer_projections(&self) -> impl Iterator<Item = Projection> + use<> {
        let of_group = Group::ALL.map(|group| self.projections(group));
        of_group.into_iter().flatten().copied()
    }

    /// Whether biases are a matter of a setting.
    pub(crate) fn has_setting(&self, name: &'static str) -> bool {
        let BiasRules { qkv, o, mlp } = self.biases;
        [qkv, o, mlp].contains(&BiasRule::Flag(name))
    }

    /// The norms of a layer.
    pub fn layer_norms(&self, layer: usize) -> impl Iterator<Item = Norm> + '_ {
        let norms = [
            Norm::BeforeAttention(layer),
            Norm::Query(layer),
            Norm::Key(layer),
            Norm::AfterAttention(layer),
            Norm::BeforeFeedForward(layer),
            Norm::AfterFeedForward(layer),
        ];
        norms.into_iter().filter(|&norm| self.norm_name(norm).is_some())
    }

    /// Whether the scales of its norms are stored as how far they are from one.
    pub fn has_centred_norms(&self) -> bool {
        self.centred_norms
    }

    /// The name of a norm's tensor, if it has the norm.
    pub fn norm_name(&self, norm: Norm) -> Option<String> {
        let (layer, part) = match norm {
            Norm::Final => return Some("model.norm.weight".to_owned()),
            Norm::BeforeAttention(layer) => (layer, self.norms.before_attention?),
            Norm::AfterAttention(layer) => (layer, self.norms.after_attention?),
            Norm::BeforeFeedForward(layer) => (layer, self.norms.before_feed_forward?),
            Norm::AfterFeedForward(layer) => (layer, self.norms.after_feed_forward?),
            Norm::Query(layer) => (layer, self.qk_norm.map(|_| "self_attn.q_norm")?),
            Norm::Key(layer) => (layer, self.qk_norm.map(|_| "self_attn.k_norm")?),
        };
        Some(format!("model.layers.{layer}.{part}.weight"))
    }
}

/// The names of all families, for messages.
pub(crate) fn names() -> String {
    Family::ALL.iter().map(|family| format!("`{}`", family.model_type)).collect::<Vec<_>>().join(", ")
}
