"""Where everything lives: the mesh, and one table that says how each parameter is split.

Axes (sizes from the recipe's mesh section; a size of 1 means the axis does nothing):
  data    rows of the batch; every group has its own copy of the weights
  fsdp    rows of the batch too, but weights and optimizer state are split and gathered when used
  tensor  heads, MLP width and vocabulary; rows are shared

The compiler (GSPMD) derives all communication from the placement of inputs, parameters and the row
constraint on activations, so the model code never names a device.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.common import UserError

ROWS = P(("data", "fsdp"))  # the leading dim of batches and activations

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
    if data * fsdp * tensor != len(devices):
        raise UserError(
            f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} needs {data * fsdp * tensor} "
            f"devices, got {len(devices)}; change config.mesh"
        )
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def param_spec(path: str) -> P:
    """The split of the parameter at a dotted path; a path no rule knows is a bug."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise AssertionError(f"no sharding rule for parameter {path}")


def param_shardings(mesh: Mesh, shapes: dict) -> dict[str, NamedSharding]:
    """Shardings for {path: array or shape struct}; says which parameter does not divide, if any."""
    shardings = {}
    for path, leaf in shapes.items():
        spec = param_spec(path)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"{path} {leaf.shape} cannot be split {mesh.shape[axis]} ways over mesh axis "
                    f"{axis!r}; change config.mesh.{axis} or the model's width"
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def like_params(tree, shardings: dict[str, NamedSharding], shapes: dict, mesh: Mesh):
    """Shardings for an optimizer state: a leaf kept per parameter lies where its parameter does.

    Leaves are recognised by the parameter's path as last dict key; those of another shape (Muon's
    second moment, counters) are small and lie everywhere.
    """

    def place(path, leaf):
        name = next((k.key for k in reversed(path) if hasattr(k, "key")), None)
        if name in shardings and leaf.shape == shapes[name].shape:
            return shardings[name]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def num_row_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(x: jax.Array) -> jax.Array:
    """Keep an activation split by rows; without a mesh (a lone test) nothing is said."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)
