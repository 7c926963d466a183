"""Upstream's training step as a program that takes turns with ours.

  python scripts/bench/train.py --shape=d4 --beside="python dev/upstream_step.py --repo=PATH"

Needs PyTorch and a checkout of karpathy/nanochat, classic (ae0bf52) or modern (92d63d4). A step is
that of upstream's base_train.py on one device: forward and backward of the microbatches, clipping
(classic), optimizers, zero_grad, and the values it reads from the device in every step. Schedules
stand still, and the batch is random and always the same. Shape, dtype and learning rates are ours;
scripts/bench/train.py has the protocol that brings them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

WARM_UP = 3  # steps: compilation, and the memory that the optimizers keep
MIN_FP8_DIM = 128  # as upstream's base_train.py chooses the layers


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--repo", required=True, help="folder of an upstream checkout")
    parser.add_argument("--device-batch", type=int, help="rows at once; by default ours")
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.repo, "nanochat", "gpt.py")):
        parser.error(f"--repo got {args.repo}, expected a checkout of karpathy/nanochat")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what upstream prints goes to standard error
    shape = json.loads(sys.stdin.readline())
    os.environ["NANOCHAT_DTYPE"] = shape["model"]["compute_dtype"]  # read when it is imported
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as upstream
    sys.path.insert(0, args.repo)
    step, about = prepare(shape, args.device_batch or shape["rows"])
    losses = [step() for _ in range(WARM_UP)]
    print(json.dumps(about | {"loss": losses[0]}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"loss": step()}), file=answers, flush=True)


def prepare(shape: dict, rows: int) -> tuple[Callable[[], float], dict]:
    """The step, which returns its loss and leaves the device idle, and what to say about it."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    m, o, classic = shape["model"], shape["optim"], hasattr(GPT, "setup_optimizers")
    if classic != (o["recipe"] == "classic"):
        sys.exit(f"error: {shape['name']} is {o['recipe']}, the checkout in --repo is not")
    on_gpu, dtype = shape["platform"] == "gpu", m["compute_dtype"]
    device, accumulate = "cuda" if on_gpu else "cpu", shape["rows"] * shape["accumulate"] // rows
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32, as upstream; no effect on a CPU
    sizes = dict(sequence_len=m["seq_len"], vocab_size=m["vocab_size"], n_layer=m["num_layers"])
    sizes |= dict(n_embd=m["model_dim"], n_head=m["num_heads"], n_kv_head=m["num_kv_heads"])
    sizes |= {} if classic else {"window_pattern": m["window_pattern"]}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()
    if m["fp8_layers"]:
        convert_to_fp8(model)
    rates = dict(embedding_lr=o["embed_lr"], unembedding_lr=o["unembed_lr"])
    rates |= dict(matrix_lr=o["matrix_lr"], weight_decay=shape["weight_decay"])
    if classic:
        optimizers = model.setup_optimizers(**rates)
    else:
        optimizers = [model.setup_optimizer(scalar_lr=o["scalar_lr"], **rates)]
    ids = torch.randint(m["vocab_size"], (accumulate, rows, m["seq_len"] + 1), device=device)
    inputs, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    inputs = inputs.int() if classic else inputs
    autocast = torch.autocast(device, torch.bfloat16, enabled=classic and dtype == "bfloat16")
    run = torch.compile(model, dynamic=False)

    def step() -> float:
        total = torch.zeros((), device=device)
        for micro_inputs, micro_targets in zip(inputs, targets, strict=True):
            with autocast:
                loss = run(micro_inputs, micro_targets) / accumulate
            loss.backward()
            total += loss.detach()
        if classic:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        return total.item()

    about = {"name": f"upstream {o['recipe']}", "torch": torch.__version__}
    if not classic:
        from nanochat.flash_attention import USE_FA3

        about["flash_attention_3"] = USE_FA3
    return step, about | {"tokens": accumulate * rows * m["seq_len"], "microbatches": accumulate}


def convert_to_fp8(model) -> None:
    from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training

    def large(layer, name: str) -> bool:
        sizes = (layer.in_features, layer.out_features)
        return min(sizes) >= MIN_FP8_DIM and all(size % 16 == 0 for size in sizes)

    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=recipe, module_filter_fn=large)


if __name__ == "__main__":
    main()
