#!/usr/bin/env python3
"""Times Velum beside what it is measured against, on one machine and in one run, and writes the table to RESULTS.md.

Run by hand, since it needs packages that the build does not (Linux, Python 3.11, for the wheel of the third):

    python3.11 -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 gguf concrete-ml-extensions==0.2.0
    cargo build --release -p node
    venv/bin/python benches/peers.py --node target/release/node --model SmolLM2-135M-Instruct.Q4_1.gguf

Two comparisons:

* linear: one encrypted product with a 2048 x 2048 matrix, concrete-ml-extensions' CPU backend (the scheme of arXiv
  2505.07329) against `node bench linear`. Their time is linear in the number of rows, which a second measurement with
  more rows checks; ours is measured at 1 and at 1,024 tokens.
* step: one LoRA training step (rank 8 on all seven projections, 4 x 256 tokens, forward, backward and AdamW) of a
  model, Hugging Face PEFT in f32 and bf16, not encrypted, against `node bench step`, encrypted, owner and workers
  together on the same cores.

Each measurement is a process of its own, one after the other, so that peaks of memory are its own. The tables go
between the markers in RESULTS.md, or to standard output with --print.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, TOKENS = 4, 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Seconds after which no further training step of a peer is begun.
PATIENCE = 30
HERE = Path(__file__).resolve().parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", help="the binary `node`, built with --release; without it only the others are timed")
    parser.add_argument("--model", help="a Hugging Face folder or a .gguf file, for the training steps")
    parser.add_argument("--only", choices=["linear", "step"], help="one of the two comparisons")
    parser.add_argument("--size", type=int, default=2048, help="side of the matrix, default 2048")
    parser.add_argument("--rows", type=int, default=2, help="rows of their second product, default 2")
    parser.add_argument("--steps", type=int, default=5, help="measured training steps, after one that warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch, default all cores")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of our step, default 1")
    parser.add_argument("--under", default="", help="a command that every measurement runs under, such as `taskset -c 0,1`")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file with the markers")
    parser.add_argument("--print", action="store_true", dest="show", help="write the tables to standard output only")
    parser.add_argument("--part", choices=["concrete", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None and args.only != "linear" and args.part != "concrete":
        parser.error("--model is needed for the training steps; --only linear leaves them out")
    return args


# What runs in a process of its own. Each prints one JSON object as its last line.


def peak_bytes():
    """Largest resident memory of this process, as the kernel keeps it per address space."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE).group(1))


def time_concrete(args):
    """Encrypted products of concrete-ml-extensions on the CPU: 8-bit rows by 8-bit weights, as Concrete ML calls it."""
    import concrete_ml_extensions as extensions
    import numpy

    size, random = args.size, numpy.random.default_rng(0)
    params = extensions.MatmulCryptoParameters.deserialize(extensions.default_params())
    began = time.perf_counter()
    secret, key = extensions.create_private_key(params)
    result = {"key_s": time.perf_counter() - began, "key_bytes": len(key.serialize()), "products": []}
    weights = random.integers(-128, 128, (size, size)).astype(numpy.int64)
    for rows in (1, args.rows):
        clear = random.integers(0, 256, (rows, size)).astype(numpy.int64)
        began = time.perf_counter()
        request = extensions.encrypt_matrix(pkey=secret, crypto_params=params, data=clear.astype(numpy.uint64))
        encrypted = time.perf_counter()
        answer = extensions.matrix_multiplication(
            encrypted_matrix=request, data=weights.astype(numpy.uint64), compression_key=key
        )
        multiplied = time.perf_counter()
        valid = size % 2048 or 2048
        product = extensions.decrypt_matrix(answer, secret, params, num_valid_glwe_values_in_last_ciphertext=valid)
        decrypted = time.perf_counter()
        exact = clear @ weights
        error = numpy.array(product).astype(numpy.int64) - exact
        result["products"].append({
            "rows": rows, "encrypt_s": encrypted - began, "multiply_s": multiplied - encrypted,
            "decrypt_s": decrypted - multiplied, "bytes_up": len(request.serialize()),
            "bytes_down": len(answer.serialize()), "rel_error": float(numpy.linalg.norm(error) / numpy.linalg.norm(exact)),
        })
    return result


def time_peft(args):
    """LoRA training steps of Hugging Face PEFT, without encryption."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, args.dtype)}
    folder = args.model
    if os.path.isfile(args.model):
        folder, options["gguf_file"] = os.path.split(os.path.abspath(args.model))
        # Plain dense weights, as in the original: multiplying packed ones is slower.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    seconds = []
    # Bfloat16 without the instructions takes a minute a step: then the first one is all that is waited for.
    while len(seconds) <= args.steps and sum(seconds) < PATIENCE:
        tokens = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return {
        "seconds": seconds[1:] or seconds, "peak_rss_bytes": peak_bytes(), "versions": versions, "threads": torch.get_num_threads(),
        "model_dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "trained": sum(parameter.numel() for parameter in parameters),
    }


# What the main process does: run the parts, make tables of them.


def run(args, command):
    """The JSON object that a command prints last."""
    command = [*shlex.split(args.under), *map(str, command)]
    print("running", *command, file=sys.stderr, flush=True)
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if output.returncode != 0:
        sys.exit(f"this failed: {' '.join(command)}")
    return json.loads(output.stdout[output.stdout.index("{"):])


def part(args, name, *more):
    command = [sys.executable, __file__, "--part", name, "--size", args.size, "--rows", args.rows]
    command += ["--steps", args.steps, "--threads", args.threads, *more]
    return run(args, command)


def number(value, digits=3):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def linear_table(args):
    theirs = part(args, "concrete")
    ours = []
    if args.node:
        for tokens in (1, 1024):
            command = [args.node, "bench", "linear", "--d-in", args.size, "--d-out", args.size, "--tokens", tokens]
            ours += [run(args, [*command, "--params", params, "--json"]) for params in ("p24", "auto")]
    lines = [
        f"One encrypted product, {args.size} × {args.size}. For ours, the mask's product is done once a run, before any "
        "call, so it stands beside a call's time and not in it; \"int8\" is the same kernel on the rows unencrypted.",
        "",
        row("scheme", "tokens", "encrypt s", "multiply s", "decrypt s", "tokens/s", "once: mask s", "int8 s",
            "bytes a token up", "down", "rel. error"),
        row(*["---"] * 11),
    ]
    for product in theirs["products"]:
        rows = product["rows"]
        total = product["encrypt_s"] + product["multiply_s"] + product["decrypt_s"]
        product["rate"] = rows / total
        lines.append(row(
            "concrete-ml-extensions 0.2.0", str(rows), number(product["encrypt_s"]), number(product["multiply_s"]),
            number(product["decrypt_s"]), number(rows / total), "", "", number(product["bytes_up"] / rows),
            number(product["bytes_down"] / rows), f"{100 * product['rel_error']:.2g} %",
        ))
    best = max(product["rate"] for product in theirs["products"])
    ratios = []
    for product in ours:
        tokens = product["tokens"]
        call = product["encrypt_s"] + product["body_multiply_s"] + product["decrypt_s"]
        lines.append(row(
            f"Velum {product['precision']}, {product['kernel']}", f"{tokens:,}", number(product["encrypt_s"]),
            number(product["body_multiply_s"]), number(product["decrypt_s"]), number(tokens / call),
            number(product["mask_multiply_s"]), number(product["plain_int8_s"]), number(product["bytes_up"] / tokens),
            number(product["bytes_down"] / tokens), f"{100 * product['rel_error']:.2f} %",
        ))
        with_mask = tokens / (call + product["mask_multiply_s"])
        ratios.append(
            f"* {product['precision']}, {tokens:,} tokens: {tokens / call / best:,.0f} × their tokens a second; "
            f"{with_mask / best:,.0f} × where the mask's product is counted as if it served this one call."
        )
    first, second = theirs["products"][0], theirs["products"][-1]
    lines += ["", *ratios] + [
        f"* Their time is linear in the rows: {second['rows']} rows took {second['multiply_s'] / first['multiply_s']:.2f} × "
        f"the time of one. Their client makes a key of {theirs['key_bytes'] / 2**20:,.0f} MiB for the server in "
        f"{theirs['key_s']:.1f} s, once; ours has none."
    ]
    return lines


def step_table(args):
    rows, peers = [], {}
    for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
        peers[name] = part(args, "peft", "--dtype", dtype, "--model", args.model)
        seconds = statistics.median(peers[name]["seconds"])
        rows.append((f"Hugging Face PEFT, {name}, not encrypted", seconds, peers[name]["seconds"],
                     f"{peers[name]['peak_rss_bytes'] / 1e9:.2f} GB", ""))
    if args.node:
        command = [args.node, "bench", "step", "--model", args.model, "--workers", args.workers]
        command += ["--tokens", ROWS * TOKENS, "--steps", args.steps, "--json"]
        for name, more in (("Velum, encrypted", []), ("Velum, f32 in the owner, not encrypted", ["--backend", "plain"])):
            ours = run(args, [*command, *more])
            memory = [f"{ours['owner_peak_rss_bytes'] / 1e9:.2f} GB"]
            memory += [f"{worker['peak_rss_bytes'] / 1e9:.2f} GB" for worker in ours["workers"]]
            traffic = (ours["bytes_up_per_token"] + ours["bytes_down_per_token"]) / 1e6
            rows.append((name, ours["seconds_per_step"], ours["step_seconds"], " + ".join(memory), f"{traffic:.2f}"))
    base = rows[0][1]
    lines = [
        f"One training step of {Path(args.model).stem}, {ROWS} × {TOKENS} tokens, LoRA r = 8 on all seven projections, "
        f"forward, backward and AdamW; median of {args.steps} after one that warms up, of fewer where they are slow ({peers['f32']['versions']}, "
        f"{args.threads} threads). Memory: the owner's process and each worker's.",
        "",
        row("what", "s a step", "fastest and slowest", "ms a token", "of PEFT f32", "peak memory", "MB a token"),
        row(*["---"] * 7),
    ]
    for name, seconds, every, memory, traffic in rows:
        spread = f"{min(every):.2f} to {max(every):.2f}"
        per_token = f"{1e3 * seconds / (ROWS * TOKENS):.2f}"
        lines.append(row(name, f"{seconds:.2f}", spread, per_token, f"{seconds / base:.2f} ×", memory, traffic))
    return lines


def machine():
    """The processor in words, and the instructions that decide which kernels run."""
    described = subprocess.run(["lscpu"], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    fields = dict(line.split(":", 1) for line in described.stdout.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("Flags", "").split()
    known = {"AVX2": "avx2", "AVX-512 VNNI": "avx512_vnni", "AMX int8": "amx_int8", "AMX bf16": "amx_bf16"}
    has = ", ".join(f"{name}: {'yes' if flag in flags else 'no'}" for name, flag in known.items())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{fields.get('Model name', platform.processor())} (family {fields.get('CPU family')}, model "
        f"{fields.get('Model')}), {os.cpu_count()} cores, {memory:.0f} GiB; {has}. "
        f"{datetime.date.today().isoformat()}, `benches/peers.py`."
    )


def put_between_markers(path, name, lines):
    begin, end = f"<!-- peers.py: {name} -->", f"<!-- peers.py: end of {name} -->"
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        sys.exit(f"{path} lacks the markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n" + "\n".join(lines) + f"\n{end}{tail}", encoding="utf-8")


def main():
    args = arguments()
    if args.part:
        print(json.dumps({"concrete": time_concrete, "peft": time_peft}[args.part](args)))
        return
    for name, table in (("linear", linear_table), ("step", step_table)):
        if args.only in (None, name):
            lines = [machine(), "", *table(args)]
            if args.show:
                print("\n".join(lines))
            else:
                put_between_markers(args.results, name, lines)


if __name__ == "__main__":
    main()
