//! From texts to tokens, and which of them are learnt.
//!
//! A text is encoded in one piece, so that tokens are those that the model was trained on, and what is learnt is told
//! by each token's place in the text: a token counts when its last byte lies in a span that is to be learnt.

use std::ops::Range;

use protocol::model::{ChatMessage, ChatTemplate, TextTokenizer};

use super::PromptFormat;
use super::lines::Line;

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

    /// Encodes a line.
    ///
    /// # Errors
    /// What is wrong with the line, in words.
    pub(super) fn encode(line: &Line, format: PromptFormat, tokenizer: &TextTokenizer) -> Result<Self, String> {
        let example = match line {
            Line::Text(text) => {
                refuse_empty(text, "the text")?;
                Self::ended(text, 0, tokenizer)?
            }
            Line::Pair { prompt, completion } => {
                refuse_empty(completion, "the completion")?;
                match format {
                    PromptFormat::Plain => Self::ended(&format!("{prompt}{completion}"), prompt.len(), tokenizer)?,
                    PromptFormat::Chat => {
                        let turns = [ChatMessage::new("user", prompt), ChatMessage::new("assistant", completion)];
                        Self::chat(&turns, tokenizer)?
                    }
                }
            }
            Line::Chat(messages) => {
                for message in messages.iter().filter(|message| message.role == "assistant") {
                    refuse_empty(&message.content, "an assistant's turn")?;
                }
                Self::chat(messages, tokenizer)?
            }
        };
        match example.loss_tokens() {
            0 => Err("there is nothing to learn in it: it is a single token".to_owned()),
            _ => Ok(example),
        }
    }

    /// A text that is learnt from byte `start` on, and the token that ends it.
    fn ended(text: &str, start: usize, tokenizer: &TextTokenizer) -> Result<Self, String> {
        let rest = start..text.len();
        let mut example = Self::spans(text, std::slice::from_ref(&rest), true, tokenizer)?;
        if let Some(eos) = tokenizer.eos().filter(|eos| example.tokens.last() != Some(eos)) {
            example.tokens.push(eos);
            example.learnt.push(true);
        }
        Ok(example)
    }

    fn chat(messages: &[ChatMessage], tokenizer: &TextTokenizer) -> Result<Self, String> {
        let template = tokenizer.chat_template().ok_or("the model has no chat template, which messages need")?;
        let (text, spans) = assistant_spans(messages, template, &tokenizer.special_tokens())?;
        Self::spans(&text, &spans, false, tokenizer)
    }

    fn spans(text: &str, spans: &[Range<usize>], special: bool, tokenizer: &TextTokenizer) -> Result<Self, String> {
        let encoded = tokenizer.encode_spans(text, special).map_err(|error| error.to_string())?;
        let (mut tokens, mut learnt) = (Vec::with_capacity(encoded.len() + 1), Vec::with_capacity(encoded.len() + 1));
        for (token, place) in encoded {
            learnt.push(!tokens.is_empty() && spans.iter().any(|span| span.start < place.end && place.end <= span.end));
            tokens.push(token);
        }
        Ok(Self { tokens, learnt })
    }
}

fn refuse_empty(text: &str, what: &str) -> Result<(), String> {
    if text.trim().is_empty() { Err(format!("{what} is empty")) } else { Ok(()) }
}

/// The conversation as the template writes it, and the bytes of the assistant's turns in it, each with the special
/// token that ends it.
///
/// Turns cannot be searched for by their words, which others may have said before. So the template is rendered a
/// second time with a mark in place of each turn, and what stands between the marks says where the turns are.
fn assistant_spans(
    messages: &[ChatMessage],
    template: &ChatTemplate,
    special: &[String],
) -> Result<(String, Vec<Range<usize>>), String> {
    let render = |messages: &[ChatMessage]| template.render(messages, false).map_err(|error| error.to_string());
    let text = render(messages)?;
    // Characters of private use, which no template treats specially.
    let mark = |turn: usize| format!("\u{e000}{turn}\u{e001}");
    let marked: Vec<ChatMessage> = (0..).zip(messages).map(|(i, m)| ChatMessage::new(&m.role, mark(i))).collect();
    let skeleton = render(&marked)?;
    let hidden = |turn: usize| format!("the model's chat template does not show turn {} as it is", turn + 1);

    let mut places: Vec<(Range<usize>, usize)> = Vec::new();
    for (turn, message) in messages.iter().enumerate() {
        match skeleton.find(&mark(turn)) {
            Some(start) => places.push((start..start + mark(turn).len(), turn)),
            None if message.role == "assistant" => return Err(hidden(turn)),
            None => {}
        }
    }
    places.sort_by_key(|(place, _)| place.start);
    let mut spans = Vec::new();
    let mut at = places.first().map_or(0, |(place, _)| place.start);
    if !text.starts_with(&skeleton[..at]) {
        return Err("the model's chat template begins differently for different words".to_owned());
    }
    for (k, (place, turn)) in places.iter().enumerate() {
        let after = &skeleton[place.end..places.get(k + 1).map_or(skeleton.len(), |(next, _)| next.start)];
        let said = messages[*turn].content.as_str();
        let rest = text.get(at..).ok_or_else(|| hidden(*turn))?;
        let fits = |said: &&str| rest.strip_prefix(said).is_some_and(|rest| rest.starts_with(after));
        let ways = [said, said.trim_end(), said.trim_start(), said.trim()];
        let said = ways.into_iter().find(fits).ok_or_else(|| hidden(*turn))?;
        let end = at + said.len();
        if messages[*turn].role == "assistant" {
            let blank = after.len() - after.trim_start().len();
            let mark = special.iter().find(|token| after[blank..].starts_with(token.as_str()));
            spans.push(at..mark.map_or(end, |mark| end + blank + mark.len()));
        }
        at = end + after.len();
    }
    Ok((text, spans))
}
