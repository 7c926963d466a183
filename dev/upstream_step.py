"""Upstream's compiled training step, in a process of its own, in turn with ours; JSON line last.

  python dev/upstream_step.py --repo=PATH --shape=d4

Needs PyTorch beside our own packages and a checkout of karpathy/nanochat, classic (ae0bf52) or
modern (92d63d4). A step is that of upstream's base_train.py on one device: forward and backward of
the microbatches, clipping (classic), optimizers, zero_grad, and the values it reads from the device
in every step. Schedules stand still, and the batch is random and always the same. Shape, dtype and
learning rates are ours; the options are those of scripts/bench/train.py.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanochat_jax.common import UserError, run_main
from scripts.bench import common, train
from scripts.bench.common import Shape

WARM_UP = 3  # steps: compilation, and the memory that the optimizers keep
MIN_FP8_DIM = 128  # as upstream's base_train.py chooses the layers


class Upstream:
    """Upstream's training in another process; a call takes a step, and its device is idle then."""

    bytes = 0  # torch does not tell before it runs

    def __init__(self, shape: Shape, on_gpu: bool, pool: ProcessPoolExecutor):
        self.shape, self.pool, self.of = shape, pool, (shape, on_gpu)
        self.first_loss, *_ = [self() for _ in range(WARM_UP)]

    def __call__(self) -> float:
        self.loss = self.pool.submit(take_step, *self.of).result()
        return self.loss


def take_step(shape: Shape, on_gpu: bool) -> float:
    return make_step(shape, on_gpu)()


@cache
def make_step(shape: Shape, on_gpu: bool) -> Callable[[], float]:
    """A function that takes a step and returns its loss."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    m, o, classic = shape.model, shape.optim, hasattr(GPT, "setup_optimizers")
    if classic != (o.recipe == "classic"):
        raise UserError(f"--repo: {shape.name} is {o.recipe}, expected a checkout that is as well")
    device, mixed = "cuda" if on_gpu else "cpu", classic and m.compute_dtype == "bfloat16"
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32, as upstream; no effect on a CPU
    sizes = dict(sequence_len=m.seq_len, vocab_size=m.vocab_size, n_layer=m.num_layers)
    sizes |= dict(n_embd=m.model_dim, n_head=m.num_heads, n_kv_head=m.num_kv_heads)
    sizes |= {} if classic else {"window_pattern": m.window_pattern}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()
    if m.fp8_layers:
        convert_to_fp8(model)
    rates = dict(embedding_lr=o.embed_lr, unembedding_lr=o.unembed_lr)
    rates |= dict(matrix_lr=o.matrix_lr, weight_decay=shape.weight_decay)
    if classic:
        optimizers = model.setup_optimizers(**rates)
    else:
        optimizers = [model.setup_optimizer(scalar_lr=o.scalar_lr, **rates)]
    ids = torch.randint(m.vocab_size, (shape.accumulate, shape.rows, m.seq_len + 1), device=device)
    inputs, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    inputs = inputs.int() if classic else inputs
    if not classic:
        from nanochat.flash_attention import USE_FA3

        print(f"upstream computes with Flash Attention 3: {USE_FA3}", flush=True)
    run = torch.compile(model, dynamic=False)

    def step() -> float:
        total = torch.zeros((), device=device)
        for micro_inputs, micro_targets in zip(inputs, targets, strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                loss = run(micro_inputs, micro_targets) / shape.accumulate
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

    return step


def convert_to_fp8(model: Any) -> None:
    from nanochat import fp8

    def large(layer, name: str) -> bool:
        sizes = (layer.in_features, layer.out_features)
        return min(sizes) >= MIN_FP8_DIM and all(size % 16 == 0 for size in sizes)

    recipe = fp8.Float8LinearConfig.from_recipe_name("tensorwise")
    fp8.convert_to_float8_training(model, config=recipe, module_filter_fn=large)


def main() -> None:
    parser = train.parser(__doc__)
    parser.add_argument("--repo", type=Path, required=True, help="folder of an upstream checkout")
    args = parser.parse_args()
    if not (args.repo / "nanochat" / "gpt.py").is_file():
        raise UserError(f"--repo got {args.repo}, expected a checkout of karpathy/nanochat")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both need memory of the same GPU
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as upstream
    shape, on_gpu = train.start(args)[0], jax.default_backend() == "gpu"
    os.environ["NANOCHAT_DTYPE"] = shape.model.compute_dtype  # read when upstream is imported
    sys.path.insert(0, str(args.repo))  # the other process gets the same path
    ours = common.compile_fitting(shape, common.free_bytes()).start()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        steps = {f"{shape.name} ours": ours}
        steps[f"{shape.name} upstream"] = Upstream(shape, on_gpu, pool)
        common.finish("upstream_step", train.run(shape, steps, args.secs), repo=str(args.repo))


if __name__ == "__main__":
    run_main(main)
