//! What is to be answered, and the tokens that the model reads of it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use protocol::model::{ChatMessage, TextTokenizer};
use serde::Deserialize;
use serde_json::Value;

use crate::roles::chat_style::ChatStyle;

/// A prompt, or a conversation.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Prompt {
    /// What its answer is to be known by.
    pub(super) id: Option<Value>,
    prompt: Option<String>,
    messages: Option<Vec<ChatMessage>>,
}

impl Prompt {
    pub(super) fn of_text(text: String) -> Self {
        Self { id: None, prompt: Some(text), messages: None }
    }

    /// What it is called in an error.
    pub(super) fn name(&self, number: usize) -> String {
        match &self.id {
            Some(id) => format!("prompt {} (id {id})", number + 1),
            None => format!("prompt {}", number + 1),
        }
    }

    /// The tokens that an answer goes on from.
    ///
    /// # Errors
    /// When the model has no chat template and one is needed, or the template refuses the conversation.
    pub(super) fn tokens(
        &self,
        tokenizer: &TextTokenizer,
        style: &ChatStyle,
        system: Option<&str>,
        raw: bool,
    ) -> anyhow::Result<Vec<u32>> {
        if raw {
            let text =
                self.prompt.as_ref().context("--raw goes on with texts: a conversation needs the chat template")?;
            return Ok(tokenizer.encode(text, true)?);
        }
        let mut messages: Vec<ChatMessage> = system.map(|text| ChatMessage::new("system", text)).into_iter().collect();
        match (&self.prompt, &self.messages) {
            (Some(prompt), None) => messages.push(ChatMessage::new("user", prompt)),
            (None, Some(turns)) => {
                let has_one = turns.iter().any(|turn| turn.role() == "system");
                ensure!(
                    system.is_none() || !has_one,
                    "--system is given, and the conversation has a system's turn too"
                );
                messages.extend(turns.iter().cloned());
            }
            _ => bail!("a line has either \"prompt\" or \"messages\""),
        }
        style.prompt(tokenizer, &messages)
    }
}

/// Reads a file of JSON lines.
///
/// # Errors
/// Names the file, and the line that is wrong.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Prompt>> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(number, line)| {
        let at = || format!("{}, line {}", path.display(), number + 1);
        let prompt: Prompt = serde_json::from_str(line).with_context(at)?;
        let either = prompt.prompt.is_some() != prompt.messages.is_some();
        ensure!(either, "{}: a line has either \"prompt\" or \"messages\"", at());
        Ok(prompt)
    });
    let prompts = prompts.collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!prompts.is_empty(), "{} has no prompts", path.display());
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::model::Model;
    use protocol::model::synthetic::{StoredAs, SyntheticLlama};

    use super::*;

    #[test]
    fn lines_are_prompts_or_conversations_and_wrong_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        let read_of = |text: &str| {
            fs::write(&file, text).unwrap();
            read(&file).map_err(|error| format!("{error:#}"))
        };
        let prompts =
            read_of("{\"prompt\": \"a\", \"id\": 7}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n")
                .unwrap();
        assert_eq!((prompts.len(), prompts[0].name(0)), (2, "prompt 1 (id 7)".to_owned()));
        assert!(read_of("").unwrap_err().contains("no prompts"));
        assert!(read_of("{\"prompt\": \"a\"}\n{\"text\": 1}").unwrap_err().contains("line 2: unknown field `text`"));
        assert!(read_of("{\"id\": 1}").unwrap_err().contains("line 1: a line has either"));

        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        SyntheticLlama::tiny(3).write_folder(&model, StoredAs::F32).unwrap();
        let tokenizer = Model::open(&model).unwrap().tokenizer().unwrap();
        let shown = |prompt: &Prompt, system: Option<&str>, raw: bool| {
            let tokens =
                prompt.tokens(&tokenizer, &ChatStyle::default(), system, raw).map_err(|error| format!("{error:#}"))?;
            Ok::<_, String>(tokenizer.decode(&tokens).unwrap())
        };
        let asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(shown(&prompts[0], None, false).unwrap(), asked);
        assert_eq!(shown(&prompts[1], None, false).unwrap(), asked);
        assert_eq!(shown(&prompts[1], Some("s"), false).unwrap(), format!("<|im_start|>system\ns<|im_end|>\n{asked}"));
        assert!(shown(&prompts[0], None, true).unwrap().ends_with('a'));
        assert!(shown(&prompts[1], None, true).unwrap_err().contains("--raw goes on with texts"));
        let with_system = read_of("{\"messages\": [{\"role\": \"system\", \"content\": \"a\"}]}").unwrap();
        assert!(shown(&with_system[0], Some("s"), false).unwrap_err().contains("system's turn too"));
    }
}
