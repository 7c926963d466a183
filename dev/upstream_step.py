"""Upstream's training step as a program that takes turns with ours.

  python scripts/bench_train.py --shape=d4 \
      --beside="python dev/upstream_step.py --repo=PATH --shape=d4 --device=cpu --dtype=float32"

Needs PyTorch and a checkout of karpathy/nanochat, classic (ae0bf52) or modern (92d63d4); which one
it is shows in its GPT. Nothing else here imports PyTorch, and nothing of the product imports this.

A step is that of upstream's base_train.py on one device: forward and backward of --accumulate
microbatches, clipping (classic), optimizers, zero_grad, and the values it reads from the device in
every step. On a GPU there are as many microbatches as make a step of 524,288 tokens, on a CPU one.
Schedules stand still, and the batch is random and always the same: no loader on either side.

Speaks the protocol of nanochat_jax/bench_beside.py. What upstream prints goes to standard error.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

# name: variant, layers, dim, heads, vocabulary, row length, rows, microbatches on a GPU, pattern of
# windows; a test compares them with nanochat_jax/bench.py.
SHAPES = {
    "d20": ("classic", 20, 1_280, 10, 65_536, 2_048, 32, 8, "L"),
    "d4": ("classic", 4, 256, 2, 4_096, 256, 16, 1, "L"),
    "gpt2": ("modern", 24, 1_536, 12, 32_768, 2_048, 16, 16, "SSSL"),
    "demo": ("modern", 4, 192, 3, 4_096, 256, 32, 1, "SSSL"),
}
WARM_UP = 3  # steps: compilation, and the memory that the optimizers keep
MIN_FP8_DIM = 128  # as upstream's base_train.py chooses the layers


def main() -> None:
    args = arguments()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["NANOCHAT_DTYPE"] = args.dtype  # read when upstream is imported
    if args.device == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as upstream
    if not args.compile:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, args.repo)
    step, described = prepare(args)
    losses = [float(step()) for _ in range(WARM_UP)]
    say(answers, described | {"loss": losses[0]})
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        secs = time.perf_counter() - began  # each step waits for the device
        say(answers, {"secs": secs, "loss": float(loss)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo", required=True, help="folder of an upstream checkout")
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    parser.add_argument("--device-batch", type=int, help="rows at once; by default the shape's")
    parser.add_argument("--accumulate", type=int, help="microbatches of a step")
    parser.add_argument("--fp8", action="store_true", help="modern, on a GPU that has it")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.repo, "nanochat", "gpt.py")):
        parser.error(f"--repo got {args.repo}, expected a checkout of karpathy/nanochat")
    return args


def prepare(args: argparse.Namespace) -> tuple[Callable, dict]:
    """The step, which returns its loss and leaves the device idle, and what to say about it."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    variant, layers, dim, heads, vocab, seq_len, rows, on_gpu, pattern = SHAPES[args.shape]
    found = "classic" if hasattr(GPT, "setup_optimizers") else "modern"
    if variant != found:
        sys.exit(f"error: --shape={args.shape} is {variant}, --repo={args.repo} is {found}")
    if found == "classic" and (args.fp8 or (args.device, args.dtype) == ("cuda", "float32")):
        sys.exit("error: upstream's classic code trains in bfloat16 on cuda and has no fp8")
    rows = args.device_batch or rows
    accumulate = args.accumulate or (on_gpu if args.device == "cuda" else 1)
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32, as upstream; no effect on a CPU
    sizes = dict(sequence_len=seq_len, vocab_size=vocab, n_layer=layers, n_embd=dim)
    sizes |= dict(n_head=heads, n_kv_head=heads)
    with torch.device("meta"):
        model = GPT(
            GPTConfig(**sizes, **({} if found == "classic" else {"window_pattern": pattern}))
        )
    model.to_empty(device=args.device)
    model.init_weights()
    if args.fp8:
        convert_to_fp8(model)
    optimizers = make_optimizers(model)
    ids = torch.randint(vocab, (accumulate, rows, seq_len + 1), device=args.device)
    inputs, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    inputs = inputs.int() if found == "classic" else inputs
    autocast = contextlib.nullcontext()
    if found == "classic" and args.dtype == "bfloat16":
        autocast = torch.autocast(args.device, torch.bfloat16)
    run = torch.compile(model, dynamic=False) if args.compile else model

    def step():
        total = torch.zeros((), device=args.device)
        for some_inputs, some_targets in zip(inputs, targets, strict=True):
            with autocast:
                loss = run(some_inputs, some_targets) / accumulate
            loss.backward()
            total += loss.detach()
        if found == "classic":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return total.item()

    return step, {
        "name": f"upstream {found} {commit(args.repo)}",
        "tokens": accumulate * rows * seq_len,
        "shape": args.shape,
        "rows": rows,
        "microbatches": accumulate,
        "dtype": args.dtype,
        "fp8": args.fp8,
        "compiled": args.compile,
        "attention": attention(found),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }


def make_optimizers(model) -> list:
    """Upstream's, with the rates that its base_train.py has by default."""
    rates = dict(embedding_lr=0.3, matrix_lr=0.02)
    if hasattr(model, "setup_optimizers"):
        return model.setup_optimizers(unembedding_lr=0.004, weight_decay=0.0, **rates)
    return [model.setup_optimizer(unembedding_lr=0.008, scalar_lr=0.5, weight_decay=0.28, **rates)]


def convert_to_fp8(model) -> None:
    from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training

    def large(layer, name: str) -> bool:
        sizes = (layer.in_features, layer.out_features)
        return min(sizes) >= MIN_FP8_DIM and all(size % 16 == 0 for size in sizes)

    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=recipe, module_filter_fn=large)


def attention(variant: str) -> str:
    """Which attention upstream found: classic has one, modern looks for FlashAttention 3."""
    if variant == "classic":
        return "SDPA"
    from nanochat.flash_attention import USE_FA3

    return "FlashAttention 3" if USE_FA3 else "SDPA"


def commit(repo: str) -> str:
    """The checked-out commit; of an export without history what git calls its gpt.py."""
    command = ["git", "-C", repo, "rev-parse", "--short=7", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no history
        with open(os.path.join(repo, "nanochat", "gpt.py"), "rb") as file:
            content = file.read()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return f"gpt.py:{blob[:7]}"


def say(answers, message: dict) -> None:
    print(json.dumps(message), file=answers, flush=True)


if __name__ == "__main__":
    main()
