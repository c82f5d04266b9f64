//! How a conversation becomes a prompt: by the settings' chat template or the model's, with the settings' values for it, as in
//! training.

use actors::data::DataOptions;
use anyhow::Context as _;
use protocol::model::{Chat, ChatMessage, ChatTemplate, TextTokenizer};
use serde_json::{Map, Value};

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct ChatStyle {
    /// A template in place of the model's own.
    template: Option<ChatTemplate>,
    /// Variables of the template besides the conversation.
    pub(crate) values: Map<String, Value>,
}

impl ChatStyle {
    /// That of the settings. Blocks.
    ///
    /// # Errors
    /// When they name a template that is not there.
    pub(crate) fn of(options: &DataOptions, tokenizer: &TextTokenizer) -> anyhow::Result<Self> {
        Ok(Self { template: options.named_template(tokenizer)?, values: options.template_values.clone() })
    }

    /// The template, if there is one.
    pub(crate) fn template<'a>(&'a self, tokenizer: &'a TextTokenizer) -> Option<&'a ChatTemplate> {
        self.template.as_ref().or_else(|| tokenizer.chat_template())
    }

    /// The tokens of a conversation, up to where the model's answer begins.
    ///
    /// # Errors
    /// When there is no template, or it refuses the conversation.
    pub(crate) fn prompt(&self, tokenizer: &TextTokenizer, messages: &[ChatMessage]) -> anyhow::Result<Vec<u32>> {
        let template = self.template(tokenizer).context(
            "the model has no chat template: data.chat_template names one, and `node generate --raw` goes on with a text as it is",
        )?;
        let text = template.write(&Chat { values: Some(&self.values), ..Chat::new(messages) }, true)?.text;
        // The template writes what stands around a text itself.
        Ok(tokenizer.encode(&text, false)?)
    }
}
