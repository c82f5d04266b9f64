//! Embeddings of some tokens that are trained as they are, beside the adapters: PEFT's `trainable_token_indices`.
//!
//! Whoever adds tokens to a vocabulary wants them to mean something, and nothing else of the embeddings to change. Their rows
//! are the owner's alone: it embeds the text itself, and where the head is the embeddings it puts the logits of these tokens in
//! place of what the published head gives for them, so that a worker may serve that as it is.

use std::collections::{BTreeMap, HashSet};

use candle_core::{Device, Result, Tensor, Var};
use protocol::model::LlamaConfig;
use serde::{Deserialize, Serialize};

use crate::trainer::InvalidSetting;

const FIELD: &str = "lora.trainable_token_indices";

/// A token, by its number or by its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NamedToken {
    /// Its number in the vocabulary.
    Number(u32),
    /// How it is spelt. Models know numbers alone: see [`LoraConfig::with_numbered_tokens`](super::LoraConfig::with_numbered_tokens).
    Text(String),
}

/// The tokens with every text replaced by its number, which `number` finds.
///
/// # Errors
/// Names a text that is no token.
pub(super) fn numbered(
    tokens: &[NamedToken],
    number: impl Fn(&str) -> Option<u32>,
) -> std::result::Result<Vec<NamedToken>, InvalidSetting> {
    let unknown = |text: &str| InvalidSetting {
        field: FIELD,
        why: format!(
            "names {text:?}, which is no token of the model's tokenizer: tokens have to be added to the model first, with rows of \
             their own in its embeddings"
        ),
    };
    let find = |token: &NamedToken| match token {
        NamedToken::Number(_) => Ok(token.clone()),
        NamedToken::Text(text) => number(text).map(NamedToken::Number).ok_or_else(|| unknown(text)),
    };
    tokens.iter().map(find).collect()
}

/// The numbers of the tokens in a model.
///
/// # Errors
/// Names one that the model has not, that is named twice, or of which only the text is known.
pub(super) fn of_model(tokens: &[NamedToken], model: &LlamaConfig) -> std::result::Result<Vec<u32>, InvalidSetting> {
    let fail = |why| Err(InvalidSetting { field: FIELD, why });
    let (mut numbers, mut seen) = (Vec::with_capacity(tokens.len()), HashSet::new());
    for token in tokens {
        let &NamedToken::Number(number) = token else {
            return fail(format!("names {token:?}, whose number is not known without a tokenizer"));
        };
        if number as usize >= model.vocabulary {
            return fail(format!(
                "has {number}, but the model's vocabulary ends with {}: tokens have to be added to the model first, with rows of \
                 their own in its embeddings",
                model.vocabulary.saturating_sub(1)
            ));
        }
        if !seen.insert(number) {
            return fail(format!("names token {number} twice"));
        }
        numbers.push(number);
    }
    Ok(numbers)
}

/// The trained rows of the embeddings.
pub(crate) struct TokenRows {
    /// The tokens, in the order of the rows.
    pub(crate) tokens: Vec<u32>,
    /// `tokens × hidden_size`, as the model's files have embeddings: before any factor.
    pub(crate) rows: Var,
    places: BTreeMap<u32, usize>,
}

impl TokenRows {
    /// The rows of these tokens, zero until they are set; `None` of none.
    pub(super) fn new(tokens: Vec<u32>, model: &LlamaConfig) -> Result<Option<Self>> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let shape = (tokens.len(), model.hidden_size);
        let rows = Var::from_vec(vec![0f32; shape.0 * shape.1], shape, &Device::Cpu)?;
        let places = tokens.iter().copied().zip(0..).collect();
        Ok(Some(Self { tokens, rows, places }))
    }

    /// Which row is that of a token, if it is trained.
    pub(crate) fn place(&self, token: u32) -> Option<usize> {
        self.places.get(&token).copied()
    }

    /// The trained tokens from `first` on that are among `count`, with the numbers of their rows.
    pub(crate) fn among(&self, first: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
        let (first, end) = (first as u32, (first + count) as u32);
        self.places.range(first..end).map(|(&token, &place)| (token as usize, place))
    }

    /// Replaces the rows by those that `read` returns for the tokens.
    pub(super) fn set<E: From<candle_core::Error>>(
        &self,
        read: impl FnOnce(&[u32]) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<(), E> {
        self.rows.set(&Tensor::from_vec(read(&self.tokens)?, self.rows.shape(), &Device::Cpu)?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::TinyModel;

    #[test]
    fn tokens_are_named_by_number_or_by_text() {
        let tiny = TinyModel::new();
        let tokens: Vec<NamedToken> = serde_json::from_str(r#"[7, "<|tool|>", 3]"#).unwrap();
        let error = of_model(&tokens, tiny.config()).unwrap_err().to_string();
        assert!(error.contains("<|tool|>") && error.contains("tokenizer"), "{error}");
        let known = numbered(&tokens, |text| (text == "<|tool|>").then_some(50)).unwrap();
        assert_eq!(of_model(&known, tiny.config()), Ok(vec![7, 50, 3]));
        let error = numbered(&tokens, |_| None).unwrap_err().to_string();
        assert!(error.starts_with("lora.trainable_token_indices names \"<|tool|>\""), "{error}");
        let error = |numbers: &[u32]| {
            let tokens: Vec<_> = numbers.iter().copied().map(NamedToken::Number).collect();
            of_model(&tokens, tiny.config()).unwrap_err().to_string()
        };
        assert!(error(&[1, 2, 1]).contains("token 1 twice"));
        let outside = tiny.config().vocabulary as u32;
        assert!(error(&[outside]).contains(&format!("has {outside}, but the model's vocabulary ends with")));
    }

    #[test]
    fn rows_are_found_by_token_and_by_range() {
        let tiny = TinyModel::new();
        let rows = TokenRows::new(vec![40, 2, 9], tiny.config()).unwrap().unwrap();
        assert_eq!((rows.place(2), rows.place(9), rows.place(3)), (Some(1), Some(2), None));
        assert_eq!(rows.among(2, 8).collect::<Vec<_>>(), [(2, 1), (9, 2)]);
        assert_eq!(rows.among(10, 30).count(), 0);
        assert!(TokenRows::new(Vec::new(), tiny.config()).unwrap().is_none());
    }
}
