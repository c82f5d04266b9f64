//! How a conversation becomes a prompt: by the settings' chat template or the model's, with the settings' values for it, as in
//! training.

use std::collections::BTreeSet;
use std::sync::Mutex;

use actors::data::DataOptions;
use anyhow::Context as _;
use protocol::model::{Chat, ChatMessage, ChatTemplate, ModelError, TemplateDay, TextTokenizer};
use serde_json::{Map, Value};

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
            told: Mutex::default(),
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
        let first = |what: &str| self.told.lock().is_ok_and(|mut told| told.insert(what.to_owned()));
        for name in values.keys().filter(|name| !template.reads(name) && first(name)) {
            tracing::warn!(
                "`{name}` is of no effect: the chat template never reads it ({})",
                template.told_variables()
            );
        }
        if template.asks_for_day(&chat) && first("the day") {
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
