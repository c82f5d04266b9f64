//! What a model computes beside its matrices, where families differ: values, no code. A plain Llama is the default.

use std::collections::BTreeSet;

use super::Rope;
use crate::ids::Group;

/// What of a model's computation is not a plain Llama's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traits {
    /// Projections that add a bias.
    pub biases: Biases,
    /// The gate's activation.
    pub activation: Activation,
    /// Layers whose queries see only the last few keys.
    pub window: Option<Window>,
    /// Rotary positions of the layers with a window, where they differ from the others'.
    pub local_rope: Option<Rope>,
    /// Layers without rotary positions.
    pub unrotated: LayerSet,
    /// Scores are multiplied by this to the power of −1/2; the features of a head if not given.
    pub query_scalar: Option<f64>,
    /// Bound that scores approach, as `cap · tanh(score / cap)`.
    pub score_cap: Option<f64>,
    /// The same of logits.
    pub logit_cap: Option<f64>,
    /// What embeddings are multiplied by as they enter the first layer.
    pub embedding_scale: Option<f64>,
    /// Whether it is the part of a larger model that reads text, whose modules have names of their own there.
    pub of_larger: bool,
}

/// Groups of projections that add a bias to their products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The output projection of attention.
    pub o: bool,
    /// Gate, up and down projections.
    pub mlp: bool,
}

impl Biases {
    /// Whether a group's projections have one.
    pub fn of(self, group: Group) -> bool {
        match group {
            Group::Qkv => self.qkv,
            Group::O => self.o,
            Group::GateUp | Group::Down => self.mlp,
            Group::Head => false,
        }
    }
}

/// What the gate of a feed-forward block goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    #[default]
    Silu,
    /// GELU by its approximation with a hyperbolic tangent.
    GeluTanh,
}

impl Activation {
    /// By the name of a configuration.
    pub(crate) fn of_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Some(Self::GeluTanh),
            _ => None,
        }
    }

    /// Its name in a configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }
}

/// Queries that see only so many keys, their own among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// How many.
    pub keys: usize,
    /// In which layers.
    pub layers: LayerSet,
}

/// Some layers of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerSet {
    /// Each.
    Every,
    /// These, counted from 0.
    These(BTreeSet<usize>),
}

impl Default for LayerSet {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl LayerSet {
    /// Whether a layer is among them.
    pub fn contains(&self, layer: usize) -> bool {
        match self {
            Self::Every => true,
            Self::These(these) => these.contains(&layer),
        }
    }

    /// Those of so many layers that `chosen` says yes to; `Every` if it does to all.
    pub(crate) fn of(layers: usize, chosen: impl Fn(usize) -> bool) -> Self {
        let these: BTreeSet<usize> = (0..layers).filter(|&layer| chosen(layer)).collect();
        if these.len() == layers { Self::Every } else { Self::These(these) }
    }
}

impl Traits {
    /// Those that are not a plain Llama's, by name and in numbers, for a model's digest. Biases are not among them: they
    /// are tensors.
    pub(crate) fn in_numbers(&self) -> Vec<(&'static str, Vec<f64>)> {
        let layers = |set: &LayerSet| match set {
            LayerSet::Every => vec![-1.0],
            LayerSet::These(these) => these.iter().map(|&layer| layer as f64).collect(),
        };
        let mut numbers = Vec::new();
        if self.activation != Activation::Silu {
            numbers.push((self.activation.name(), Vec::new()));
        }
        if let Some(window) = &self.window {
            numbers.push(("window", [vec![window.keys as f64], layers(&window.layers)].concat()));
        }
        if let Some(rope) = &self.local_rope {
            let (kind, scaling) = rope.scaling_in_numbers();
            numbers.push(("local_rope", vec![rope.theta, rope.features as f64]));
            numbers.push((kind, scaling));
        }
        if self.unrotated != LayerSet::default() {
            numbers.push(("unrotated", layers(&self.unrotated)));
        }
        for (name, value) in [
            ("query_scalar", self.query_scalar),
            ("score_cap", self.score_cap),
            ("logit_cap", self.logit_cap),
            ("embedding_scale", self.embedding_scale),
        ] {
            numbers.extend(value.map(|value| (name, vec![value])));
        }
        numbers
    }

    /// Checks that the numbers are possible.
    ///
    /// # Errors
    /// Names the setting that is not, as Hugging Face calls it.
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), String> {
        if let Some(Window { keys: 0, .. }) = self.window {
            return Err("sliding_window is 0, so that a token would not even see itself".to_owned());
        }
        for (name, value) in [
            ("query_pre_attn_scalar", self.query_scalar),
            ("attn_logit_softcapping", self.score_cap),
            ("final_logit_softcapping", self.logit_cap),
            ("the scale of the embeddings", self.embedding_scale),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                return Err(format!("{name} is {value}; it must be a positive number"));
            }
        }
        self.local_rope.as_ref().map_or(Ok(()), |rope| rope.validate(head_dim))
    }
}
