//! The run's own file of what enters the lowest adapted layer ([`actors::prefix`]): whether there is one, how large it may
//! grow, and when it goes.
//!
//! It lies with the results, as private as the checkpoints beside it. A run that is interrupted finds it again; one that is
//! over removes it, unless it is told to keep it for the next run over the same texts in the same folder.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actors::data::Dataset;
use actors::prefix::{PrefixCache, PrefixIdentity, StateFormat};
use actors::transformer::Prefix;
use anyhow::Context as _;
use indicatif::HumanBytes;
use protocol::model::LlamaConfig;

use super::progress::Progress;
use super::start::Start;
use crate::config::{BackendChoice, Config, PrefixChoice};
use crate::disk;

/// Name of the file in the folder for the results.
const PREFIX: &str = "prefix.states";

/// What a run has that such a file depends on.
pub(super) struct Texts<'a> {
    pub(super) model: &'a LlamaConfig,
    pub(super) digest: String,
    pub(super) training: &'a Dataset,
    pub(super) held_out: &'a Dataset,
}

/// What is worth keeping, by the settings.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    layer: usize,
    format: StateFormat,
    /// Whether texts are trained on more than once.
    training: bool,
    /// Bytes of all states, the file's own aside.
    bytes: u64,
}

impl Plan {
    /// `None` where nothing would be read twice: every layer is adapted, or no text comes again.
    fn of(config: &Config, texts: &Texts<'_>) -> anyhow::Result<Option<Self>> {
        let format = match config.owner.prefix_cache {
            PrefixChoice::Off => return Ok(None),
            PrefixChoice::F32 => StateFormat::F32,
            PrefixChoice::Bf16 => StateFormat::Bf16,
        };
        let layer = config.training.lora.lowest_layer(texts.model)?;
        let taken = config.training.steps().saturating_mul(config.training.batch());
        // DPO's reference reads every text before it is trained on. What is blurred is another text each time.
        let again = taken > texts.training.units() || config.training.preference().is_some_and(|p| p.needs_reference());
        let training = again && config.training.neftune_noise_alpha == 0.0;
        let evaluated = match config.training.eval_batches {
            0 => usize::MAX,
            most => most.saturating_mul(config.training.micro_batch * texts.held_out.unit()),
        };
        let tokens = |data: &Dataset, most| -> usize { data.lengths().take(most).sum() };
        let tokens = tokens(texts.held_out, evaluated) + tokens(texts.training, if training { usize::MAX } else { 0 });
        let bytes = (tokens * texts.model.hidden_size * format.bytes()) as u64;
        Ok((layer > 0 && tokens > 0).then_some(Self { layer, format, training, bytes }))
    }
}

/// Opens the run's file, if it is worth having one; a run without one is as right, and slower.
///
/// # Errors
/// When an earlier one that is of no use any more cannot be removed.
pub(super) fn open(
    config: &Config,
    start: &Start,
    texts: &Texts<'_>,
    progress: &Progress,
) -> anyhow::Result<Option<Prefix>> {
    let path = path(&config.owner.out);
    let plan = Plan::of(config, texts)?;
    if !config.owner.keep_prefix_cache && (plan.is_none() || *start == Start::Overwrite) {
        remove(config)?;
    }
    let Some(Plan { layer, format, training, bytes }) = plan else { return Ok(None) };
    let products = match config.owner.backend {
        BackendChoice::Plain => "plain".to_owned(),
        BackendChoice::Encrypted => format!("encrypted {}", serde_json::to_string(&config.encryption)?),
    };
    let identity = PrefixIdentity { model: texts.digest.clone(), layer, products, format };
    let opened = || {
        let held = fs::metadata(&path).map_or(0, |file| file.len());
        let free = disk::free_bytes(&config.owner.out)?;
        let limit = (config.owner.prefix_cache_mib << 20).min((free + held) / 2);
        Ok::<_, std::io::Error>((PrefixCache::open(&path, &identity, limit)?, limit))
    };
    match opened() {
        Ok((cache, limit)) => {
            let below = if layer == 1 { "layer 0 is".to_owned() } else { format!("layers 0 to {} are", layer - 1) };
            let found = match cache.texts() {
                0 => String::new(),
                found => format!(", {found} of which are there"),
            };
            progress.note(&format!(
                "{below} computed once a text{found}: what leaves them takes up to {} in {}",
                HumanBytes(bytes.min(limit)),
                path.display()
            ));
            if bytes > limit {
                progress.note(&format!(
                    "that is {} for all texts: those that have no room are computed each time (owner.prefix_cache_mib, and \
                     at most half of what is free on the disk)",
                    HumanBytes(bytes)
                ));
            }
            Ok(Some(Prefix { cache: Arc::new(cache), training }))
        }
        Err(error) => {
            tracing::warn!("the lower layers are computed each time, since {} cannot be used: {error}", path.display());
            Ok(None)
        }
    }
}

/// Removes the file of a run that is over, unless it is to be kept.
///
/// # Errors
/// When it cannot be removed.
pub(super) fn close(config: &Config) -> anyhow::Result<()> {
    if config.owner.keep_prefix_cache { Ok(()) } else { remove(config) }
}

fn remove(config: &Config) -> anyhow::Result<()> {
    let path = path(&config.owner.out);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed, and holds what tells your texts", path.display()))
        }
        _ => Ok(()),
    }
}

fn path(out: &Path) -> PathBuf {
    out.join(PREFIX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use actors::data::Example;
    use actors::lora::Layers;
    use protocol::model::synthetic::KnownModel;

    use super::*;

    #[test]
    fn only_what_is_read_again_is_kept() {
        let example = |length: usize| Example { tokens: vec![1; length], learnt: vec![true; length] };
        let data =
            |lengths: &[usize]| Dataset::from_examples(lengths.iter().map(|&length| example(length)).collect(), 0);
        let (training, held_out) = (data(&[10, 20, 30, 40, 50]), data(&[7, 8, 9]));
        let model = KnownModel::Llama32_1b.config();
        let texts = Texts { model: &model, digest: "m".into(), training: &training, held_out: &held_out };
        let mut config = Config::default();
        (config.training.micro_batch, config.training.accumulation) = (1, 1);
        let plan = |config: &Config| Plan::of(config, &texts).unwrap();
        assert_eq!(plan(&config), None, "all layers are adapted");
        config.training.lora.layers = Layers::Top(4);
        config.training.steps = Some(5);
        let width = model.hidden_size as u64 * 4;
        let (layer, format) = (model.layers - 4, StateFormat::F32);
        assert_eq!(plan(&config), Some(Plan { layer, format, training: false, bytes: 24 * width }));
        config.training.steps = Some(6);
        config.training.eval_batches = 2;
        assert_eq!(plan(&config), Some(Plan { layer, format, training: true, bytes: (150 + 15) * width }));
        config.owner.prefix_cache = PrefixChoice::Bf16;
        assert_eq!(plan(&config).unwrap().bytes, (150 + 15) * width / 2);
        config.owner.prefix_cache = PrefixChoice::Off;
        assert_eq!(plan(&config), None);
        config.owner.prefix_cache = PrefixChoice::F32;
        config.training.lora.layers = Layers::These([0, 9].into());
        assert_eq!(plan(&config), None, "there is no layer below");
    }
}
