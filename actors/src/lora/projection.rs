//! The seven projections of a layer that an adapter can sit beside, and where each lies in its fused group.

use std::fmt;

use protocol::model::Group;
use serde::{Deserialize, Serialize};

/// A projection of a transformer layer, named as Hugging Face names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Output of the attention.
    OProj,
    /// The gate of the feed-forward block.
    GateProj,
    /// What the gate lets through.
    UpProj,
    /// Output of the feed-forward block.
    DownProj,
}

impl Projection {
    /// Every projection, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The fused group that it is a part of.
    pub fn group(self) -> Group {
        match self {
            Self::QProj | Self::KProj | Self::VProj => Group::Qkv,
            Self::OProj => Group::O,
            Self::GateProj | Self::UpProj => Group::GateUp,
            Self::DownProj => Group::Down,
        }
    }

    /// The projections of a fused group in the order in which its outputs are concatenated.
    pub fn of_group(group: Group) -> &'static [Self] {
        match group {
            Group::Qkv => &[Self::QProj, Self::KProj, Self::VProj],
            Group::O => &[Self::OProj],
            Group::GateUp => &[Self::GateProj, Self::UpProj],
            Group::Down => &[Self::DownProj],
        }
    }

    /// Its name in configurations, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// Its path inside a layer in checkpoints, such as `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Self::QProj => "self_attn.q_proj",
            Self::KProj => "self_attn.k_proj",
            Self::VProj => "self_attn.v_proj",
            Self::OProj => "self_attn.o_proj",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
