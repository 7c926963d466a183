"""The parts of a training step alone, each in turn with what it is compared to; JSON line last.

python scripts/bench/kernels.py attention loss --shape=d20     also: optimizer, matmul

attention  one layer with its gradients, by every backend that runs here and by its definition,
           full and with a window of a quarter of the row; FLOPs of the visible pairs
loss       cross entropy with its gradients, in tiles and by its definition
optimizer  the update of all parameters; FLOPs of Muon
matmul     what this device reaches: a copy, and products x w' of MxK and NxK in bfloat16 and fp8
           (quantised before), large ones and those of a step
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.common import run_main
from nanochat_jax.model import attention as att
from nanochat_jax.model import fp8
from nanochat_jax.model.gpt import init_params
from nanochat_jax.model.loss import cross_entropy_sum
from nanochat_jax.optim.build import label
from nanochat_jax.optim.muon import NEWTON_SCHULZ
from nanochat_jax.train.sharded import Owners
from nanochat_jax.train.step import loss_tile
from scripts.bench import common
from scripts.bench.common import Form, Shape
from scripts.bench.train import naive_sum


def attention(shape: Shape, secs: float) -> list[dict]:
    c, rows = shape.model, []
    of_q, of_k = ((shape.rows, c.seq_len, n, c.head_dim) for n in (c.num_heads, c.num_kv_heads))
    arrays = common.random_arrays(c.compute_dtype, of_q, of_k, of_k, of_q)
    for what, window in (("full", None), ("quarter", c.seq_len // 4)):
        flops = 3.5 * 4 * shape.rows * c.model_dim * visible_pairs(c.seq_len, window)
        attends = {name: partial(att.attention, backend=name) for name in att.candidates()}
        forms = {
            f"attention {name} {what}": Form(with_gradients(attend, window), arrays, flops)
            for name, attend in (attends | {"naive": att.attention_naive}).items()
        }
        rows += common.measure(forms, secs / 2)
    return rows


def with_gradients(attend, window: int | None):
    def function(q, k, v, dy):
        y, pull = jax.vjp(partial(attend, window=window), q, k, v)
        return y, *pull(dy)

    return function


def visible_pairs(seq_len: int, window: int | None) -> int:
    """(query, key) pairs of one head and row."""
    reach = seq_len if window is None else window + 1
    return sum(min(position, reach) for position in range(1, seq_len + 1))


def loss(shape: Shape, secs: float) -> list[dict]:
    c, rows, V = shape.model, shape.rows, shape.model.vocab_size
    (x,) = common.random_arrays(c.compute_dtype, (rows, c.seq_len, c.model_dim))
    head = common.random_arrays("float32", (c.model_dim, V))[0] / c.model_dim**0.5
    targets = common.random_batch(0, rows, c.seq_len, V)["targets"]
    weights = jnp.full(targets.shape, 1 / targets.size)
    flops = 6 * targets.size * c.model_dim * V

    def form(loss_sum, tile: int) -> Form:
        def function(x, head):
            return loss_sum(x, head, targets, weights, V, tile)

        return Form(jax.value_and_grad(function, (0, 1)), (x, head), flops)

    tiled = form(cross_entropy_sum, loss_tile(shape.tile_tokens, rows, c.seq_len))
    return common.measure({"loss tiled": tiled, "loss naive": form(naive_sum, 0)}, secs)


def optimizer(shape: Shape, secs: float) -> list[dict]:
    owners, tx = Owners(shape.model, common.one_device()), common.optimizer(shape)
    params = owners.to_owned(init_params(shape.model, jax.random.key(0)))  # stacks, as in training
    arrays = common.random_arrays("float32", *(p.shape for p in params.values()))
    grads = dict(zip(params, arrays, strict=True))

    def update(params, grads, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    flops = sum(muon_flops(p.shape) for path, p in params.items() if label(path) == "muon")
    return common.measure(
        {"optimizer": Form(update, (params, grads, tx.init(params)), flops)}, secs
    )


def muon_flops(shape: tuple[int, ...]) -> int:
    """Of orthogonalising a stack: per polynomial X X', its square, and their product with X."""
    stack, short, long = shape[0], *sorted(shape[1:])
    return stack * len(NEWTON_SCHULZ) * (4 * short**2 * long + 2 * short**3)


def matmul(shape: Shape, secs: float) -> list[dict]:
    c, tokens, gpu = shape.model, shape.rows * shape.model.seq_len, jax.default_backend() == "gpu"
    D, V, large = c.model_dim, c.padded_vocab_size, 8_192 if gpu else 256
    (array,) = common.random_arrays("float32", (2**30 if gpu else 2**22,))
    copy = Form(jnp.negative, (array,), 2 * array.nbytes, "copy")
    rows, tile = common.measure({"copy": copy}, secs / 5), min(tokens, shape.tile_tokens)
    for M, K, N in ((large, large, large), (tokens, D, D), (tokens, D, 4 * D), (tile, D, V)):
        x, w = common.random_arrays("bfloat16", (M, K), (N, K))
        in_fp8 = [fp8.quantise(array, fp8.E4M3) for array in (x, w)]
        multiply = partial(fp8.product, axis_a=(1,), axis_b=(1,), dtype=jnp.bfloat16)
        forms = {
            f"matmul {M}x{K}x{N} {kind}": Form(multiply, operands, 2 * M * K * N, kind)
            for kind, operands in (("bf16", (x, w)), ("fp8", in_fp8))
        }
        rows += common.measure(forms, secs / 5)
    return rows


KERNELS = {"attention": attention, "loss": loss, "optimizer": optimizer, "matmul": matmul}


def run(shape: Shape, kernel: str, secs: float) -> list[dict]:
    rows = KERNELS[kernel](shape, secs)
    return [row | {"what": f"{shape.name} {row['what']}"} for row in rows]


def main() -> None:
    parser = common.parser(__doc__, secs=15.0)
    parser.add_argument("kernels", nargs="+", choices=KERNELS)
    args = parser.parse_args()
    shapes = common.chosen_shapes(args)
    rows = [run(shape, kernel, args.secs) for shape in shapes for kernel in args.kernels]
    common.finish("kernels", sum(rows, []))


if __name__ == "__main__":
    run_main(main)
