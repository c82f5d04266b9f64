//! The adapter that a run begins with, in place of a new one.
//!
//! It says what it looks like itself. What the configuration file says of that beside it must be the same: a setting that is
//! written and would not be followed is refused. How it learns from now on is the configuration's alone.

use std::path::Path;

use actors::adapter;
use actors::lora::{LoraAdapters, LoraConfig};
use anyhow::{Context as _, ensure};
use protocol::model::LlamaConfig;
use serde_json::Value;

use crate::config::Config;

/// Settings of `[training.lora]` that say how adapters learn, and not what they are.
const LEARNING: [&str; 2] = ["dropout", "lora_plus_ratio"];
/// What only new adapters have.
const BEGINNING: &str = "init_lora_weights";

/// Reads the adapter of a configuration, and makes the configuration say what it is; `None` without one.
///
/// # Errors
/// When it cannot be read, is of another model, or the configuration file says something else of it.
pub(super) fn read(config: &mut Config, model: &LlamaConfig) -> anyhow::Result<Option<LoraAdapters>> {
    let Some(folder) = config.owner.adapter.clone() else { return Ok(None) };
    let found = adapter::load(&folder, model).with_context(|| format!("the adapter {}", folder.display()))?;
    config.training.lora = continued(config, found.config(), &folder, model)?;
    Ok(Some(found))
}

/// The settings of a run that goes on with an adapter of these.
fn continued(config: &Config, found: &LoraConfig, folder: &Path, model: &LlamaConfig) -> anyhow::Result<LoraConfig> {
    let wanted = &config.training.lora;
    let given = |field: &str| config.lora_given.contains(field);
    let (says, is) = (serde_json::to_value(wanted)?, serde_json::to_value(found)?);
    let same = |field: &str| match field {
        // Several lists and ranges name the same layers, and any order the same projections.
        "layers" => wanted.layers.of(model.layers).ok() == found.layers.of(model.layers).ok(),
        "target_modules" => {
            let sorted = |lora: &LoraConfig| {
                let mut modules = lora.target_modules.clone();
                modules.sort();
                modules
            };
            sorted(wanted) == sorted(found)
        }
        field => says.get(field) == is.get(field),
    };
    let shown = |value: Option<&Value>| value.map_or("\"all\"".to_owned(), Value::to_string);
    let contradictions: Vec<String> = config
        .lora_given
        .iter()
        .map(String::as_str)
        .filter(|&field| !LEARNING.contains(&field) && field != BEGINNING && !same(field))
        .map(|field| {
            format!(
                "\n  training.lora.{field} is {}, and the adapter's is {}",
                shown(says.get(field)),
                shown(is.get(field))
            )
        })
        .collect();
    ensure!(
        contradictions.is_empty(),
        "the configuration contradicts the adapter {}:{}\nLeave out what the adapter says itself",
        folder.display(),
        contradictions.concat()
    );
    Ok(LoraConfig {
        dropout: if given("dropout") { wanted.dropout } else { found.dropout },
        lora_plus_ratio: wanted.lora_plus_ratio,
        ..found.clone()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use actors::lora::Layers;
    use protocol::model::Model;
    use protocol::model::synthetic::{StoredAs, SyntheticLlama};

    use super::*;

    #[test]
    fn what_is_written_must_be_what_the_adapter_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        fs::create_dir(&path).unwrap();
        SyntheticLlama::tiny(3).write_folder(&path, StoredAs::F32).unwrap();
        let model = Model::open(&path).unwrap();
        let lora = LoraConfig { rank: 3, dropout: 0.25, layers: Layers::Top(1), ..LoraConfig::default() };
        let adapters = LoraAdapters::new(model.config(), &lora, 1).unwrap();
        let earlier = folder.path().join("adapter");
        adapter::save(&earlier, &adapters, "base").unwrap();
        let read_with = |text: &str| {
            let file = folder.path().join("velum.toml");
            fs::write(&file, text).unwrap();
            let mut config = Config::read(&file).unwrap();
            config.owner.adapter = Some(earlier.clone());
            let found = read(&mut config, model.config()).map_err(|error| format!("{error:#}"))?;
            Ok::<_, String>((found.unwrap(), config.training.lora))
        };
        let (found, lora) = read_with("").unwrap();
        assert_eq!((found.values(), lora.rank, lora.dropout), (adapters.values(), 3, 0.25));
        let same = "[training.lora]\nrank = 3\ndropout = 0.5\nlora_plus_ratio = 4.0\nlayers = [1]\n\
                    target_modules = ['v_proj', 'q_proj', 'k_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']";
        let (_, lora) = read_with(same).unwrap();
        assert_eq!((lora.rank, lora.dropout, lora.lora_plus_ratio), (3, 0.5, 4.0));
        let error = read_with("[training.lora]\nrank = 8\nlayers = 'all'\nuse_rslora = true").err().unwrap();
        for said in ["training.lora.rank is 8, and the adapter's is 3", "layers is \"all\"", "use_rslora is true"] {
            assert!(error.contains(said), "{error}");
        }
        let mut config = Config { lora_given: ["rank".into()].into(), ..Config::default() };
        assert!(read(&mut config, model.config()).unwrap().is_none());
        config.owner.adapter = Some(folder.path().join("missing"));
        let error = format!("{:#}", read(&mut config, model.config()).err().unwrap());
        assert!(error.contains("missing/adapter_config.json"), "{error}");
    }
}
