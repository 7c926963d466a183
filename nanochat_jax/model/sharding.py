"""The mesh, and one table that says how each parameter is split over it.

Axes (sizes from the recipe's mesh section; a size of 1 means the axis does nothing):
  data    rows of the batch; every group has its own copy of the weights
  fsdp    rows of the batch too, but weights are split and gathered when used
  tensor  heads, MLP width and vocabulary; rows are shared

In evaluation and inference the compiler (GSPMD) derives all communication from these and from
shard_rows. Training says itself what is sent over the row axes (train/sharded.py): there data and
fsdp are the same, and masters and optimizer state are split over all devices.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.common import UserError

ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)  # the leading dim of batches and activations
OWNERS = P((*ROW_AXES, "tensor"))  # the leading dim of what each device keeps for all

# First match on the parameter's dotted path wins. Kernels are [in, out], tables [vocab, dim].
RULES = (
    (r"attn\.c_[qkv]\.kernel$", P("fsdp", "tensor")),  # [D, N*H]
    (r"c_proj\.kernel$", P("tensor", "fsdp")),  # [N*H, D] and [F, D]
    (r"mlp\.c_fc\.kernel$", P("fsdp", "tensor")),  # [D, F]
    (r"wte\.table$", P("tensor", "fsdp")),  # [V, D]
    (r"value_embeds\.\d+\.table$", P("fsdp", "tensor")),  # [V, K*H]
    (r"lm_head\.kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"(gate\.kernel|lambdas?)$", P()),  # a few numbers: everywhere
)


def make_mesh(*, data: int | None = None, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A data x fsdp x tensor grid over `devices` (default: all of all processes)."""
    devices = jax.devices() if devices is None else devices
    data = data or len(devices) // (fsdp * tensor)
    if (size := data * fsdp * tensor) != len(devices):
        needs = f"data x fsdp x tensor = {data} x {fsdp} x {tensor} needs {size} devices"
        raise UserError(f"mesh {needs}, got {len(devices)}; change config.mesh")
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def param_spec(path: str) -> P:
    """The split of the parameter at a dotted path; a path no rule knows is a bug."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise AssertionError(f"no sharding rule for parameter {path}")


def param_shardings(mesh: Mesh, shapes: dict) -> dict[str, NamedSharding]:
    """Shardings for {path: array or shape struct}; UserError if a parameter does not divide."""
    shardings = {}
    for path, leaf in shapes.items():
        spec = param_spec(path)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % (ways := mesh.shape[axis]):
                what = f"{path} {leaf.shape} cannot be split {ways} ways over mesh axis {axis!r}"
                raise UserError(f"{what}; change config.mesh.{axis} or the model's width")
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def num_row_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(x: jax.Array) -> jax.Array:
    """Keep an activation split by rows, except without a mesh (in a test) and inside a training
    step's shard_map, where a device has its own rows only."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or ROW_AXES[0] in mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)
