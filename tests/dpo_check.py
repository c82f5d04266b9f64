#!/usr/bin/env python3
"""Checks the loss of preferences that Velum found against TRL's trainers for DPO and ORPO, on the same tokens.

Run by hand, since it needs packages that the build does not:

    python3 -m venv venv && venv/bin/pip install torch transformers peft trl
    venv/bin/python tests/dpo_check.py --model MODEL --adapter OUT/adapter --tokens TOKENS.json --expect LOSS [--objective orpo]

MODEL is a Hugging Face folder or a .gguf file. TOKENS.json is what `held_out_tokens` prints for the run's configuration: sequences of
{"tokens", "targets"}, a preferred one and then the other of each pair. LOSS is `eval_loss_after` of the run's report, whose
reference, for DPO, is the model without the adapter. TRL's cross entropy in ORPO is a mean over all tokens of a batch, those of the
prompts, too, where Velum's is that over an answer's: what is compared is made of TRL's own probabilities of the answers and its
odds ratios, and the loss as TRL has it is printed beside it. Prints one JSON object, and ends with status 1 when the losses are further
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
    parser.add_argument("--objective", choices=["dpo", "orpo"], default="dpo")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="absolute, default 1e-4")
    return parser.parse_args()


def side(sequence):
    """Prompt and answer of a sequence, as token ids."""
    tokens, targets = sequence["tokens"], sequence["targets"]
    first = next(at for at, target in enumerate(targets) if target != IGNORED)
    return tokens[: first + 1], targets[first:]


def dpo(policy, reference, beta, folder, text, tokenizer, pairs):
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    config = trl.DPOConfig(output_dir=folder, beta=beta, report_to=[], use_cpu=True, bf16=False)
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=text, processing_class=tokenizer
    )
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(pairs)).item()


def orpo(trainer, pairs):
    """The loss with the cross entropy of answers alone, and TRL's own."""
    import torch

    batch = {}
    for name in ["chosen", "rejected"]:
        whole = [pair["prompt_ids"] + pair[f"{name}_ids"] for pair in pairs]
        longest = max(map(len, whole))
        padded = lambda rows, filler: torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
        learnt = [[IGNORED] * len(pair["prompt_ids"]) + pair[f"{name}_ids"] for pair in pairs]
        batch[f"{name}_input_ids"] = padded(whole, 0)
        batch[f"{name}_attention_mask"] = padded([[1] * len(row) for row in whole], 0)
        batch[f"{name}_labels"] = padded(learnt, IGNORED)
    chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
    ratios = trainer.odds_ratio_loss(chosen, rejected)[0]
    own, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    return (-chosen.mean() - ratios.mean()).item(), own.item()


def main():
    args = arguments()
    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    import trl

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
    own = None
    text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if args.objective == "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            config = ORPOConfig(output_dir=folder, beta=args.beta, report_to=[], use_cpu=True, bf16=False)
            trainer = ORPOTrainer(model=policy, args=config, train_dataset=text, processing_class=tokenizer)
            trainer.model.eval()
            loss, own = orpo(trainer, pairs)
        else:
            loss = dpo(policy, load(), args.beta, folder, text, tokenizer, pairs)
    difference = abs(loss - args.expect)
    versions = {"torch": torch.__version__, "trl": trl.__version__, "peft": peft.__version__}
    result = {"versions": versions, "pairs": len(pairs), "loss": loss, "expected": args.expect, "difference": difference}
    if own is not None:
        result["loss_with_prompts"] = own
    print(json.dumps(result, indent=2))
    return int(not difference <= args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
