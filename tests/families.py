#!/usr/bin/env python3
"""Makes the tiny models of tests/families and what Hugging Face computes with them.

Run by hand where a family is added or changed, since it needs packages that the build does not:

    python3 -m venv venv && venv/bin/pip install torch transformers peft
    venv/bin/python tests/families.py [NAME...]

Each folder gets a model of random numbers (config.json, model.safetensors in bf16), an adapter as PEFT saves it
(adapter/), and expected.safetensors: the tokens of two sequences, their logits, the sum of the cross entropies of all
next tokens, and its gradient for every matrix of the adapter, by PEFT's names. Some have the same for an adapter that trains
embeddings of tokens (tokens/). All is computed in f32, by eager attention, one sequence at a time. rope.json holds rotary frequencies of configurations, as Hugging Face computes them.
"""

import json
import math
import os
import shutil
import sys

# Nothing is looked up: PEFT would ask for the configuration of a model of the same name.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "families")
# The vocabulary of the synthetic tokenizer, so that these models can be trained on text too.
COMMON = dict(vocab_size=264, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LENGTHS = [29, 13]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)

MODELS = {
    "llama": ("LlamaConfig", dict(rope_parameters=LLAMA3)),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)),
    "smollm2": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e5))),
    "smollm3": ("SmolLM3Config", dict(no_rope_layers=[1, 0], tie_word_embeddings=True)),
    "mistral": ("MistralConfig", dict(sliding_window=8, head_dim=24)),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(head_dim=24, tie_word_embeddings=True)),
    "olmo2": ("Olmo2Config", dict()),
    "phi3": ("Phi3Config", dict(partial_rotary_factor=0.75, original_max_position_embeddings=20, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7], long_factor=[1.0, 1.5, 2.0, 3.0, 4.5, 6.0]))),
    "gemma2": ("Gemma2Config", dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=9, attn_logit_softcapping=3.0,
        final_logit_softcapping=1.5)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    # As above, as the part of a model that takes images.
    "gemma3-images": ("Gemma3Config", dict(
        text_config={**COMMON, **dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=6,
            layer_types=["sliding_attention", "full_attention"])},
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8, model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=263, boi_token_index=261, eoi_token_index=262)),
}

# Of which models the embeddings of some tokens are trained, too: heads that are tied, bounded, and of their own.
TOKENS = {"smollm2": [40, 259, 3, 77], "gemma2": [40, 259, 3, 77], "llama": [40, 259, 3, 77]}


def fill(model, seed):
    """Numbers with which activations keep their size and every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda value, deviation: torch.randn(value.shape, generator=generator) * deviation
    scaled = getattr(model.get_input_embeddings(), "embed_scale", None)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_((0.0 if "Gemma" in type(model).__name__ else 1.0) + draw(value, 0.2))
            elif name.endswith(".bias"):
                value.copy_(draw(value, 0.3))
            elif "embed_tokens" in name:
                value.copy_(draw(value, 0.4 if scaled is None else 0.4 / float(scaled)))
            else:
                value.copy_(draw(value, 1.2 / math.sqrt(value.shape[1])))


def make(name, index):
    kind, settings = MODELS[name]
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, kind)(**(settings if "text_config" in settings else {**COMMON, **settings}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, 100 + index)
    model.to(torch.bfloat16).save_pretrained(folder)
    generation = os.path.join(folder, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)

    lora = dict(r=2, lora_alpha=3, target_modules=FUSED if name == "phi3" else SEVEN)
    if "text_config" in settings:
        lora["exclude_modules"] = ".*vision_tower.*"
    adapt(name, index, lora, "adapter", "")
    if name in TOKENS:
        adapt(name, index, dict(r=1, lora_alpha=1, target_modules=["v_proj"], trainable_token_indices=TOKENS[name]), "tokens", "tokens")
    size = sum(os.path.getsize(os.path.join(at, file)) for at, _, files in os.walk(folder) for file in files)
    print(f"{name}: {size} bytes")


def adapt(name, index, lora, adapter_folder, expected_folder):
    """An adapter of a model, and what PEFT computes with it."""
    folder = os.path.join(HERE, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(index)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(os.path.join(folder, adapter_folder))
    os.remove(os.path.join(folder, adapter_folder, "README.md"))
    # PEFT writes a set: in another order each time.
    described = os.path.join(folder, adapter_folder, "adapter_config.json")
    with open(described, encoding="utf-8") as file:
        adapter = json.load(file)
    adapter["target_modules"].sort()
    with open(described, "w", encoding="utf-8") as file:
        json.dump(adapter, file, indent=2)

    tokens = torch.randint(3, COMMON["vocab_size"], (sum(LENGTHS),), generator=generator)
    logits, loss = [], 0.0
    for sequence in tokens.split(LENGTHS):
        found = model(input_ids=sequence[None]).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(found[:-1], sequence[1:], reduction="sum")
        logits.append(found.detach())
    loss.backward()
    expected = {"tokens": tokens.int(), "lengths": torch.tensor(LENGTHS, dtype=torch.int32),
                "logits": torch.cat(logits), "loss": loss.detach()[None]}
    saved = load_file(os.path.join(folder, adapter_folder, "adapter_model.safetensors"))
    for key, value in trained.items():
        key = key.replace(".default.", ".").removesuffix(".default")
        assert key in saved, key
        expected[key] = value.grad
    save_file({key: value.contiguous() for key, value in expected.items()}, os.path.join(folder, expected_folder, "expected.safetensors"))
    print(f"{name}: loss {loss.item():.6f}, largest logit {expected['logits'].abs().max():.3f}")


SMALL = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=264,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LONG = dict(short_factor=[1.0 + 0.1 * i for i in range(6)], long_factor=[1.0 + 0.7 * i for i in range(6)])
# Statements about rotary positions: old and new, alone and against each other.
ROPES = [
    ("llama", dict()),
    ("llama", dict(rope_theta=5e5)),
    ("llama", dict(rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    ("llama", dict(rope_theta=1e4, rope_parameters=dict(rope_type="default"))),
    ("llama", dict(rope_theta=1e4, rope_scaling=dict(rope_theta=7e5, type="linear", factor=4.0))),
    ("llama", dict(rope_scaling=dict(type="linear", factor=4.0), rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    ("llama", dict(rope_scaling={}, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=5e5))),
    ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=64))),
    ("llama", dict(original_max_position_embeddings=32, rope_scaling=dict(rope_type="llama3", factor=8.0,
                   low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0))),
    ("llama", dict(head_dim=32, rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0,
                   original_max_position_embeddings=64, beta_fast=24, beta_slow=2, truncate=False))),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.3,
                                     original_max_position_embeddings=64))),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, attention_factor=1.25))),
    ("smollm3", dict()),
    ("qwen2", dict(rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64))),
    ("phi3", dict(rope_scaling=dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8))),
    ("phi3", dict(partial_rotary_factor=0.75, original_max_position_embeddings=64, rope_scaling=dict(type="longrope", **LONG))),
    ("phi3", dict(partial_rotary_factor=0.75, original_max_position_embeddings=64,
                  rope_scaling=dict(type="longrope", attention_factor=1.5, **LONG))),
    ("phi3", dict(partial_rotary_factor=0.5)),
]


def rope(model_type, settings):
    """A configuration and its frequencies for texts of some lengths, with the factor of what turns."""
    said = {"model_type": model_type, **SMALL, **settings}
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(said)))
    kind = config.rope_parameters["rope_type"]
    texts = {}
    for length in [10, 100, 300, 1000]:
        if kind == "default":
            model = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
            frequencies, factor = model.compute_default_rope_parameters(config)
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        texts[length] = {"frequencies": [float(f"{value:.8g}") for value in frequencies.tolist()], "factor": factor}
    return {"config": said, "texts": texts}


def main():
    os.makedirs(HERE, exist_ok=True)
    with open(os.path.join(HERE, "rope.json"), "w", encoding="utf-8") as file:
        lines = [json.dumps(rope(*statement)) for statement in ROPES]
        file.write("[\n" + ",\n".join(lines) + "\n]\n")
    names = sys.argv[1:] or list(MODELS)
    for index, name in enumerate(MODELS):
        if name in names:
            make(name, index)


if __name__ == "__main__":
    main()
