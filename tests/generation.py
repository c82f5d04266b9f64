#!/usr/bin/env python3
"""Makes tests/generation.json: what transformers writes with the tiny models of tests/families, and how it samples.

Run by hand where generation is changed, since it needs packages that the build does not:

    python3 -m venv venv && venv/bin/pip install torch transformers peft
    venv/bin/python tests/generation.py

For each model, with its adapter and without: the tokens that follow a prompt, each the likeliest, through a cache of keys and
values. And for random logits, the probabilities that are left by the steps of `transformers` in its own order.
"""

import json
import os
import sys

# Nothing is looked up: PEFT would ask for the configuration of a model of the same name.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = os.path.join(HERE, "families")
PROMPT, WRITTEN, VOCABULARY = 11, 24, 40
SETTINGS = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=0.9, min_p=0.1),
    dict(temperature=1.0, repetition_penalty=1.4),
    dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    dict(temperature=2.0, top_k=30, top_p=0.5),
    dict(temperature=1.0, top_p=0.01),
]


def written(name):
    folder = os.path.join(FAMILIES, name)
    prompt = load_file(os.path.join(folder, "expected.safetensors"))["tokens"][:PROMPT].long()
    answers = {}
    for kind in ["base", "adapted"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        if kind == "adapted":
            model = PeftModel.from_pretrained(model, os.path.join(folder, "adapter"))
        # No token ends a text, and none is kept from coming.
        model.generation_config.eos_token_id = None
        settings = transformers.GenerationConfig(max_new_tokens=WRITTEN, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            tokens = model.generate(input_ids=prompt[None], attention_mask=torch.ones(1, PROMPT, dtype=torch.long), generation_config=settings)
        answers[kind] = tokens[0, PROMPT:].tolist()
    return {"prompt": prompt.tolist(), **answers}


def sampled(settings, generator):
    logits = (torch.randn(VOCABULARY, generator=generator) * 3).to(torch.float32)
    seen = torch.randint(0, VOCABULARY, (9,), generator=generator)
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=8,
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    steps = model._get_logits_processor(generation_config=config, input_ids_seq_length=9, device="cpu", logits_processor=transformers.LogitsProcessorList())
    probabilities = torch.softmax(steps(seen[None], logits[None].clone())[0], dim=-1)
    return {"settings": settings, "logits": logits.tolist(), "seen": seen.tolist(), "probabilities": probabilities.tolist()}


def main():
    generator = torch.Generator().manual_seed(5)
    names = sorted(name for name in os.listdir(FAMILIES) if os.path.isdir(os.path.join(FAMILIES, name)))
    found = {"models": {name: written(name) for name in names},
             "sampling": [sampled(settings, generator) for settings in SETTINGS]}
    with open(os.path.join(HERE, "generation.json"), "w", encoding="utf-8") as file:
        models = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found["models"].items()]
        sampling = [json.dumps(value) for value in found["sampling"]]
        file.write('{"models": {\n' + ",\n".join(models) + '\n}, "sampling": [\n' + ",\n".join(sampling) + "\n]}\n")
    print(f"{len(names)} models by transformers {transformers.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
