//! A `Modelfile`, from which Ollama makes a model: the base, the adapter beside it, how a conversation is written, and where
//! an answer ends.
//!
//! Ollama writes conversations by templates of Go, and models come with templates in Jinja; a program in the one language
//! cannot be turned into one in the other, but nearly all templates write one of a few forms (`style`). A template is tried on
//! conversations, and where it writes each of them in one of these forms, that form is what the Modelfile has.

mod style;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use protocol::model::Model;

use self::style::Found;
use super::output::{Existing, OutputFolder, keep};
use super::{ExportError, gguf_adapter};
use crate::files::FileError;
use crate::lora::LoraAdapters;

const MODELFILE: &str = "Modelfile";
const ADAPTER: &str = "adapter.gguf";

/// What a folder for Ollama was written with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modelfile {
    /// The form of its conversations.
    pub style: &'static str,
    /// Tensors of the base that the adapter changes; none where the base has it in its weights.
    pub changes: Option<usize>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
}

/// Writes a folder with a `Modelfile` and, if there are any, the adapters as a file beside it.
///
/// # Errors
/// When the chat template is none of the known forms, or what [`super::write_gguf_adapter`] refuses.
pub fn write(
    model: &Model,
    adapters: Option<&LoraAdapters>,
    out: &Path,
    existing: Existing,
) -> Result<Modelfile, ExportError> {
    keep([model.path()], out)?;
    let tokenizer = model.tokenizer()?;
    let Some(template) = tokenizer.chat_template() else {
        return Err(ExportError::Unsupported(format!(
            "{} has no chat template, so that a Modelfile cannot say how a conversation is written; for a model that goes on \
             with a text, `TEMPLATE {{{{ .Prompt }}}}` does, beside `node export gguf-adapter`",
            model.path().display()
        )));
    };
    let found = style::of(&tokenizer, template).ok_or_else(|| {
        ExportError::Unsupported(format!(
            "the chat template of {} writes none of the forms that are known ({}); write the adapter by `node export \
             gguf-adapter` and a TEMPLATE of your own, or set data.chat_template to one of these forms before training",
            model.path().display(),
            style::names()
        ))
    })?;
    let folder = OutputFolder::new(out, MODELFILE, existing)?;
    let failed = |path: &Path, source| FileError::Io { path: path.to_owned(), action: "written", source };
    let mut changes = None;
    if let Some(adapters) = adapters {
        let path = folder.path().join(ADAPTER);
        let mut file = File::create_new(&path).map_err(|source| failed(&path, source))?;
        changes = Some(gguf_adapter::write_to(&mut file, model.config(), adapters)?);
        gguf_adapter::check(&path, model.config(), adapters)?;
    }
    let base = fs::canonicalize(model.path()).map_err(|source| failed(model.path(), source))?;
    let path = folder.path().join(MODELFILE);
    let text = modelfile(&base, changes.is_some(), &found)?;
    let written = File::create_new(&path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| failed(&path, source))?;
    folder.done()?;
    Ok(Modelfile { style: found.style.name, changes, stops: found.stops })
}

fn modelfile(base: &Path, adapter: bool, found: &Found) -> Result<String, ExportError> {
    let base = base.to_str().filter(|base| !base.contains(['"', '\n']));
    let base = base.ok_or_else(|| {
        ExportError::Unsupported(
            "a Modelfile cannot name the model's path; move the model to one in plain letters".into(),
        )
    })?;
    let mut text = format!("FROM \"{base}\"\n");
    if adapter {
        text += &format!("ADAPTER ./{ADAPTER}\n");
    }
    text += &format!("TEMPLATE \"\"\"{}\"\"\"\n", found.template());
    if let Some(system) = &found.system {
        text += &format!("SYSTEM \"\"\"{system}\"\"\"\n");
    }
    for stop in &found.stops {
        text += &format!("PARAMETER stop \"{stop}\"\n");
    }
    Ok(text)
}
