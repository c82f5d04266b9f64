"""Compares what `node export` wrote with PEFT, by the tools that it was written for.

    python tests/export_check.py --model HF_FOLDER --adapter ADAPTER [--merged FOLDER] [--gguf FILE]... \
        [--base BASE.gguf --lora LORA.gguf]

needs torch, transformers, peft and gguf, and llama-cpp-python for the files of llama.cpp. The reference is PEFT's adapter on
the model in 32-bit floats; of each other form it prints the loss of a few texts and the largest difference of a logit. The suite
needs no Python.
"""

import argparse

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    ("Which Marrowby depot holds frozen goods?", "Frozen goods are held at Sallow Quay, at minus 24 degrees."),
    ("How is it written?", "def warmest(name: str) -> int:\n    return max(reading.tenths for reading in room.today())\n"),
    ("In 1999 there weren't 12,345 pallets;", "Größe, 東京, naïve."),
]


def conversation(text):
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in zip(["user", "assistant"], text))


def by_torch(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def loss(logits, ids):
    logits = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log[np.arange(len(ids) - 1), ids[1:]].mean()


def by_llama(path, lora, texts, tokenizer):
    from llama_cpp import Llama

    model = Llama(model_path=path, lora_path=lora, n_ctx=512, logits_all=True, n_threads=1, verbose=False)
    for ids, text in texts:
        found = model.tokenize(text.encode(), add_bos=False, special=True)
        assert found == ids, f"llama.cpp splits {text!r} into {found}, transformers into {ids}"
        model.reset()
        model.eval(ids)
        yield np.array(model.scores[: len(ids)], dtype=np.float64)


def show(name, reference, logits, texts):
    losses = [loss(found, ids) for found, (ids, _) in zip(logits, texts)]
    expected = [loss(found, ids) for found, (ids, _) in zip(reference, texts)]
    # Logits may be shifted together without an effect.
    centred = lambda x: x - x.mean(axis=1, keepdims=True)
    off = max(np.abs(centred(a) - centred(b)).max() for a, b in zip(reference, logits))
    print(f"| {name} | {np.mean(losses):.5f} | {np.mean(losses) - np.mean(expected):+.1e} | {off:.1e} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--merged", action="append", default=[])
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--base")
    parser.add_argument("--lora")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [conversation(text) for text in TEXTS]
    texts = [(tokenizer(text, add_special_tokens=False)["input_ids"], text) for text in texts]
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    print("| | loss | beside PEFT's | largest difference of a logit |\n|---|---|---|---|")
    plain = [by_torch(base, ids) for ids, _ in texts]
    adapted = PeftModel.from_pretrained(base, arguments.adapter)
    reference = [by_torch(adapted, ids) for ids, _ in texts]
    show("PEFT", reference, reference, texts)
    show("base without the adapter", reference, plain, texts)
    for path in arguments.merged:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        show(path, reference, [by_torch(model, ids) for ids, _ in texts], texts)
    for path in arguments.gguf:
        import gguf

        reader = gguf.GGUFReader(path)
        kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        name = f"{path} ({len(reader.tensors)} tensors, {', '.join(kinds)})"
        show(name, reference, list(by_llama(path, None, texts, tokenizer)), texts)
    if arguments.base:
        logits = list(by_llama(arguments.base, arguments.lora, texts, tokenizer))
        show(f"{arguments.base} with {arguments.lora}", reference, logits, texts)


if __name__ == "__main__":
    main()
