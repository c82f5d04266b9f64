#!/usr/bin/env python3
"""Checks the loss of preferences that Velum found against TRL's DPO trainer, on the same tokens.

Run by hand, since it needs packages that the build does not:

    python3 -m venv venv && venv/bin/pip install torch transformers peft trl
    venv/bin/python tests/dpo_check.py --model MODEL --adapter OUT/adapter --tokens TOKENS.json --expect LOSS

MODEL is a Hugging Face folder or a .gguf file. TOKENS.json is what `held_out_tokens` prints for the run's configuration: sequences of
{"tokens", "targets"}, a preferred one and then the other of each pair. LOSS is `eval_loss_after` of the run's report, whose
reference is the model without the adapter. Prints one JSON object, and ends with status 1 when the losses are further
apart than --tolerance.
"""

import argparse
import json
import os
import sys
import tempfile

IGNORED = -100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--expect", type=float, required=True)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="absolute, default 1e-4")
    return parser.parse_args()


def side(sequence):
    """Prompt and answer of a sequence, as token ids."""
    tokens, targets = sequence["tokens"], sequence["targets"]
    first = next(at for at, target in enumerate(targets) if target != IGNORED)
    return tokens[: first + 1], targets[first:]


def main():
    args = arguments()
    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    with open(args.tokens, encoding="utf-8") as file:
        sequences = json.load(file)
    pairs = []
    for chosen, rejected in zip(sequences[::2], sequences[1::2]):
        (prompt, chosen), (other, rejected) = side(chosen), side(rejected)
        if prompt != other:
            sys.exit("the prompts of a pair differ")
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})

    def load():
        if os.path.isfile(args.model):
            folder, file = os.path.split(os.path.abspath(args.model))
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
            # Its weights are f32 now, and the trainer refuses what it takes for quantized.
            model.is_quantized = False
            return model
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    # The trainer asks for a tokenizer and texts; the batch that is compared is of token ids.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "end": 3}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")
    policy = peft.PeftModel.from_pretrained(load(), args.adapter)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(output_dir=folder, beta=args.beta, report_to=[], use_cpu=True, bf16=False)
        text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = trl.DPOTrainer(
            model=policy, ref_model=load(), args=config, train_dataset=text, processing_class=tokenizer
        )
        trainer.model.eval()
        batch = DataCollatorForPreference(pad_token_id=0)(pairs)
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, batch).item()
    difference = abs(loss - args.expect)
    versions = {"torch": torch.__version__, "trl": trl.__version__, "peft": peft.__version__}
    result = {"versions": versions, "pairs": len(pairs), "loss": loss, "expected": args.expect, "difference": difference}
    print(json.dumps(result, indent=2))
    return int(not difference <= args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
