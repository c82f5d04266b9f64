//! What of a layer the owner holds beside the base products: scales of norms, and biases.

use std::sync::Arc;

use protocol::ids::Group;
use protocol::model::{Model, ModelError, Norm};

use super::ops::RmsNorm;

/// Numbers that never change; `None` where the family has none there.
type Fixed = Option<Arc<[f32]>>;

/// See the module's documentation.
pub(super) struct LayerParts {
    before_attention: Fixed,
    query: Fixed,
    key: Fixed,
    after_attention: Fixed,
    before_feed_forward: Fixed,
    after_feed_forward: Fixed,
    qkv_bias: Fixed,
    o_bias: Fixed,
    gate_up_bias: Fixed,
    down_bias: Fixed,
}

impl LayerParts {
    /// Those of all layers.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub(super) fn of_all(model: &Model) -> Result<Vec<Self>, ModelError> {
        let norm = |norm| Ok::<_, ModelError>(model.norm(norm)?.map(Arc::from));
        let of = |layer| {
            let bias = |group| Ok::<_, ModelError>(model.bias(layer, group)?.map(Arc::from));
            Ok(Self {
                before_attention: norm(Norm::BeforeAttention(layer))?,
                query: norm(Norm::Query(layer))?,
                key: norm(Norm::Key(layer))?,
                after_attention: norm(Norm::AfterAttention(layer))?,
                before_feed_forward: norm(Norm::BeforeFeedForward(layer))?,
                after_feed_forward: norm(Norm::AfterFeedForward(layer))?,
                qkv_bias: bias(Group::Qkv)?,
                o_bias: bias(Group::O)?,
                gate_up_bias: bias(Group::GateUp)?,
                down_bias: bias(Group::Down)?,
            })
        };
        (0..model.config().layers).map(of).collect()
    }

    /// The scales of one of the layer's norms.
    fn scales(&self, norm: Norm) -> Option<&[f32]> {
        let scales = match norm {
            Norm::BeforeAttention(_) => &self.before_attention,
            Norm::Query(_) => &self.query,
            Norm::Key(_) => &self.key,
            Norm::AfterAttention(_) => &self.after_attention,
            Norm::BeforeFeedForward(_) => &self.before_feed_forward,
            Norm::AfterFeedForward(_) => &self.after_feed_forward,
            Norm::Final => &None,
        };
        scales.as_deref()
    }

    /// One of the layer's norms, if it has it.
    pub(super) fn norm(&self, norm: Norm, eps: f32) -> Option<RmsNorm<'_>> {
        self.scales(norm).map(|weight| RmsNorm { weight, eps })
    }

    /// What is added to each row of a product.
    pub(super) fn bias(&self, group: Group) -> Option<&[f32]> {
        match group {
            Group::Qkv => self.qkv_bias.as_deref(),
            Group::O => self.o_bias.as_deref(),
            Group::GateUp => self.gate_up_bias.as_deref(),
            Group::Down => self.down_bias.as_deref(),
            Group::Head => None,
        }
    }
}
