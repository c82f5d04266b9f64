//! What lies in a model's files beside what its configuration asks for: a head of its own where the embeddings should be
//! the head, biases that nobody adds, tensors that nobody uses. Each is settled as Hugging Face settles it, and said.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use super::weights::{self, Weights};
use super::{EMBEDDINGS, HEAD, LlamaConfig, ModelError, Projection, expected};

/// What old checkpoints carry along although it follows from their configuration.
const KNOWN: [&str; 2] = ["rotary_emb.inv_freq", "attn.masked_bias"];

/// Parts of a model that takes images beside the one for its text.
const IMAGES: [&str; 2] = ["vision_tower.", "multi_modal_projector."];

/// Where a configuration ties the head to the embeddings: unties it if the checkpoint has one that differs from them, and
/// takes it for both if it has nothing else.
pub(super) fn settle_head(
    config: &mut LlamaConfig,
    weights: &mut Weights,
    notes: &mut Vec<String>,
) -> Result<(), ModelError> {
    if !config.tie_word_embeddings || !weights.has(HEAD) {
        return Ok(());
    }
    if !weights.has(EMBEDDINGS) {
        notes.push(format!(
            "`{EMBEDDINGS}` is missing, and tie_word_embeddings is true: `{HEAD}` is both, as with Hugging Face"
        ));
        weights.also_call(HEAD, EMBEDDINGS);
        return Ok(());
    }
    let (head, embeddings) = (weights.tensor(HEAD)?, weights.tensor(EMBEDDINGS)?);
    if head.format != embeddings.format || head.bytes != embeddings.bytes {
        config.tie_word_embeddings = false;
        notes.push(format!(
            "{}: tie_word_embeddings is true, but `{HEAD}` is there and differs from `{EMBEDDINGS}`: it is the head, as with \
             Hugging Face",
            head.file.path.display()
        ));
    }
    head.release();
    embeddings.release();
    Ok(())
}

/// Names what nobody asked for in one line, and what is for images in another.
///
/// # Errors
/// When there is a bias among it that is not zero: the model was trained with it.
pub(super) fn others(config: &LlamaConfig, weights: &Weights) -> Result<Vec<String>, ModelError> {
    let expected = expected(config);
    let asked: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let mut others = weights.others(&asked);
    others.retain(|(name, _)| name != HEAD && !KNOWN.iter().any(|known| name.contains(known)));
    for (name, path) in &others {
        let of_projection = name.rsplit_once('.').filter(|(_, part)| *part == "bias").is_some_and(|(of, _)| {
            name.starts_with("model.layers.")
                && Projection::ALL.iter().any(|projection| of.ends_with(projection.name()))
        });
        if of_projection && weights.tensor(name)?.to_f32()?.iter().any(|&value| value != 0.0) {
            let setting = if name.contains(".mlp.") { "mlp_bias" } else { "attention_bias" };
            let remedy = match config.family.has_setting(setting) {
                true => format!("set \"{setting}\": true in config.json, or take the tensor out"),
                false => {
                    format!("models of the family `{}` have none: is model_type right?", config.family.model_type)
                }
            };
            return Err(ModelError::Bias { path: path.clone(), name: name.clone(), remedy });
        }
    }
    let mut notes = Vec::new();
    if config.traits.of_larger {
        let count = others.len();
        let of_images = |name: &str| IMAGES.iter().any(|part| name.trim_start_matches("model.").starts_with(part));
        others.retain(|(name, _)| !of_images(name));
        notes.push(format!(
            "config.json: the model takes more than text; its text model (text_config) is used, and what is for images \
             ({} tensors of {}) is left out",
            count - others.len(),
            IMAGES.map(|part| part.trim_end_matches('.')).join(" and ")
        ));
    }
    let Some((name, path)) = others.first() else { return Ok(notes) };
    let more = match others.len() {
        1 => String::new(),
        count => format!(" and {} other tensors", count - 1),
    };
    notes.push(format!("{}: `{name}`{more} belong to nothing in the configuration and are not used", path.display()));
    Ok(notes)
}

/// Says what a folder has in place of a `tokenizer.json`, if that is missing or only a pointer to one.
///
/// # Errors
/// Names the file and what to do.
pub(super) fn check_tokenizer(folder: &Path) -> Result<(), ModelError> {
    let (path, other) = (folder.join("tokenizer.json"), folder.join("tokenizer.model"));
    if !path.exists() && other.exists() {
        let what = "it is the only tokenizer in the folder, in the format of SentencePiece, which is not read; fetch the \
                    model's tokenizer.json, or write one by AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of \
                    Hugging Face's transformers";
        return Err(ModelError::tokenizer(&other, what));
    }
    let mut start = [0; 64];
    match std::fs::File::open(&path).and_then(|mut file| file.read(&mut start)) {
        Ok(read) if weights::is_lfs_pointer(&start[..read]) => Err(ModelError::LfsPointer { path }),
        // Whoever reads it says why it cannot be read.
        _ => Ok(()),
    }
}
