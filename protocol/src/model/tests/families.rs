//! Families: what is understood of published configurations, rotary positions against Hugging Face's, and GGUF files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use serde_json::{Value as Json, json};

use super::super::family::{Activation, Family, LayerSet, Rope, RopeScaling, Window};
use super::super::{Group, LlamaConfig, Norm};
use super::*;

/// Models and numbers that `tests/families.py` made with Hugging Face.
fn made() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/families")
}

fn read(json: &Json) -> Result<(LlamaConfig, Vec<String>), String> {
    let mut notes = Vec::new();
    let config = LlamaConfig::from_json(Path::new("config.json"), &json.to_string(), &mut notes);
    config.map(|config| (config, notes)).map_err(|error| error.to_string())
}

fn layers(these: impl IntoIterator<Item = usize>) -> LayerSet {
    LayerSet::These(these.into_iter().collect::<BTreeSet<_>>())
}

/// The tiny models of all families, with random weights of our own.
fn of_every_family() -> Vec<SyntheticLlama> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(made()).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        if let Ok(json) = std::fs::read_to_string(&path) {
            let mut config = LlamaConfig::from_json(&path, &json, &mut Vec::new()).unwrap();
            // Ours are of text alone.
            config.traits.of_larger = false;
            all.push(SyntheticLlama { config, seed: 3 });
        }
    }
    assert!(all.len() >= Family::ALL.len());
    all
}

#[test]
fn rotary_positions_are_those_of_hugging_face() {
    let statements: Vec<Json> =
        serde_json::from_str(&std::fs::read_to_string(made().join("rope.json")).unwrap()).unwrap();
    let mut noted = 0;
    for statement in statements {
        let (config, notes) = read(&statement["config"]).unwrap_or_else(|why| panic!("{statement}: {why}"));
        noted += notes.len();
        for (length, expected) in statement["texts"].as_object().unwrap() {
            let found = config.rope.frequencies(length.parse().unwrap());
            let frequencies = expected["frequencies"].as_array().unwrap();
            assert_eq!(found.len(), frequencies.len());
            for (found, expected) in found.iter().zip(frequencies) {
                let ratio = f64::from(*found) / expected.as_f64().unwrap();
                assert!((ratio - 1.0).abs() < 2e-6, "{} tokens, {ratio}: {}", length, statement["config"]);
            }
            let factor = config.rope.attention_factor() / expected["factor"].as_f64().unwrap();
            assert!((factor - 1.0).abs() < 1e-9, "{factor}: {}", statement["config"]);
        }
    }
    assert_eq!(noted, 4, "statements that contradict each other");
}

#[test]
fn texts_turn_otherwise_only_beyond_the_context_of_their_scaling() {
    let short = Rope::plain(1e4, 8);
    let dynamic = Rope { scaling: Some(RopeScaling::Dynamic { factor: 2.0, context: 100 }), ..short.clone() };
    assert_eq!(dynamic.one_for_up_to(), Some(100));
    assert_eq!(dynamic.frequencies(100), short.frequencies(1));
    assert!(dynamic.frequencies(101)[3] < short.frequencies(1)[3]);
    assert_eq!(short.one_for_up_to(), None);
}

/// Configurations in the words of the releases that people have, with what makes each family.
#[test]
fn published_configurations_are_understood() {
    let common = |model_type: &str, more: Json| {
        let mut json = json!({
            "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-6,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(&json).unwrap_or_else(|why| panic!("{model_type}: {why}"))
    };
    let plain = |model_type: &str, more: Json| {
        let (config, notes) = common(model_type, more);
        assert_eq!(notes, [""; 0], "{model_type}");
        config
    };

    let qwen = plain("qwen2", json!({"use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 5}));
    assert!(qwen.traits.biases.qkv && !qwen.traits.biases.o && qwen.traits.window.is_none());
    let qwen = plain("qwen2", json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 4}));
    assert_eq!(qwen.traits.window, Some(Window { keys: 9, layers: layers([4, 5]) }));
    let qwen = plain("qwen3", json!({"attention_bias": false}));
    assert_eq!((qwen.head_dim, qwen.norm_width(Norm::Key(0))), (128, 128));
    assert!(!qwen.traits.biases.qkv);

    let mistral = plain("mistral", json!({"sliding_window": null}));
    assert_eq!(mistral.traits.window, None);
    assert_eq!(plain("mistral", json!({})).window_of(5), Some(4096));

    let smollm = plain("smollm3", json!({"no_rope_layers": [1, 1, 1, 0, 1, 1], "use_sliding_window": false}));
    assert_eq!(smollm.traits.unrotated, layers([3]));
    assert!(smollm.rope_of(3).is_none() && smollm.rope_of(4) == Some(&Rope::plain(2e6, 16)));
    assert_eq!(plain("smollm3", json!({"no_rope_layer_interval": 2})).traits.unrotated, layers([1, 3, 5]));

    let olmo = plain("olmo2", json!({"num_key_value_heads": 4}));
    assert_eq!((olmo.norm_width(Norm::BeforeAttention(0)), olmo.norm_width(Norm::Query(0))), (0, 64));

    let phi = plain("phi3", json!({"sliding_window": 2047, "rope_scaling": null}));
    assert_eq!((phi.projections(Group::Qkv).len(), phi.window_of(0)), (1, Some(2047)));
    let phi = plain("phi3", json!({"partial_rotary_factor": 0.75, "tie_word_embeddings": true}));
    assert_eq!(phi.rope.features, 12);

    let gemma = plain(
        "gemma2",
        json!({
            "head_dim": 32, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 144, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        }),
    );
    assert_eq!((gemma.traits.activation, gemma.traits.embedding_scale), (Activation::GeluTanh, Some(8.0)));
    assert_eq!(
        (gemma.traits.score_cap, gemma.traits.logit_cap, gemma.score_scale()),
        (Some(50.0), Some(30.0), 1.0 / 12.0)
    );
    assert_eq!(gemma.traits.window, Some(Window { keys: 4096, layers: layers([0, 2, 4]) }));
    assert!(gemma.tie_word_embeddings);
    assert_eq!(plain("gemma2", json!({"final_logit_softcapping": null})).traits.logit_cap, None);

    let gemma = plain(
        "gemma3_text",
        json!({
            "head_dim": 32, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "attn_logit_softcapping": null, "final_logit_softcapping": null, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }),
    );
    assert_eq!(gemma.traits.window, Some(Window { keys: 512, layers: layers(0..5) }));
    assert_eq!(gemma.rope_of(0), Some(&Rope::plain(1e4, 32)));
    let linear = Some(RopeScaling::Linear { factor: 8.0 });
    assert_eq!(gemma.rope_of(5), Some(&Rope { theta: 1e6, features: 32, scaling: linear }));
    assert_eq!((gemma.traits.score_cap, gemma.norm_width(Norm::Query(1))), (None, 32));
    assert_eq!(plain("gemma3_text", json!({"sliding_window_pattern": 3})).window_of(2), None);

    // The published models with images leave out what transformers' class has.
    let json = json!({
        "model_type": "gemma3", "eos_token_id": [1, 106], "mm_tokens_per_image": 256, "image_token_index": 262144,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "tie_word_embeddings": false,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    });
    let (mut notes, text) = (Vec::new(), json.to_string());
    let gemma = LlamaConfig::from_json(Path::new("config.json"), &text, &mut notes).unwrap();
    assert_eq!((gemma.vocabulary, gemma.heads, gemma.kv_heads, gemma.head_dim), (262_208, 8, 4, 256));
    assert_eq!((gemma.family.model_type, gemma.hidden_size, gemma.layers), ("gemma3_text", 2560, 34));
    assert_eq!((gemma.eos.as_slice(), gemma.window_of(4), gemma.window_of(5)), (&[1, 106][..], Some(1024), None));
    assert_eq!(gemma.rope_of(5).unwrap().scaling, Some(RopeScaling::Linear { factor: 8.0 }));
    assert!(gemma.tie_word_embeddings && gemma.traits.of_larger);
    assert!(notes[0].contains("text_config.tie_word_embeddings is false"), "{notes:?}");

    let (_, notes) = common("llama", json!({"attention_dropout": 0.1}));
    assert!(notes[0].contains("attention_dropout is not applied"), "{notes:?}");
}

#[test]
fn what_a_family_has_not_is_refused() {
    for (model_type, more, said) in [
        ("qwen2_moe", json!({}), "`qwen2_moe`; those that are known are `llama`, `mistral`"),
        ("llava", json!({"text_config": {"hidden_size": 64}}), "`llava` takes more than text"),
        ("gemma3", json!({"vision_config": {}}), "text_config, which is missing"),
        ("gemma3", json!({"text_config": {"model_type": "llama"}}), "text_config.model_type is \"llama\""),
        ("qwen2", json!({"mlp_bias": true}), "mlp_bias is true, but models of the family `qwen2`"),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
            "turns whole heads",
        ),
        ("qwen3", json!({"layer_types": ["full_attention"]}), "layer_types speaks of 1 layers; there are 2"),
        ("qwen3", json!({"layer_types": ["full_attention", "chunked_attention"]}), "chunked_attention"),
        ("qwen3", json!({"layer_types": ["full_attention", "sliding_attention"]}), "no sliding_window"),
        ("gemma2", json!({"sliding_window": 0}), "sliding_window is 0"),
        ("gemma2", json!({"attn_logit_softcapping": -1.0}), "attn_logit_softcapping is -1"),
        ("gemma3_text", json!({"use_bidirectional_attention": true}), "only causal attention"),
        ("smollm3", json!({"no_rope_layers": [1]}), "no_rope_layers speaks of 1 layers"),
        (
            "phi3",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            "short_factor",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 40.0}}),
            "impossible values",
        ),
        ("llama", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}), "must be at least 1"),
        ("llama", json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "`bitsandbytes`"),
    ] {
        let mut json = json!({
            "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let message = read(&json).unwrap_err();
        assert!(message.contains(said) && message.contains("config.json"), "{json}: {message}");
    }
}

/// llama.cpp's own names, as its tables have them, independent of ours.
#[test]
fn a_gguf_file_of_each_family_holds_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for synthetic in of_every_family() {
        let family = synthetic.config.family;
        if family.model_type == "mistral" {
            // llama.cpp writes it as a Llama without windows.
            continue;
        }
        let (_folder, from_folder) = super::folder(&synthetic, StoredAs::F32);
        synthetic.write_gguf(&path, GgmlDType::F32).unwrap();
        let from_gguf = Model::open(&path).unwrap_or_else(|error| panic!("{}: {error}", family.model_type));
        assert_eq!(from_gguf.notes(), [""; 0], "{}", family.model_type);
        let (a, b) = (from_folder.config(), from_gguf.config());
        assert_eq!((a.family, a.rope.features, a.traits.biases), (b.family, b.rope.features, b.traits.biases));
        assert_eq!((a.traits.embedding_scale, a.traits.activation), (b.traits.embedding_scale, b.traits.activation));
        assert_eq!(a.tie_word_embeddings, b.tie_word_embeddings);
        for layer in 0..a.layers {
            for group in Group::ALL {
                let id = crate::ids::LinearId { layer: layer as u16, group };
                assert!(from_folder.linear(id).unwrap() == from_gguf.linear(id).unwrap(), "{id}");
                assert!(from_folder.bias(layer, group).unwrap() == from_gguf.bias(layer, group).unwrap(), "{id}");
            }
            for norm in family.layer_norms(layer) {
                let (a, b) = (from_folder.norm(norm).unwrap(), from_gguf.norm(norm).unwrap());
                assert!(a.is_some() && a == b, "{norm:?} of {}", family.model_type);
            }
        }
        assert!(from_folder.head().unwrap() == from_gguf.head().unwrap());
    }
}

#[test]
fn a_synthetic_folder_says_what_its_configuration_says() {
    for mut synthetic in of_every_family() {
        (synthetic.config.bos, synthetic.config.eos) = (Some(1), vec![2]);
        let (_folder, model) = super::folder(&synthetic, StoredAs::Bf16);
        assert_eq!(model.config(), &synthetic.config, "{}", synthetic.config.family.model_type);
        assert_eq!(model.notes(), [""; 0]);
    }
}

#[test]
fn names_of_tensors_are_llama_cpps() {
    let named = |model_type: &str, name: &str| {
        super::super::family::gguf_name(Family::of_model_type(model_type).unwrap(), name).map(|(name, _)| name)
    };
    for (model_type, name, expected) in [
        ("llama", "model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("gemma2", "model.layers.3.post_attention_layernorm.weight", "blk.3.post_attention_norm.weight"),
        ("gemma2", "model.layers.3.pre_feedforward_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("gemma3_text", "model.layers.0.post_feedforward_layernorm.weight", "blk.0.post_ffw_norm.weight"),
        ("gemma3_text", "model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("olmo2", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", "blk.1.attn_qkv.weight"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight"),
    ] {
        assert_eq!(named(model_type, name).as_deref(), Some(expected), "{model_type}");
    }
    assert_eq!(named("olmo2", "model.layers.0.input_layernorm.weight"), None);
}
