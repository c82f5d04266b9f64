#!/usr/bin/env python3
"""Checks an adapter that Velum has trained against Hugging Face: does PEFT load it, and is the loss the same?

Run by hand, since it needs packages that the build does not:

    python3 -m venv venv && venv/bin/pip install torch transformers peft gguf
    venv/bin/python tests/peft_check.py --model MODEL --adapter OUT/adapter --tokens TOKENS.json

MODEL is a Hugging Face folder or a .gguf file. TOKENS.json holds what the owner scored, as token ids, so that no two
tokenizers have to agree: a list of {"tokens": [...], "targets": [...]} of equal lengths, where targets[i] is the token
that follows tokens[i], or -100 where it is not scored. Prints one JSON object with the mean loss per scored token
without and with the adapter. With --expect LOSS it ends with status 1 when the loss with the adapter is further than
--tolerance from it.
"""

import argparse
import json
import os
import sys

IGNORED = -100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--adapter", help="folder with adapter_config.json; without it only the base model is scored")
    parser.add_argument("--tokens", required=True, help="JSON file with the token ids and targets")
    parser.add_argument("--expect", type=float, help="the loss that the owner reports")
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative, default 0.01")
    return parser.parse_args()


def load_examples(path):
    with open(path, encoding="utf-8") as file:
        examples = json.load(file)
    for number, example in enumerate(examples):
        if len(example["tokens"]) != len(example["targets"]):
            sys.exit(f"{path}: example {number} has {len(example['tokens'])} tokens, {len(example['targets'])} targets")
    if not any(target != IGNORED for example in examples for target in example["targets"]):
        sys.exit(f"{path}: no target is scored")
    return examples


def load_model(path):
    import torch
    from transformers import AutoModelForCausalLM

    if os.path.isfile(path):
        folder, file = os.path.split(os.path.abspath(path))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def mean_loss(model, examples):
    """Mean cross-entropy in nats over all scored targets of all examples, and their number."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            targets = torch.tensor(example["targets"])
            logits = model(input_ids=torch.tensor([example["tokens"]])).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            total += losses.item()
            count += int((targets != IGNORED).sum())
    return total / count, count


def main():
    args = arguments()
    examples = load_examples(args.tokens)
    model = load_model(args.model)
    import peft
    import torch
    import transformers

    result = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}}
    result["loss_without_adapter"], result["scored_tokens"] = mean_loss(model, examples)
    loss = result["loss_without_adapter"]
    if args.adapter:
        model = peft.PeftModel.from_pretrained(model, args.adapter).eval()
        # PEFT only warns about keys that do not match, and leaves those matrices as they were initialised: B is then zero.
        zero = [name for name, value in model.named_parameters() if ".lora_B." in name and not value.any()]
        result["adapted_matrices"] = sum(".lora_B." in name for name, _ in model.named_parameters())
        result["matrices_that_are_zero"] = len(zero)
        loss, _ = mean_loss(model, examples)
        result["loss_with_adapter"] = loss
    if args.expect is not None:
        result["expected"] = args.expect
        result["relative_difference"] = abs(loss - args.expect) / args.expect
    print(json.dumps(result, indent=2))
    return int(args.expect is not None and not result["relative_difference"] <= args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
