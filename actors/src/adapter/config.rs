//! `adapter_config.json` as PEFT writes it.

use std::collections::BTreeMap;

use protocol::model::Projection;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::lora::{Initialisation, Layers, LoraConfig, NamedToken, Patterns, read_targets};

/// The fields that PEFT's `LoraConfig` writes for a plain LoRA of a causal language model, in its order.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PeftConfig {
    #[serde(default)]
    alpha_pattern: Patterns<f32>,
    #[serde(default)]
    auto_mapping: Option<Value>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    #[serde(default = "none")]
    bias: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exclude_modules: Option<Value>,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    init_lora_weights: Initialisation,
    #[serde(default)]
    layer_replication: Option<Value>,
    #[serde(default)]
    layers_pattern: Option<OneOrMore<String>>,
    #[serde(default)]
    layers_to_transform: Option<OneOrMore<u16>>,
    #[serde(default)]
    loftq_config: Option<Value>,
    lora_alpha: Value,
    #[serde(default)]
    lora_dropout: f32,
    #[serde(default)]
    megatron_config: Option<Value>,
    #[serde(default)]
    megatron_core: Option<String>,
    #[serde(default)]
    modules_to_save: Option<OneOrMore<String>>,
    peft_type: String,
    r: usize,
    #[serde(default)]
    rank_pattern: Patterns<usize>,
    #[serde(default)]
    revision: Option<String>,
    #[serde(deserialize_with = "read_targets")]
    target_modules: Vec<Projection>,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    trainable_token_indices: Option<Tokens>,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_rslora: bool,
    /// Fields of later versions and of methods that are not known here.
    #[serde(flatten, skip_serializing)]
    rest: Map<String, Value>,
}

/// Fields that change nothing unless another one is set, which is refused.
/// (`ensure_weight_tying` is about modules that are refused, and about tokens, where tied weights stay tied without it.)
const IDLE: [&str; 3] = ["ensure_weight_tying", "peft_version", "qalora_group_size"];

/// Tokens whose embeddings are trained.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Tokens {
    /// Of the model's embeddings.
    OfEmbeddings(Vec<NamedToken>),
    /// By the names of modules.
    Of(BTreeMap<String, Vec<NamedToken>>),
}

impl Tokens {
    fn into_list(self) -> Result<Vec<NamedToken>, String> {
        let mut modules = match self {
            Self::OfEmbeddings(tokens) => return Ok(tokens),
            Self::Of(modules) => modules,
        };
        let tokens = modules.remove(EMBEDDINGS);
        match (tokens, modules.into_keys().next()) {
            (Some(tokens), None) => Ok(tokens),
            (_, other) => Err(format!(
                "trainable_token_indices names `{}`: tokens are trained as rows of `{EMBEDDINGS}`, and of the head with them \
                 where that is tied; give one list",
                other.unwrap_or_default()
            )),
        }
    }
}

/// The modules of a larger model that read images, as PEFT matches names.
const IMAGES: &str = ".*vision_tower.*";

/// What PEFT calls a Llama's embeddings.
const EMBEDDINGS: &str = "embed_tokens";

/// What PEFT calls the list of a Llama's layers.
const LAYERS: &str = "layers";

/// A value or a list of them: PEFT takes either.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn list(value: &Option<Self>) -> &[T] {
        match value {
            None => &[],
            Some(Self::One(one)) => std::slice::from_ref(one),
            Some(Self::More(more)) => more,
        }
    }
}

fn none() -> String {
    "none".into()
}

impl PeftConfig {
    /// `modules` are the projections that have adapters, `adapted` the layers, `None` if all have.
    pub(super) fn new(
        lora: &LoraConfig,
        modules: Vec<Projection>,
        adapted: Option<Vec<u16>>,
        base_model: &str,
    ) -> Self {
        // PEFT's own type is an integer; a whole number is written as one.
        let whole = lora.alpha.fract() == 0.0 && lora.alpha.abs() < 1e9;
        Self {
            alpha_pattern: lora.alpha_pattern.clone(),
            auto_mapping: None,
            base_model_name_or_path: Some(base_model.into()),
            bias: none(),
            exclude_modules: None,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: lora.init_lora_weights,
            layer_replication: None,
            layers_pattern: adapted.is_some().then(|| OneOrMore::One(LAYERS.into())),
            layers_to_transform: adapted.map(OneOrMore::More),
            loftq_config: Some(Value::Object(Map::new())),
            lora_alpha: if whole { (lora.alpha as i64).into() } else { lora.alpha.into() },
            lora_dropout: lora.dropout,
            megatron_config: None,
            megatron_core: Some("megatron.core".into()),
            modules_to_save: (!lora.modules_to_save.is_empty()).then(|| OneOrMore::More(lora.modules_to_save.clone())),
            peft_type: "LORA".into(),
            r: lora.rank,
            rank_pattern: lora.rank_pattern.clone(),
            revision: None,
            target_modules: modules,
            task_type: Some("CAUSAL_LM".into()),
            trainable_token_indices: (!lora.trainable_token_indices.is_empty())
                .then(|| Tokens::OfEmbeddings(lora.trainable_token_indices.clone())),
            use_dora: false,
            use_rslora: lora.use_rslora,
            rest: Map::new(),
        }
    }

    /// The same for the part of a larger model that reads text, if it is one: modules of the same names in other parts of it
    /// have no adapters.
    pub(super) fn of_larger(self, larger: bool) -> Self {
        Self { exclude_modules: larger.then(|| IMAGES.into()), ..self }
    }

    /// The adapter that it describes, or what about it is not known here.
    pub(super) fn into_lora(self, larger: bool) -> Result<LoraConfig, String> {
        let unknown = [
            ("peft_type", self.peft_type != "LORA"),
            ("bias", self.bias != "none"),
            ("exclude_modules", self.exclude_modules.as_ref().is_some_and(|these| !larger || these != IMAGES)),
            ("use_dora", self.use_dora),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("layer_replication", self.layer_replication.is_some()),
            ("layers_pattern", !OneOrMore::list(&self.layers_pattern).iter().all(|name| name == LAYERS)),
        ];
        let set = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Object(fields) => !fields.is_empty(),
            _ => true,
        };
        let rest =
            self.rest.iter().map(|(field, value)| (field.as_str(), set(value) && !IDLE.contains(&field.as_str())));
        if let Some((field, _)) = unknown.into_iter().chain(rest).find(|(_, unknown)| *unknown) {
            return Err(format!("{field} asks for something that only PEFT itself supports"));
        }
        let alpha = self.lora_alpha.as_f64().ok_or("lora_alpha is not a number")? as f32;
        // PEFT takes an empty list for all.
        let layers = match OneOrMore::list(&self.layers_to_transform) {
            [] => Layers::All,
            these => Layers::These(these.iter().copied().collect()),
        };
        let lora = LoraConfig {
            rank: self.r,
            alpha,
            dropout: self.lora_dropout,
            target_modules: self.target_modules,
            layers,
            rank_pattern: self.rank_pattern,
            alpha_pattern: self.alpha_pattern,
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights,
            modules_to_save: OneOrMore::list(&self.modules_to_save).to_vec(),
            trainable_token_indices: self.trainable_token_indices.map_or(Ok(Vec::new()), Tokens::into_list)?,
            ..LoraConfig::default()
        };
        lora.validate().map_err(|invalid| invalid.to_string())?;
        Ok(lora)
    }
}
