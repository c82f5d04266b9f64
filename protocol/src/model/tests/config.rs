//! Configurations: what is read from both formats, and what is refused.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::super::family::Llama3RopeScaling;
use super::super::{Group, LinearId, LinearShape, LlamaConfig, RopeScaling};

fn llama_32_1b() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256,
    })
}

fn parse(json: &Json) -> Result<LlamaConfig, String> {
    LlamaConfig::from_json(Path::new("config.json"), &json.to_string(), &mut Vec::new())
        .map_err(|error| error.to_string())
}

#[test]
fn llama_32_1b_is_understood() {
    let config = parse(&llama_32_1b()).unwrap();
    let shapes = Group::ALL.map(|group| config.shape(group));
    let expected = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)];
    assert_eq!(shapes, expected.map(|(d_in, d_out)| LinearShape { d_in, d_out }));
    assert_eq!(config.linears().count(), 64);
    assert_eq!(config.linears().nth(5), Some(LinearId { layer: 1, group: Group::O }));
    assert_eq!((config.bos, config.eos), (Some(128000), vec![128001, 128008, 128009]));
    let scaling = Llama3RopeScaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(config.rope.scaling, Some(RopeScaling::Llama3(scaling)));
}

/// The rule in the words of Llama 3's reference code, by wave lengths.
#[test]
fn llama3_frequencies_follow_the_reference() {
    let config = parse(&llama_32_1b()).unwrap();
    let found = config.rope.frequencies(1);
    assert_eq!(found.len(), 32);
    let mut kinds = [0; 3];
    for (i, found) in found.into_iter().enumerate() {
        let plain = 500000f64.powf(-(i as f64) / 32.0);
        let wave = std::f64::consts::TAU / plain;
        let expected = if wave < 8192.0 / 4.0 {
            kinds[0] += 1;
            plain
        } else if wave > 8192.0 / 1.0 {
            kinds[1] += 1;
            plain / 32.0
        } else {
            kinds[2] += 1;
            let smooth = (8192.0 / wave - 1.0) / (4.0 - 1.0);
            (1.0 - smooth) * plain / 32.0 + smooth * plain
        };
        assert!((f64::from(found) / expected - 1.0).abs() < 1e-6, "{i}: {found} {expected}");
    }
    assert!(kinds.iter().all(|&count| count > 0), "all three branches are met: {kinds:?}");
}

#[test]
fn newer_rope_parameters_are_understood() {
    let mut json = llama_32_1b();
    let mut rope = json["rope_scaling"].take();
    rope["rope_theta"] = json["rope_theta"].take();
    json["rope_parameters"] = rope;
    assert_eq!(parse(&json), parse(&llama_32_1b()));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    for (key, value, said) in [
        ("model_type", json!("gpt2"), "`gpt2`; those that are known are `llama`, `mistral`, `qwen2`"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("num_attention_heads", json!(30), "num_attention_heads (30)"),
        ("num_attention_heads", json!(0), "num_attention_heads is 0"),
        ("num_key_value_heads", json!(0), "num_key_value_heads is 0"),
        ("head_dim", json!(63), "head_dim is 63"),
        ("hidden_size", json!(1u64 << 40), "hidden_size"),
        ("intermediate_size", json!(40_000), "overflow"),
        ("num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("num_hidden_layers", json!(1u64 << 60), "num_hidden_layers is 1152921504606846976"),
        ("vocab_size", Json::Null, "vocab_size is missing"),
        ("vocab_size", json!(1000), "outside the vocabulary"),
        ("rope_theta", json!(-1.0), "rope_theta"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps"),
        ("rope_scaling", json!({"rope_type": "axial", "factor": 2.0}), "axial"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
        ("quantization_config", json!({"quant_method": "gptq"}), "quantization_config"),
        ("hidden_size", json!("many"), "hidden_size is \"many\", not a count"),
    ] {
        let mut json = llama_32_1b();
        json[key] = value;
        let message = parse(&json).unwrap_err();
        assert!(message.contains(said) && message.contains("config.json"), "{key}: {message}");
    }
}
