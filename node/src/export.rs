//! `node export`: a trained adapter in the formats of other tools.

use std::path::PathBuf;

use actors::adapter;
use actors::export::{Existing, Merged, write_gguf, write_gguf_adapter, write_merged, write_ollama};
use actors::lora::LoraAdapters;
use protocol::model::{GgufNumbers, Model};

use crate::output;

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The model that the adapter was trained on.
    pub model: PathBuf,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// What is written.
    pub out: PathBuf,
    /// Whether what is there already may be replaced.
    pub existing: Existing,
}

impl ExportOptions {
    fn open(&self) -> anyhow::Result<(Model, LoraAdapters)> {
        let model = Model::open(&self.model)?;
        let adapters = adapter::load(&self.adapter, model.config())?;
        Ok((model, adapters))
    }

    fn tell(&self, merged: &Merged) {
        let (name, lost) = &merged.worst;
        output::print(format_args!(
            "{}: {} tensors merged, read again and found right; rounding takes most, beside what the adapter adds, from \
             {name}: {:.2} %",
            self.out.display(),
            merged.changed,
            100.0 * lost
        ));
    }
}

/// Writes a Hugging Face folder with the adapter merged into the weights.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a merge that is not what it should be.
pub fn merged(options: &ExportOptions) -> anyhow::Result<()> {
    let (model, adapters) = options.open()?;
    options.tell(&write_merged(&model, &adapters, &options.out, options.existing)?);
    Ok(())
}

/// Writes a GGUF file with the adapter merged into the weights.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a merge that is not what it should be.
pub fn gguf(options: &ExportOptions, numbers: GgufNumbers) -> anyhow::Result<()> {
    let (model, adapters) = options.open()?;
    options.tell(&write_gguf(&model, &adapters, numbers, &options.out, options.existing)?);
    Ok(())
}

/// Writes an adapter as llama.cpp reads it.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a file that does not say what it should.
pub fn gguf_adapter(options: &ExportOptions) -> anyhow::Result<()> {
    let (model, adapters) = options.open()?;
    let tensors = write_gguf_adapter(&model, &adapters, &options.out, options.existing)?;
    output::print(format_args!(
        "{}: changes {tensors} tensors of {}, read again and found right",
        options.out.display(),
        model.config().family.gguf_architecture()
    ));
    Ok(())
}

/// Writes a folder that Ollama makes a model of.
///
/// # Errors
/// Whatever is wrong with model or adapter, and a chat template that Ollama has no form of.
pub fn ollama(
    model: &std::path::Path,
    adapter: Option<&std::path::Path>,
    out: &std::path::Path,
    existing: Existing,
) -> anyhow::Result<()> {
    let model = Model::open(model)?;
    let adapters = adapter.map(|folder| adapter::load(folder, model.config())).transpose()?;
    let written = write_ollama(&model, adapters.as_ref(), out, existing)?;
    let changes = match written.changes {
        Some(tensors) => format!("an adapter that changes {tensors} tensors"),
        None => "no adapter".to_owned(),
    };
    output::print(format_args!(
        "{}: {changes}, conversations in the form of {}; `ollama create NAME -f {}` makes a model of it",
        out.display(),
        written.style,
        out.join("Modelfile").display()
    ));
    Ok(())
}
