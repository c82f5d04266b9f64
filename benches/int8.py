"""What errors of products do to a loss, by kind of product, and what is left of them where a part of low rank is known.

    pip install torch transformers gguf
    python benches/int8.py SmolLM2-135M-Instruct.Q4_1.gguf gsm8k.jsonl [BATCHES]

A simulation in transformers, without encryption: products of the layers get Gaussian noise in proportion to each row, or weights that
are rotated and rounded to int8 as `protocol/src/quant` does (with signs of its own, three draws). DATA has a `question` and an
`answer` a line; four make a batch, and of each batch's loss the relative difference to that of the model as it is counts.
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = Path(__file__).parent.parent / "actors/src/compensation/text.txt"
KINDS = {"q/k/v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate/up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
NOISE, DRAWS, FIRST, SEQUENCE, TOKENS = 0.012, 3, 4.0, 256, 1024


def main(model_file, data, batches=10):
    torch.manual_seed(0)
    folder, file = Path(model_file).parent, Path(model_file).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    weights = {n: m.weight.data.clone() for n, m in linears.items()}
    lines = [json.loads(line) for line in open(data)][: 4 * int(batches)]
    examples = [batch(tokenizer, lines[at : at + 4]) for at in range(0, len(lines), 4)]

    def losses():
        with torch.no_grad():
            return torch.tensor([model(input_ids=i, attention_mask=a, labels=y).loss.item() for i, y, a in examples])

    plain = losses()

    def show(name, draws):
        off = [(found - plain) / plain * 100 for found in draws]
        means = ", ".join(f"{o.mean():+.2f}" for o in off)
        rms = torch.cat(off).pow(2).mean().sqrt()
        print(f"{name:36s} rms {rms:.3f} %, spread {sum(o.std() for o in off) / len(off):.3f} %, mean {means} %", flush=True)

    directions = find_directions(model, tokenizer, linears)

    def noise(names, rank=0):
        """Of each row of what is left of these products, three draws."""

        def noisy(name, module, inputs, out):
            known = directions[name][:, :rank]
            left = (inputs[0] - (inputs[0] @ known) @ known.T) @ module.weight.T
            return out + torch.randn_like(out) * left.pow(2).mean(-1, keepdim=True).sqrt() * NOISE

        some = [(n, m) for n, m in linears.items() if n.endswith(names)]
        hooks = [m.register_forward_hook(lambda m, i, o, n=n: noisy(n, m, i, o)) for n, m in some]
        found = [losses() for _ in range(DRAWS)]
        for hook in hooks:
            hook.remove()
        return found

    for kind, names in KINDS.items():
        show(f"noise of {100 * NOISE:.1f} % in {kind}", noise(names))
    for rank in (0, 8, 16, 32):
        show(f"in all of them, {rank} directions known", noise(("_proj",), rank))

    ranks = (0, 8, 16, 32, 64)
    found = {rank: [] for rank in ranks}
    for _ in range(DRAWS):
        errors = {n: rounding_error(w) for n, w in weights.items()}
        for rank in ranks:
            for n, module in linears.items():
                p = directions[n][:, :rank]
                module.weight.data = weights[n] + errors[n] - (errors[n] @ p) @ p.T
            found[rank].append(losses())
    for rank in ranks:
        show(f"int8 weights, {rank} directions known", found[rank])


def batch(tokenizer, lines):
    examples = []
    for line in lines:
        question = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(line["answer"] + "<|im_end|>\n", add_special_tokens=False).input_ids
        examples.append(((prompt + answer)[:SEQUENCE], ([-100] * len(prompt) + answer)[:SEQUENCE]))
    longest = max(len(ids) for ids, _ in examples)
    pad = lambda values, by: torch.tensor([list(v) + [by] * (longest - len(v)) for v in values])
    return (
        pad([ids for ids, _ in examples], 0),
        pad([labels for _, labels in examples], -100),
        pad([[1] * len(ids) for ids, _ in examples], 0),
    )


def find_directions(model, tokenizer, linears):
    """Right singular vectors of what enters each product of the public text."""
    inputs = {}
    hooks = [m.register_forward_pre_hook(lambda _m, a, n=n: inputs.__setitem__(n, a[0])) for n, m in linears.items()]
    ids = tokenizer(TEXT.read_text()).input_ids[:TOKENS]
    with torch.no_grad():
        model(input_ids=torch.tensor(ids).reshape(-1, SEQUENCE))
    for hook in hooks:
        hook.remove()
    found = {}
    for name, x in inputs.items():
        x[:, 0] *= FIRST
        x = x.reshape(-1, x.shape[-1]).double()
        found[name] = torch.linalg.eigh(x.T @ x)[1].flip(1).float()
    return found


def rounding_error(weight):
    """Of a weight, [out, in], that is rotated on both sides and rounded by output."""
    into, out = rotation(weight.shape[1]), rotation(weight.shape[0])
    turned = out.T @ weight @ into
    scale = turned.abs().amax(1, keepdim=True) / 127
    return out @ ((turned / scale).round() * scale - turned) @ into.T


def rotation(size):
    block = size & -size
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.randint(0, 2, (size, 1)) * 2.0 - 1.0
    return signs * torch.block_diag(*[hadamard / math.sqrt(block)] * (size // block))


if __name__ == "__main__":
    main(*sys.argv[1:])
