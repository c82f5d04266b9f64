#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;
use crate::lora::{Layers, LoraConfig};
use crate::testing::{TinyModel, nudge};

fn trained(model: &LlamaConfig, config: &LoraConfig) -> LoraAdapters {
    let adapters = LoraAdapters::new(model, config, 1).unwrap();
    for (i, var) in adapters.parameters().iter().enumerate() {
        nudge(var, i as u64, 0.5);
    }
    adapters
}

fn values(adapters: &LoraAdapters) -> Vec<Vec<f32>> {
    adapters.parameters().iter().map(|var| var.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

fn edit_config(folder: &Path, field: &str, value: serde_json::Value) {
    let path = folder.join(CONFIG);
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

#[test]
fn comes_back_as_it_was_and_over_an_older_one() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let target_modules = vec![Projection::V, Projection::Q, Projection::Up, Projection::Down];
    for (rank, alpha) in [(3, 7.5), (4, 16.0)] {
        let target_modules = target_modules.clone();
        let config = LoraConfig { rank, alpha, dropout: 0.25, target_modules, ..LoraConfig::default() };
        let adapters = trained(tiny.config(), &config);
        save(&folder.path().join("adapter"), &adapters, "some/base").unwrap();
        let read = load(&folder.path().join("adapter"), tiny.config()).unwrap();
        assert_eq!(read.config(), &config);
        assert_eq!(values(&read), values(&adapters));
    }
    let mut files: Vec<_> =
        std::fs::read_dir(folder.path().join("adapter")).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, [CONFIG, WEIGHTS], "something was left behind");
}

#[test]
fn files_are_what_peft_reads() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let config = LoraConfig { rank: 2, alpha: 16.0, ..LoraConfig::default() };
    save(folder.path(), &trained(tiny.config(), &config), "some/base").unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(json["peft_type"], "LORA");
    assert_eq!(json["task_type"], "CAUSAL_LM");
    assert_eq!(json["r"], 2);
    assert_eq!(json["lora_alpha"], 16);
    assert_eq!(json["base_model_name_or_path"], "some/base");
    let modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(json["target_modules"], serde_json::json!(modules));

    let bytes = std::fs::read(folder.path().join(WEIGHTS)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 2 * 7 * 2);
    let shape =
        |name: &str| file.tensor(&format!("base_model.model.model.layers.1.{name}.weight")).unwrap().shape().to_vec();
    assert_eq!(shape("self_attn.k_proj.lora_A"), [2, 64]);
    assert_eq!(shape("self_attn.k_proj.lora_B"), [32, 2]);
    assert_eq!(shape("mlp.down_proj.lora_A"), [2, 96]);
    assert_eq!(shape("mlp.gate_proj.lora_B"), [96, 2]);
}

#[test]
fn ranks_and_factors_of_their_own_come_back() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let config: LoraConfig = serde_json::from_str(
        r#"{"rank": 3, "alpha": 6.5, "use_rslora": true, "modules_to_save": ["input_layernorm", "model.norm"], "init_lora_weights": "gaussian",
            "trainable_token_indices": [40, 3, 17],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 1}, "alpha_pattern": {"mlp.up_proj": 4.0}}"#,
    )
    .unwrap();
    let adapters = trained(tiny.config(), &config);
    save(folder.path(), &adapters, "base").unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(json["rank_pattern"], serde_json::json!({"layers.0.self_attn.q_proj": 5, "down_proj": 1}));
    assert_eq!(json["modules_to_save"], serde_json::json!(["input_layernorm", "model.norm"]));
    let bytes = std::fs::read(folder.path().join(WEIGHTS)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for norm in ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"] {
        assert_eq!(file.tensor(&format!("base_model.model.{norm}.weight")).unwrap().shape(), [64]);
    }
    assert_eq!(json["trainable_token_indices"], serde_json::json!([40, 3, 17]));
    assert_eq!(file.tensor(&named(false, TOKENS)).unwrap().shape(), [3, 64]);
    assert_eq!((&json["use_rslora"], &json["alpha_pattern"]["mlp.up_proj"]), (&true.into(), &4.0.into()));
    let read = load(folder.path(), tiny.config()).unwrap();
    assert_eq!(read.config(), &config);
    assert_eq!(values(&read), values(&adapters));
    // By the module's name, as PEFT takes them, too.
    edit_config(folder.path(), "trainable_token_indices", serde_json::json!({"embed_tokens": [40, 3, 17]}));
    assert_eq!(load(folder.path(), tiny.config()).unwrap().config(), &config);
}

#[test]
fn adapters_of_some_layers_say_so_as_peft_does_and_come_back() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let config = LoraConfig { rank: 2, layers: Layers::Top(1), ..LoraConfig::default() };
    let adapters = trained(tiny.config(), &config);
    assert_eq!(adapters.values(), config.values(tiny.config()).unwrap());
    save(folder.path(), &adapters, "base").unwrap();
    let path = folder.path().join(CONFIG);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((&json["layers_to_transform"], &json["layers_pattern"]), (&serde_json::json!([1]), &"layers".into()));
    let bytes = std::fs::read(folder.path().join(WEIGHTS)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 7 * 2);
    assert!(file.names().iter().all(|name| name.contains(".layers.1.")));
    // PEFT takes one number for a list of one, and any list of layers where none is named.
    for (layers, pattern) in
        [(serde_json::json!([1]), serde_json::json!("layers")), (1.into(), serde_json::json!(null))]
    {
        edit_config(folder.path(), "layers_to_transform", layers);
        edit_config(folder.path(), "layers_pattern", pattern);
        let read = load(folder.path(), tiny.config()).unwrap();
        assert_eq!(read.config().layers, Layers::These([1].into()));
        assert_eq!(values(&read), values(&adapters));
    }
}

#[test]
fn a_pair_is_the_projection_it_is_named_after() {
    // With A of ones and B of ones on v_proj only, the loss must equal that of adapters which never had others.
    let tiny = TinyModel::new();
    let (llama, folder) = (tiny.llama(), tempfile::tempdir().unwrap());
    let batch = crate::data::MicroBatch::new([(&[1, 2, 3, 4, 5, 6][..], (2..8).collect())], 0, 1);
    let one = LoraConfig { rank: 2, target_modules: vec![Projection::V], ..LoraConfig::default() };
    let alone = trained(tiny.config(), &one);
    save(folder.path(), &alone, "base").unwrap();
    let bytes = std::fs::read(folder.path().join(WEIGHTS)).unwrap();
    let pairs = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let all = LoraAdapters::new(tiny.config(), &LoraConfig { rank: 2, ..LoraConfig::default() }, 9).unwrap();
    all.replace(|layer, &Slot { projection, .. }| {
        let shape = projection.shape(tiny.config());
        let found = |side| pairs.get(&key(false, layer, projection, side)).cloned();
        let zero = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
        let a = found("A").unwrap_or_else(|| zero(2, shape.d_in));
        Ok::<_, AdapterError>((a, found("B").unwrap_or_else(|| zero(shape.d_out, 2))))
    })
    .unwrap();
    let expected = llama.evaluate(&batch, Some(&alone)).unwrap();
    assert!((llama.evaluate(&batch, Some(&all)).unwrap() - expected).abs() < 1e-4);
    assert!((llama.evaluate(&batch, None).unwrap() - expected).abs() > 1e-3);
}

#[test]
fn what_cannot_be_used_is_named() {
    let tiny = TinyModel::new();
    let folder = tempfile::tempdir().unwrap();
    let error = |folder: &Path| load(folder, tiny.config()).err().map(|error| error.to_string()).unwrap();
    assert!(error(folder.path()).contains(CONFIG));
    let write = || save(folder.path(), &trained(tiny.config(), &LoraConfig::default()), "base").unwrap();

    for (field, value, message) in [
        ("init_lora_weights", serde_json::json!("pissa"), "workers serve those as they were published"),
        ("modules_to_save", serde_json::json!(["lm_head"]), "workers serve the head"),
        ("modules_to_save", serde_json::json!(["model.norm"]), "model.norm.weight is missing"),
        ("trainable_token_indices", serde_json::json!([1]), "trainable_tokens_delta is missing"),
        ("trainable_token_indices", serde_json::json!([1, 1]), "token 1 twice"),
        ("trainable_token_indices", serde_json::json!([70_000]), "the model's vocabulary ends with"),
        ("trainable_token_indices", serde_json::json!({"embed_tokens": [1], "lm_head": [2]}), "names `lm_head`"),
        ("use_qalora", serde_json::json!(true), "use_qalora"),
        ("rank_pattern", serde_json::json!({"w1": 3}), "names no adapted projection"),
        ("use_dora", serde_json::json!(true), "use_dora"),
        ("peft_type", serde_json::json!("IA3"), "peft_type"),
        ("r", serde_json::json!(0), "lora.rank"),
        ("r", serde_json::json!(4), "not [4, 64]"),
        ("target_modules", serde_json::json!(["embed_tokens"]), "embed_tokens"),
        ("target_modules", serde_json::json!(["q_proj"]), "belongs to no adapter"),
        ("layers_to_transform", serde_json::json!([1]), "belongs to no adapter"),
        ("layers_to_transform", serde_json::json!([1, 2]), "names layer 2, and the model's 2 layers"),
        ("layers_pattern", serde_json::json!(["layers", "h"]), "layers_pattern"),
    ] {
        write();
        edit_config(folder.path(), field, value);
        let error = error(folder.path());
        assert!(error.contains(message), "{field}: {error}");
    }

    write();
    let weights = folder.path().join(WEIGHTS);
    let bytes = std::fs::read(&weights).unwrap();
    for cut in [0, 7, 100, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..cut]).unwrap();
        assert!(error(folder.path()).contains("safetensors"));
    }
    let mut spoiled = bytes.clone();
    let end = spoiled.len();
    spoiled[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&weights, &spoiled).unwrap();
    assert!(error(folder.path()).contains("not finite"));
}
