"""Names and layouts of upstream nanochat's weights, beside ours: one table, read both ways.

A torch Linear keeps its weight [out, in], our kernels are [in, out]: these are transposed. Tables
and scalars are the same. A name that the table does not know is an error in both directions, so
nothing is dropped on the way.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from nanochat_jax.common import UserError

Array = TypeVar("Array", np.ndarray, jax.Array)

# upstream's name, ours, whether the matrix is transposed; {i} is the number of a layer.
NAMES = (
    ("transformer.wte.weight", "wte.table", False),
    ("transformer.h.{i}.attn.c_q.weight", "blocks.{i}.attn.c_q.kernel", True),
    ("transformer.h.{i}.attn.c_k.weight", "blocks.{i}.attn.c_k.kernel", True),
    ("transformer.h.{i}.attn.c_v.weight", "blocks.{i}.attn.c_v.kernel", True),
    ("transformer.h.{i}.attn.c_proj.weight", "blocks.{i}.attn.c_proj.kernel", True),
    ("transformer.h.{i}.attn.ve_gate.weight", "blocks.{i}.attn.ve_gate.kernel", True),
    ("transformer.h.{i}.mlp.c_fc.weight", "blocks.{i}.mlp.c_fc.kernel", True),
    ("transformer.h.{i}.mlp.c_proj.weight", "blocks.{i}.mlp.c_proj.kernel", True),
    ("lm_head.weight", "lm_head.kernel", True),
    ("value_embeds.{i}.weight", "value_embeds.{i}.table", False),
    ("smear_gate.weight", "smear_gate.kernel", True),
    ("smear_lambda", "smear_lambda", False),
    ("backout_lambda", "backout_lambda", False),
    ("resid_lambdas", "resid_lambdas", False),
    ("x0_lambdas", "x0_lambdas", False),
)


def our_path(name: str) -> tuple[str, bool]:
    """(our dotted path, transposed) of an upstream weight."""
    for upstream, ours, transposed in NAMES:
        if path := _translate(name, upstream, ours):
            return path, transposed
    raise UserError(f"got the weight {name!r}, expected a name of upstream nanochat's GPT")


def upstream_name(path: str) -> tuple[str, bool]:
    """(upstream's name, transposed) of a parameter of ours."""
    for upstream, ours, transposed in NAMES:
        if name := _translate(path, ours, upstream):
            return name, transposed
    raise UserError(f"got the parameter {path!r}, expected one that upstream nanochat has too")


def params_from_upstream(state: Mapping[str, Array]) -> dict[str, Array]:
    """Our flat parameters for an upstream state dict."""
    params = {}
    for name, value in state.items():
        path, transposed = our_path(name)
        params[path] = value.T if transposed else value
    return params


def params_to_upstream(params: Mapping[str, Array]) -> dict[str, Array]:
    """An upstream state dict for our flat parameters."""
    state = {}
    for path, value in params.items():
        name, transposed = upstream_name(path)
        state[name] = value.T if transposed else value
    return state


def _translate(name: str, pattern: str, into: str) -> str | None:
    """`name` written as `into` says, where it fits `pattern`."""
    fits = re.escape(pattern).replace(r"\{i\}", r"(?P<layer>0|[1-9][0-9]*)")
    match = re.fullmatch(fits, name)
    return into.replace("{i}", match.groupdict().get("layer", "")) if match else None
