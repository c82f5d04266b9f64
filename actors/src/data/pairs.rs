//! Pairs of a preferred answer and one that is not, for the same prompt.
//!
//! A pair is two examples of a data set, one behind the other. What is learnt of each is the answer alone: of a
//! conversation, its last learnt turn.

use std::path::Path;

use protocol::model::TextTokenizer;
use serde_json::{Map, Value};

use super::lines::Line;
use super::{DataError, DataOptions, Dataset, Example, PromptFormat};

/// Names of a line's fields.
const CHOSEN: &str = "chosen";
const REJECTED: &str = "rejected";

impl Example {
    /// The same with only the last run of what is learnt of it.
    fn last_turn(mut self) -> Self {
        let end = self.learnt.iter().rposition(|&learnt| learnt).map_or(0, |last| last + 1);
        let start = self.learnt[..end].iter().rposition(|&learnt| !learnt).map_or(0, |before| before + 1);
        self.learnt[..start].fill(false);
        self
    }
}

impl Dataset {
    /// Reads a JSONL file of `{"prompt", "chosen", "rejected"}`, where all are texts, or `{"chosen", "rejected"}`, where both
    /// are lists of messages (behind those of `"prompt"`, if there are any).
    ///
    /// # Errors
    /// When the file cannot be read, the first line that is not as expected, and pairs that are longer than allowed.
    pub fn load_pairs(path: &Path, options: &DataOptions, tokenizer: &TextTokenizer) -> Result<Self, DataError> {
        let default = if tokenizer.chat_template().is_some() { PromptFormat::Chat } else { PromptFormat::Plain };
        let format = options.format.unwrap_or(default);
        let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let mut pairs = Vec::new();
        for (line, bytes) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let pair = pair(bytes, options, format, tokenizer);
            pairs.push(pair.map_err(|what| DataError::Line { path: path.to_owned(), line, what })?);
        }
        if pairs.is_empty() {
            return Err(DataError::Nothing { path: path.to_owned(), what: "the file holds no pairs".into() });
        }
        Ok(Self::from_pairs(pairs, tokenizer.eos().unwrap_or(0)))
    }
}

fn pair(
    bytes: &[u8],
    options: &DataOptions,
    format: PromptFormat,
    tokenizer: &TextTokenizer,
) -> Result<(Example, Example), String> {
    let object: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| {
        format!("it is not a JSON object ({error}); expected {{\"prompt\", \"{CHOSEN}\", \"{REJECTED}\"}}")
    })?;
    let prompt = object.get(&options.fields.prompt);
    if let Some(other) = object.keys().find(|name| ![CHOSEN, REJECTED, &options.fields.prompt].contains(&name.as_str()))
    {
        return Err(format!("it has a field `{other}`, which a pair has not"));
    }
    let side = |name: &str| {
        let answer = object.get(name).ok_or_else(|| format!("`{name}` is missing"))?;
        let line = match (prompt, answer) {
            (Some(Value::String(prompt)), Value::String(answer)) => {
                Line::Pair { prompt: prompt.clone(), completion: answer.clone() }
            }
            (None | Some(Value::Array(_)), Value::Array(messages)) => {
                let before = prompt.and_then(Value::as_array).cloned().unwrap_or_default();
                let messages = before.into_iter().chain(messages.iter().cloned()).collect();
                let fields = Map::from_iter([(options.fields.messages.clone(), Value::Array(messages))]);
                Line::parse(Value::Object(fields).to_string().as_bytes(), &options.fields)?
            }
            _ => {
                return Err(format!(
                    "`{name}` and the prompt must both be texts, or both lists of messages, of which the prompt may be \
                     left out"
                ));
            }
        };
        let example =
            Example::encode(&line, format, tokenizer).map_err(|what| format!("`{name}`: {what}"))?.last_turn();
        match example.tokens.len() {
            tokens if tokens > options.max_tokens => Err(format!(
                "`{name}` has {tokens} tokens, and a pair that is cut would compare something else: raise data.max_tokens, \
                 which is {}",
                options.max_tokens
            )),
            _ => Ok(example),
        }
    };
    let (chosen, rejected) = (side(CHOSEN)?, side(REJECTED)?);
    if chosen == rejected {
        return Err(format!("`{CHOSEN}` and `{REJECTED}` are the same, so there is nothing to prefer"));
    }
    Ok((chosen, rejected))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{BatchSource as _, Batches, HeldOut};
    use super::*;

    fn example(token: u32, length: usize) -> Example {
        Example { tokens: vec![token; length], learnt: (0..length).map(|at| at > 0).collect() }
    }

    fn pairs(count: u32) -> Dataset {
        Dataset::from_pairs((0..count).map(|n| (example(n, 3), example(100 + n, 5))).collect(), 0)
    }

    #[test]
    fn pairs_stay_together_and_know_their_number() {
        let data = pairs(10);
        assert_eq!((data.units(), data.examples().len()), (10, 20));
        let (train, held_out) = data.split(HeldOut::Count(3), 1).unwrap();
        assert_eq!((train.units(), held_out.units()), (7, 3));
        let mut batches = Batches::new(&train, 2, 1, 5);
        let mut dealt = Vec::new();
        for _ in 0..7 {
            let batch = batches.next_batch().unwrap();
            assert_eq!(batch.lengths, [3, 5, 3, 5]);
            for (&number, rows) in batch.numbers.iter().zip(batch.sequences().step_by(2)) {
                assert_eq!(train.examples()[2 * number].tokens, batch.tokens[rows.clone()]);
                assert_eq!(batch.tokens[rows.end], 100 + batch.tokens[rows.start]);
                dealt.push(number);
            }
        }
        dealt[..7].sort_unstable();
        assert!(dealt[..7].iter().copied().eq(0..7), "every pair once a pass");
        let numbers: Vec<usize> = held_out.in_order(2, 1).flat_map(|batch| batch.numbers).collect();
        assert_eq!(numbers, [0, 1, 2]);
    }

    #[test]
    fn only_the_last_turn_is_compared() {
        let learnt = [0, 1, 1, 0, 0, 1, 1, 0].map(|learnt| learnt == 1).to_vec();
        let last = Example { tokens: vec![0; 8], learnt }.last_turn().learnt;
        assert_eq!(last, [0, 0, 0, 0, 0, 1, 1, 0].map(|learnt| learnt == 1));
    }
}
