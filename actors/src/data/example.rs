//! From records to tokens, and which of them are learnt.
//!
//! A text is encoded in one piece, so that tokens are those that the model was trained on, and what is learnt is told by
//! each token's place in the text: a token is learnt when it has a part in what is to be learnt.

use std::ops::Range;

use protocol::model::{ChatTemplate, TextTokenizer};

use super::record::{Conversation, Record, Turn};
use super::turns;
use super::{DataError, DataOptions, PromptFormat, TrainOnEnd, Turns};

/// A sequence of tokens to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token whether predicting it is learnt; never set for the first, which nothing comes before.
    pub learnt: Vec<bool>,
}

impl Example {
    /// Tokens that carry loss.
    pub fn loss_tokens(&self) -> usize {
        self.learnt.iter().filter(|&&learnt| learnt).count()
    }

    /// Cuts it to so many tokens; whether anything was cut.
    pub(super) fn cut(&mut self, most: usize) -> bool {
        let longer = self.tokens.len() > most;
        self.tokens.truncate(most);
        self.learnt.truncate(most);
        longer
    }
}

/// An example, and what is to be told about it.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) example: Example,
    /// The first token that is learnt and ends a turn, or the text.
    pub(super) ends: Option<usize>,
    pub(super) notes: Vec<String>,
}

/// Makes examples of records.
pub(super) struct Encoder<'a> {
    options: &'a DataOptions,
    tokenizer: &'a TextTokenizer,
    /// The template that the user names.
    named: Option<ChatTemplate>,
}

impl<'a> Encoder<'a> {
    /// # Errors
    /// When the options name a template that is not there.
    pub(super) fn new(options: &'a DataOptions, tokenizer: &'a TextTokenizer) -> Result<Self, DataError> {
        Ok(Self { options, tokenizer, named: options.named_template(tokenizer)? })
    }

    /// The examples that a record makes.
    ///
    /// # Errors
    /// What is wrong with the record, in words.
    pub(super) fn encode(&self, record: Record) -> Result<Vec<Encoded>, String> {
        let conversation = match record {
            Record::Text(text) => return Ok(vec![self.ended(&text, 0)?]),
            Record::Pair { prompt, completion } if self.options.format == PromptFormat::Plain => {
                return Ok(vec![self.ended(&format!("{prompt}{completion}"), prompt.len())?]);
            }
            Record::Pair { completion, .. } if completion.trim().is_empty() => {
                return Err("the completion is empty".to_owned());
            }
            Record::Pair { prompt, completion } => Conversation::asked(prompt, completion),
            Record::Chat(conversation) => *conversation,
        };
        let learnt: Vec<usize> =
            (0..conversation.turns.len()).filter(|&turn| conversation.turns[turn].learnt).collect();
        match self.options.turns {
            Turns::All => Ok(vec![self.chat(&conversation)?]),
            Turns::Last => Ok(vec![self.chat(&conversation.with_only(learnt.last().copied()))?]),
            Turns::Each => learnt.into_iter().map(|turn| self.chat(&conversation.up_to(turn))).collect(),
        }
    }

    /// A text that is learnt from byte `start` on, and the token that ends it.
    fn ended(&self, text: &str, start: usize) -> Result<Encoded, String> {
        if text[start..].trim().is_empty() {
            return Err(if start > 0 { "the completion is empty" } else { "the text is empty" }.to_owned());
        }
        self.plain(text, std::slice::from_ref(&(start..text.len())))
    }

    /// A text of which some is learnt, and the token that ends it, which the tokenizer may put there by itself.
    fn plain(&self, text: &str, spans: &[Range<usize>]) -> Result<Encoded, String> {
        let placed = self.tokenizer.encode_spans(text, true).map_err(|error| error.to_string())?;
        let (bos, eos) = (self.tokenizer.bos(), self.tokenizer.eos());
        if let [first, second, ..] = &placed[..]
            && first.framing
            && !second.framing
            && Some(second.id) == bos
            && first.id == second.id
        {
            let begins = self.tokenizer.decode(&[first.id]).unwrap_or_default();
            return Err(format!(
                "it begins with `{begins}`, which the tokenizer writes by itself; take it out of the text"
            ));
        }
        let ends = self.options.train_on_end != TrainOnEnd::None;
        let (mut tokens, mut learnt) = (Vec::with_capacity(placed.len() + 1), Vec::with_capacity(placed.len() + 1));
        let said = placed.iter().position(|token| !token.framing).unwrap_or(0);
        for (number, token) in placed.iter().enumerate() {
            let last = number + 1 == placed.len() && Some(token.id) == eos;
            let part = if token.framing { number > said } else { touches(&token.span, spans) };
            learnt.push(number > 0 && part && (ends || !(last || token.framing)));
            tokens.push(token.id);
        }
        if let Some(eos) = eos.filter(|eos| ends && tokens.last() != Some(eos)) {
            tokens.push(eos);
            learnt.push(true);
        }
        let ends = (tokens.last().copied() == eos && learnt.last() == Some(&true)).then(|| tokens.len() - 1);
        something(Encoded { example: Example { tokens, learnt }, ends, notes: Vec::new() })
    }

    fn chat(&self, conversation: &Conversation) -> Result<Encoded, String> {
        if self.options.format == PromptFormat::Plain {
            return self.one_after_the_other(conversation);
        }
        let template = self.template(conversation)?;
        let mut conversation = conversation.clone();
        for (name, value) in &self.options.template_values {
            conversation.values.entry(name.clone()).or_insert_with(|| value.clone());
        }
        let learnt = turns::learnt(&conversation, template, self.tokenizer, self.options)?;
        let placed = self.tokenizer.encode_spans(&learnt.text, false).map_err(|error| error.to_string())?;
        let parts = || placed.iter().skip(1);
        let ends = parts().position(|token| touches(&token.span, &learnt.ends)).map(|number| number + 1);
        let flags = std::iter::once(false).chain(parts().map(|token| touches(&token.span, &learnt.spans)));
        let example =
            Example { learnt: flags.take(placed.len()).collect(), tokens: placed.iter().map(|t| t.id).collect() };
        something(Encoded { example, ends, notes: learnt.notes })
    }

    /// The template for a conversation.
    fn template(&self, conversation: &Conversation) -> Result<&ChatTemplate, String> {
        let tools = || conversation.tools.as_ref().and_then(|_| self.tokenizer.named_template("tool_use"));
        let template = self.named.as_ref().or_else(tools).or_else(|| self.tokenizer.chat_template());
        template.ok_or_else(|| {
            let names = self.tokenizer.template_names();
            let (has, way) = match names.first() {
                None => ("no chat template".to_owned(), "data.chat_template = \"FILE\" gives one".to_owned()),
                Some(first) => (
                    format!("no default chat template, but {}", names.join(", ")),
                    format!("data.chat_template = \"{first}\" takes that one"),
                ),
            };
            format!(
                "the model has {has}, which a prompt with its completion and messages are written in; {way}, and data.format \
                 = \"plain\" writes texts one after the other"
            )
        })
    }

    /// What is said, one after the other, each turn that is learnt with the token that ends a text.
    fn one_after_the_other(&self, conversation: &Conversation) -> Result<Encoded, String> {
        if conversation.tools.is_some() || conversation.documents.is_some() {
            return Err("data.format = \"plain\" has no place for `tools` and `documents`".to_owned());
        }
        let ends = self.options.train_on_end != TrainOnEnd::None;
        let eos = self.tokenizer.eos().filter(|_| ends).map(|eos| self.tokenizer.decode(&[eos])).transpose();
        let eos = eos.map_err(|error| error.to_string())?.unwrap_or_default();
        let last = conversation.turns.iter().rposition(|turn| turn.learnt);
        let (mut text, mut spans) = (String::new(), Vec::new());
        for (number, Turn { message, learnt }) in conversation.turns.iter().enumerate() {
            if let Some(other) = message.fields().keys().find(|name| !matches!(name.as_str(), "role" | "content")) {
                return Err(format!("data.format = \"plain\" has no place for `{other}` of turn {}", number + 1));
            }
            let start = text.len();
            match message.fields().get("content") {
                Some(serde_json::Value::Array(parts)) => {
                    parts.iter().filter_map(|part| part.get("text")?.as_str()).for_each(|part| text.push_str(part));
                }
                _ => text.push_str(message.content().unwrap_or_default()),
            }
            if !learnt {
                continue;
            }
            if text[start..].trim().is_empty() {
                return Err(format!("turn {} is empty, and it is to be learnt", number + 1));
            }
            if self.options.train_on_end == TrainOnEnd::Turn && Some(number) != last {
                text.push_str(&eos);
            }
            spans.push(start..text.len());
        }
        // The last one is ended as any text, if nothing follows it.
        if last.is_some_and(|last| last + 1 < conversation.turns.len()) {
            let end = spans.last().map_or(0, |span| span.end);
            text.truncate(end);
        }
        self.plain(&text, &spans)
    }
}

impl Conversation {
    fn asked(prompt: String, completion: String) -> Self {
        let turn =
            |role: &str, said: String, learnt| Turn { message: protocol::model::ChatMessage::new(role, said), learnt };
        Self { turns: vec![turn("user", prompt, false), turn("assistant", completion, true)], ..Self::default() }
    }

    /// The same with one turn to learn.
    fn with_only(&self, turn: Option<usize>) -> Self {
        let mut only = self.clone();
        (0..).zip(&mut only.turns).for_each(|(number, one)| one.learnt = Some(number) == turn);
        only
    }

    /// What ends with this turn, which alone is learnt.
    fn up_to(&self, turn: usize) -> Self {
        let mut upto = self.with_only(Some(turn));
        upto.turns.truncate(turn + 1);
        upto
    }
}

/// Whether a token has a part in one of the spans. One without bytes of its own is the rest of the character before it.
fn touches(token: &Range<usize>, spans: &[Range<usize>]) -> bool {
    spans.iter().any(|span| match token.is_empty() {
        true => span.start < token.start && token.start <= span.end,
        false => token.start < span.end && span.start < token.end,
    })
}

fn something(encoded: Encoded) -> Result<Encoded, String> {
    match encoded.example.loss_tokens() {
        0 => Err("there is nothing to learn in it".to_owned()),
        _ => Ok(encoded),
    }
}
