//! What a model is to be asked of an example, and what it should answer.

use std::collections::HashSet;

use protocol::model::{ModelError, TextTokenizer};

use super::Example;

/// The last answer of an example, and all that stands before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Tokens up to the answer, with what the chat template writes before it.
    pub prompt: Vec<u32>,
    /// What the answer should be, without what ends it.
    pub answer: String,
}

impl Question {
    /// The questions of those examples that have a prompt: of a text that is learnt from its beginning nothing can be asked.
    /// Each comes with the number of its example.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when a token is not one of the model's.
    pub fn of_all(examples: &[Example], tokenizer: &TextTokenizer) -> Result<Vec<(usize, Self)>, ModelError> {
        let special: HashSet<String> = tokenizer.special_tokens().into_iter().collect();
        let ends = |token: u32| -> Result<bool, ModelError> {
            Ok(tokenizer.eos() == Some(token) || special.contains(&tokenizer.decode(&[token])?))
        };
        let mut questions = Vec::new();
        for (number, Example { tokens, learnt }) in examples.iter().enumerate() {
            let Some(last) = learnt.iter().rposition(|&learnt| learnt) else { continue };
            let first = learnt[..last].iter().rposition(|&learnt| !learnt).map_or(0, |before| before + 1);
            // The first token is never learnt.
            if first < 2 {
                continue;
            }
            let mut end = last + 1;
            while end > first && ends(tokens[end - 1])? {
                end -= 1;
            }
            let answer = tokenizer.decode(&tokens[first..end])?;
            questions.push((number, Self { prompt: tokens[..first].to_vec(), answer }));
        }
        Ok(questions)
    }
}
