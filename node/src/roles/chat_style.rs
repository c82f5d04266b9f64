//! How a conversation becomes a prompt: by the settings' chat template or the model's, with the settings' values for it, as in
//! training.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use actors::data::DataOptions;
use anyhow::Context as _;
use protocol::model::{Chat, ChatMessage, ChatTemplate, ModelError, TemplateDay, TextTokenizer};
use serde_json::{Map, Value};

/// Most values that are named as being of no effect, and most characters of a name: clients of a server choose them.
const MOST_TOLD: usize = 64;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct ChatStyle {
    /// A template in place of the model's own.
    template: Option<ChatTemplate>,
    /// Variables of the template besides the conversation.
    pub(crate) values: Map<String, Value>,
    /// What is said to a template that asks for the day.
    day: TemplateDay,
    /// What was already said to be of no effect.
    told: Mutex<BTreeSet<String>>,
    /// Whether the day was already said.
    told_day: AtomicBool,
}

impl ChatStyle {
    /// That of the settings. Blocks.
    ///
    /// # Errors
    /// When they name a template that is not there.
    pub(crate) fn of(options: &DataOptions, tokenizer: &TextTokenizer) -> anyhow::Result<Self> {
        Ok(Self {
            template: options.named_template(tokenizer)?,
            values: options.template_values.clone(),
            day: options.template_date,
            ..Self::default()
        })
    }

    /// The template, if there is one.
    pub(crate) fn template<'a>(&'a self, tokenizer: &'a TextTokenizer) -> Option<&'a ChatTemplate> {
        self.template.as_ref().or_else(|| tokenizer.chat_template())
    }

    /// A conversation up to where the model's answer begins, with these values for the template. What of them it never reads is
    /// named, once, and so is a day that is not today's.
    ///
    /// # Errors
    /// When the template refuses the conversation.
    pub(crate) fn write(
        &self,
        template: &ChatTemplate,
        messages: &[ChatMessage],
        values: &Map<String, Value>,
    ) -> Result<String, ModelError> {
        let chat = Chat { values: Some(values), day: self.day, ..Chat::new(messages) };
        let text = template.write(&chat, true)?.text;
        for name in values.keys().filter(|name| !template.reads(name)) {
            let name: String = name.chars().take(MOST_TOLD).collect();
            let first = |mut told: MutexGuard<'_, BTreeSet<_>>| told.len() < MOST_TOLD && told.insert(name.clone());
            if self.told.lock().is_ok_and(first) {
                let reads = template.told_variables();
                tracing::warn!("{name:?} is of no effect: the chat template never reads it ({reads})");
            }
        }
        // To find out takes two more texts.
        if !self.told_day.load(Ordering::Relaxed) && template.asks_for_day(&chat) {
            self.told_day.store(true, Ordering::Relaxed);
            tracing::warn!(
                "the chat template asks for the day (strftime_now): it is told {}, as in training (data.template_date)",
                self.day
            );
        }
        Ok(text)
    }

    /// The tokens of a conversation, up to where the model's answer begins.
    ///
    /// # Errors
    /// When there is no template, or it refuses the conversation.
    pub(crate) fn prompt(&self, tokenizer: &TextTokenizer, messages: &[ChatMessage]) -> anyhow::Result<Vec<u32>> {
        let template = self.template(tokenizer).context(
            "the model has no chat template: data.chat_template names one, and `node generate --raw` goes on with a text as it is",
        )?;
        let text = self.write(template, messages, &self.values)?;
        // The template writes what stands around a text itself.
        Ok(tokenizer.encode(&text, false)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::model::Model;
    use protocol::model::synthetic::{StoredAs, SyntheticLlama};

    use super::*;

    #[test]
    fn what_clients_make_up_is_not_remembered_without_end() {
        let folder = tempfile::tempdir().unwrap();
        SyntheticLlama::tiny(3).write_folder(folder.path(), StoredAs::F32).unwrap();
        let tokenizer = Model::open(folder.path()).unwrap().tokenizer().unwrap();
        let template = tokenizer.template("{% for message in messages %}{{ message.content }}{% endfor %}".to_owned());
        let style = ChatStyle::default();
        let said = [ChatMessage::new("user", "hello")];
        for number in 0..3 * MOST_TOLD {
            let values = Map::from_iter([(format!("{number}{}", "x".repeat(1000)), Value::Null)]);
            style.write(&template, &said, &values).unwrap();
        }
        let told = style.told.lock().unwrap();
        assert_eq!(told.len(), MOST_TOLD);
        assert!(told.iter().all(|name| name.len() == MOST_TOLD));
    }
}
