//! Where the turns of a conversation are in the text that a chat template makes of it.
//!
//! Turns cannot be searched for by their words, which others may have said before. So the template is run again with a mark
//! in place of a turn, and what differs is the turn: from the first difference to the last. What the model writes begins
//! where the head that asks it to go on (`add_generation_prompt`) ends, if the text has that head. What ends the turn
//! is what the template puts behind it when the conversation ends there: up to the first token that is one by itself
//! (`<|im_end|>`, whatever its flags), or where there is none all of it (`### End`), white space aside.

use std::ops::Range;

use protocol::model::{Chat, ChatMessage, ChatTemplate, TextTokenizer};
use serde_json::{Value, json};

use super::options::{DataOptions, TrainOnEnd};
use super::record::{Conversation, Turn};

/// A conversation as it is written, and what of it is learnt.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    pub(super) text: String,
    /// Bytes of the text that are learnt.
    pub(super) spans: Vec<Range<usize>>,
    /// Those of them that end turns.
    pub(super) ends: Vec<Range<usize>>,
    /// What the template does not show.
    pub(super) notes: Vec<String>,
}

/// Writes a conversation and finds what is learnt of it.
///
/// # Errors
/// What of it the template does not show, and what to do about it, in words.
pub(super) fn learnt(
    conversation: &Conversation,
    template: &ChatTemplate,
    tokenizer: &TextTokenizer,
    options: &DataOptions,
) -> Result<Learnt, String> {
    let messages = messages(conversation, template);
    let chat = Chat {
        messages: &messages,
        tools: conversation.tools.as_ref(),
        documents: conversation.documents.as_ref(),
        values: Some(&conversation.values),
        day: options.template_date,
    };
    Writer { turns: &conversation.turns, chat, template, tokenizer }.learnt(options.train_on_end)
}

/// The messages, their parts joined to a text where the template does not look into them.
fn messages(conversation: &Conversation, template: &ChatTemplate) -> Vec<ChatMessage> {
    let joined = |turn: &Turn| match turn.message.fields().get("content") {
        Some(Value::Array(parts)) if !template.takes_parts() => {
            let text: String = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
            turn.message.clone().with("content", text)
        }
        _ => turn.message.clone(),
    };
    conversation.turns.iter().map(joined).collect()
}

/// A turn's place in the text.
struct Place {
    /// Where what the model writes begins.
    start: usize,
    /// Where what the turn says ends.
    said: usize,
    /// Where what ends the turn does.
    end: usize,
}

struct Writer<'a> {
    turns: &'a [Turn],
    chat: Chat<'a>,
    template: &'a ChatTemplate,
    tokenizer: &'a TextTokenizer,
}

impl Writer<'_> {
    fn learnt(&self, end: TrainOnEnd) -> Result<Learnt, String> {
        self.refuse_unknown()?;
        let written = self.template.write(&self.chat, false).map_err(|error| error.to_string())?;
        let text = written.text;
        let mut learnt = Learnt { notes: self.not_shown(&text)?, ..Learnt::default() };
        let numbers: Vec<usize> = (0..self.turns.len()).filter(|&number| self.turns[number].learnt).collect();
        let places = self.places(&text, &numbers)?;
        for (&number, place) in numbers.iter().zip(&places) {
            self.check_shown(&text, number, place)?;
            let ends = match end {
                TrainOnEnd::Turn => true,
                TrainOnEnd::Last => Some(&number) == numbers.last(),
                TrainOnEnd::None => false,
            };
            let end = place.said..place.end;
            if !self.template.has_generation() {
                learnt.spans.push(place.start..if ends { place.end } else { place.said });
                learnt.ends.extend(Some(end).filter(|end| ends && !end.is_empty()));
                continue;
            }
            // The template says what the model writes.
            for span in written.generated.iter().filter(|span| span.start < place.end && place.start < span.end) {
                let span = if ends { span.clone() } else { span.start..span.end.min(end.start) };
                learnt
                    .ends
                    .extend(Some(span.start.max(end.start)..span.end.min(end.end)).filter(|end| !end.is_empty()));
                learnt.spans.push(span);
            }
        }
        learnt.text = text;
        Ok(learnt)
    }

    fn write(&self, messages: &[ChatMessage], open: bool) -> Option<String> {
        self.template.write(&self.chat.with_messages(messages), open).ok().map(|written| written.text)
    }

    /// The messages with a mark in place of all that turn `number` says.
    fn marked(&self, number: usize, mark: &str) -> Vec<ChatMessage> {
        let mut messages = self.chat.messages.to_vec();
        let parts = messages[number].fields().get("content").is_some_and(Value::is_array);
        let content = if parts { json!([{"type": "text", "text": mark}]) } else { mark.into() };
        messages[number] = ChatMessage::new(messages[number].role(), "").with("content", content);
        messages
    }

    /// Where these turns are in the text. What ends the last of them is known best, and helps with the others.
    fn places(&self, text: &str, numbers: &[usize]) -> Result<Vec<Place>, String> {
        let mut places: Vec<Place> = Vec::with_capacity(numbers.len());
        let mut mark_of_last: Option<&str> = None;
        let mut wrong = None;
        for &number in numbers.iter().rev() {
            match self.place(text, number, mark_of_last) {
                Ok(place) => {
                    mark_of_last.get_or_insert(&text[place.said..place.end]);
                    places.push(place);
                }
                // The first turn that is not shown is the one to name.
                Err(what) => wrong = Some(what),
            }
        }
        places.reverse();
        wrong.map_or(Ok(places), Err)
    }

    /// Where turn `number` is in the text.
    fn place(&self, text: &str, number: usize, mark_of_last: Option<&str>) -> Result<Place, String> {
        // A character of private use that nobody says.
        let mark = ('\u{e000}'..'\u{f8ff}').find(|&c| !text.contains(c)).unwrap_or('\u{e000}').to_string();
        let marked = self.marked(number, &mark);
        let head = self.head(text, number);
        let Some(skeleton) = self.write(&marked, false).filter(|skeleton| skeleton.contains(&mark)) else {
            // A template may refuse the conversation without what the turn calls.
            return head.and_then(|start| self.place_by_prefix(text, number, start)).ok_or_else(|| self.hidden(number));
        };
        let first = common_prefix(text, &skeleton);
        let said = (text.len() - common_suffix(&text[first..], &skeleton[first..])).max(first);
        let start = head.filter(|&head| head <= said).unwrap_or(first);
        let rest = &text[said..];
        let closed = match number + 1 == self.turns.len() {
            true => Some(rest.to_owned()),
            false => self
                .write(&marked[..=number], false)
                .and_then(|closed| closed.rfind(&mark).map(|at| closed[at + mark.len()..].to_owned())),
        };
        let end = match closed {
            Some(closed) => self.end_mark(&closed, common_prefix(&closed, rest)),
            None => mark_of_last.filter(|mark| rest.starts_with(mark)).map(str::len),
        };
        Ok(Place { start, said, end: said + end.unwrap_or(0) })
    }

    /// Behind the head that asks the model to go on, if the text has it.
    fn head(&self, text: &str, number: usize) -> Option<usize> {
        let before = &self.chat.messages[..number];
        let (open, closed) = (self.write(before, true)?, self.write(before, false)?);
        (open.len() > closed.len() && text.starts_with(&open)).then_some(open.len())
    }

    /// The turn as what the conversation up to it has more than its head.
    fn place_by_prefix(&self, text: &str, number: usize, start: usize) -> Option<Place> {
        let with = self.write(&self.chat.messages[..=number], false)?;
        let turn = text.get(start..common_prefix(text, &with))?.trim_end();
        let mut said = turn.len();
        let mut from = 0;
        while let Some(added) = self.tokenizer.first_added(&turn[from..]) {
            from += added.end;
            if from == turn.len() {
                said = from - added.len();
            }
        }
        Some(Place { start, said: start + said, end: start + turn.len() })
    }

    /// The length of what ends a turn, at the beginning of what follows it in a conversation that ends there; `common` bytes of
    /// that follow it here.
    fn end_mark(&self, closed: &str, common: usize) -> Option<usize> {
        let end = match self.tokenizer.first_added(closed) {
            Some(added) => added.end,
            None => closed.trim_end().len(),
        };
        (end > 0 && end <= common && !closed[..end].trim().is_empty()).then_some(end)
    }

    /// Refuses what a turn that is learnt has, and the template never speaks of.
    fn refuse_unknown(&self) -> Result<(), String> {
        for (number, turn) in self.turns.iter().enumerate().filter(|(_, turn)| turn.learnt) {
            let calls = turn.message.fields().get("tool_calls").is_some_and(says);
            if calls && !self.template.mentions("tool_calls") {
                return Err(self.not_shown_in("tool_calls", number));
            }
            if let Some((name, _)) = turn.message.reasoning().filter(|(_, said)| says(said) && !self.knows_reasoning())
            {
                return Err(self.not_shown_in(name, number));
            }
        }
        Ok(())
    }

    fn knows_reasoning(&self) -> bool {
        ["reasoning_content", "thinking"].iter().any(|name| self.template.mentions(name))
    }

    /// Names what the template leaves out of the text; what is to be learnt must not be.
    fn not_shown(&self, text: &str) -> Result<Vec<String>, String> {
        let mut notes = Vec::new();
        let without = |name: &str, number: usize| {
            let mut messages = self.chat.messages.to_vec();
            messages[number] = messages[number].clone().without(name);
            self.write(&messages, false)
        };
        for (number, turn) in self.turns.iter().enumerate() {
            let reasoning = turn.message.reasoning().map(|(name, _)| name);
            for (name, value) in turn.message.fields() {
                if matches!(name.as_str(), "role" | "content") || !says(value) {
                    continue;
                }
                let known = if Some(name.as_str()) == reasoning {
                    self.knows_reasoning()
                } else {
                    self.template.mentions(name)
                };
                if known && without(name, number).is_none_or(|other| other != text) {
                    continue;
                }
                if turn.learnt && (name == "tool_calls" || Some(name.as_str()) == reasoning) {
                    return Err(self.not_shown_in(name, number));
                }
                notes.push(format!("`{name}` of a turn, which the chat template does not show"));
            }
            let content = turn.message.fields().get("content");
            if !turn.learnt && content.is_some_and(|content| !shown(content, text)) {
                notes.push(format!(
                    "a turn of `{}`, which the chat template does not show as it is",
                    turn.message.role()
                ));
            }
        }
        for (name, value) in [("tools", self.chat.tools), ("documents", self.chat.documents)] {
            let bare = Chat { tools: None, documents: None, ..self.chat };
            let without = match name {
                "tools" => Chat { documents: self.chat.documents, ..bare },
                _ => Chat { tools: self.chat.tools, ..bare },
            };
            if value.is_some() && self.template.write(&without, false).is_ok_and(|other| other.text == text) {
                notes.push(format!("`{name}`, which the chat template does not show"));
            }
        }
        let values = self.chat.values.into_iter().flat_map(|values| values.keys());
        for name in values.filter(|name| !self.template.reads(name)) {
            notes.push(format!("`{name}`, which the chat template never reads ({}),", self.template.told_variables()));
        }
        if self.template.asks_for_day(&self.chat) {
            notes.push(format!(
                "the day of the run, which the chat template asks for (strftime_now) and is told {} instead (data.template_date),",
                self.chat.day
            ));
        }
        Ok(notes)
    }

    /// Refuses a turn that is to be learnt and is not in its place as it was said.
    fn check_shown(&self, text: &str, number: usize, place: &Place) -> Result<(), String> {
        let said = text.get(place.start..place.said).unwrap_or_default();
        match self.chat.messages[number].fields().get("content") {
            // What the head already wrote of it is not written again.
            Some(content) if !shown(content, said) && !shown(content, &text[..place.said]) => Err(self.hidden(number)),
            _ if said.trim().is_empty() => Err(format!("turn {} is empty, and it is to be learnt", number + 1)),
            _ => Ok(()),
        }
    }

    fn hidden(&self, number: usize) -> String {
        let thinks = self.chat.messages[number].content().is_some_and(|content| content.contains("</think>"));
        let what = if thinks { "leaves out what was thought in" } else { "does not show" };
        let as_it_is = if thinks { "" } else { " as it is" };
        format!("the model's chat template {what} turn {}{as_it_is}; {}", number + 1, self.way_out(number))
    }

    fn not_shown_in(&self, name: &str, number: usize) -> String {
        let turn = number + 1;
        format!(
            "the model's chat template does not show `{name}` of turn {turn}, which is to be learnt; {}",
            self.way_out(number)
        )
    }

    /// What helps where the template leaves something of a turn out.
    fn way_out(&self, number: usize) -> String {
        let last = number + 1 == self.turns.len();
        let upto = &self.chat.messages[..=number];
        let shown_as_last = !last
            && self.write(upto, false).is_some_and(|text| {
                let content = upto[number].fields().get("content");
                let thought = upto[number].reasoning().map(|(_, thought)| thought);
                content.is_none_or(|content| shown(content, &text))
                    && thought.is_none_or(|thought| shown(thought, &text))
            });
        if shown_as_last {
            return "as the last turn it shows it: data.turns = \"each\" makes an example of each turn, which ends with it".into();
        }
        "name a template that shows it (data.chat_template = \"FILE\"), take it out of the data, or leave the turn out of what \
         is learnt (\"train\": false)"
            .to_owned()
    }
}

/// Whether there is anything in a value.
fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Whether all that a content says is in the text, white space aside, which templates set in their own ways.
fn shown(content: &Value, text: &str) -> bool {
    let bare = |text: &str| text.split_whitespace().collect::<String>();
    let text = bare(text);
    match content {
        Value::String(said) => text.contains(&bare(said)),
        Value::Array(parts) => {
            parts.iter().filter_map(|part| part.get("text")?.as_str()).all(|said| text.contains(&bare(said)))
        }
        _ => true,
    }
}

/// Bytes that both begin with, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// Bytes that both end with, in whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}
