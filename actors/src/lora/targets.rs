//! How the projections that get an adapter, and how these begin, are spelt: as PEFT spells them, or refused with a reason.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::Projection;

/// What names every projection of a layer.
const ALL: &str = "all-linear";

/// Reads `target_modules`: a list of projections, or `"all-linear"`, which is every one of them and never the head.
///
/// # Errors
/// Names a projection that is not known, and any other text.
pub(crate) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Projection>, D::Error> {
    struct Targets;
    impl<'de> Visitor<'de> for Targets {
        type Value = Vec<Projection>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "\"{ALL}\" or a list of projections")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            match text {
                ALL => Ok(Projection::SEPARATE.to_vec()),
                _ => Err(E::custom(format!(
                    "lora.target_modules is `{text}`; write \"{ALL}\" or a list like [\"q_proj\", \"v_proj\"]: a pattern is \
                     not taken for one"
                ))),
            }
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut targets = Vec::new();
            while let Some(target) = list.next_element()? {
                targets.push(target);
            }
            Ok(targets)
        }
    }
    deserializer.deserialize_any(Targets)
}

/// How new adapters begin. Either way `B` is zero, so that they change nothing yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Spelt", into = "Spelt")]
pub enum Initialisation {
    /// `A` is uniform in `±1/√d_in`.
    #[default]
    Uniform,
    /// `A` is normal, with a standard deviation of one part in the rank.
    Gaussian,
}

/// How it stands in a file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelt {
    Default(bool),
    Name(String),
}

impl From<Initialisation> for Spelt {
    fn from(initialisation: Initialisation) -> Self {
        match initialisation {
            Initialisation::Uniform => Self::Default(true),
            Initialisation::Gaussian => Self::Name("gaussian".into()),
        }
    }
}

impl TryFrom<Spelt> for Initialisation {
    type Error = String;

    fn try_from(spelt: Spelt) -> Result<Self, String> {
        let name = match spelt {
            Spelt::Default(true) => return Ok(Self::Uniform),
            Spelt::Default(false) => {
                return Err(
                    "init_lora_weights is false, which begins with adapters that change the model at once; write \
                            true"
                        .into(),
                );
            }
            Spelt::Name(name) => name,
        };
        let kind = name.to_lowercase();
        if kind == "gaussian" {
            return Ok(Self::Gaussian);
        }
        // PiSSA with some iterations is `pissa_niter_16`.
        let moves_weights = ["pissa", "olora", "corda", "loftq"].iter().any(|known| kind.starts_with(known));
        Err(if moves_weights {
            format!(
                "init_lora_weights is `{name}`, which takes what the adapter begins with out of the base model's weights: \
                 workers serve those as they were published, the same for everybody; write true or \"gaussian\""
            )
        } else {
            format!("init_lora_weights is `{name}`, which is not known; write true or \"gaussian\"")
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::LoraConfig;
    use super::*;

    #[test]
    fn all_linear_is_every_projection() {
        let read = |json: &str| serde_json::from_str::<LoraConfig>(json).map_err(|error| error.to_string());
        let all = read(r#"{"target_modules": "all-linear"}"#).unwrap();
        assert_eq!(all.target_modules, Projection::SEPARATE);
        assert!(read(r#"{"target_modules": ".*_proj"}"#).unwrap_err().contains("lora.target_modules is `.*_proj`"));
        assert!(read(r#"{"target_modules": ["lm_head"]}"#).unwrap_err().contains("lm_head"));
    }

    #[test]
    fn what_would_move_served_weights_is_refused_with_the_reason() {
        let read = |json: &str| serde_json::from_str::<Initialisation>(json).map_err(|error| error.to_string());
        for (json, expected) in [("true", Initialisation::Uniform), (r#""gaussian""#, Initialisation::Gaussian)] {
            assert_eq!(read(json).unwrap(), expected);
            assert_eq!(serde_json::to_string(&expected).unwrap(), json);
        }
        for name in ["pissa", "pissa_niter_16", "olora", "PiSSA"] {
            let error = read(&format!("\"{name}\"")).unwrap_err();
            assert!(error.contains(name) && error.contains("workers serve those as they were published"), "{error}");
        }
        assert!(read(r#""eva""#).unwrap_err().contains("`eva`, which is not known"));
        assert!(read("false").unwrap_err().contains("true"));
    }
}
