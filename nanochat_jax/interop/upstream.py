"""Names and layouts of upstream nanochat's weights, beside ours.

A torch Linear keeps its weight [out, in], our kernels are [in, out]: these are transposed. Tables
and scalars are the same. A name that the table does not know is an error, so nothing is dropped.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from nanochat_jax.common import UserError

Array = TypeVar("Array", np.ndarray, jax.Array)

# upstream's name: ours; {i} is the number of a layer. What ends with "kernel" is transposed.
NAMES = {
    "transformer.wte.weight": "wte.table",
    "transformer.h.{i}.attn.c_q.weight": "blocks.{i}.attn.c_q.kernel",
    "transformer.h.{i}.attn.c_k.weight": "blocks.{i}.attn.c_k.kernel",
    "transformer.h.{i}.attn.c_v.weight": "blocks.{i}.attn.c_v.kernel",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attn.c_proj.kernel",
    "transformer.h.{i}.attn.ve_gate.weight": "blocks.{i}.attn.ve_gate.kernel",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.c_fc.kernel",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.c_proj.kernel",
    "lm_head.weight": "lm_head.kernel",
    "value_embeds.{i}.weight": "value_embeds.{i}.table",
    "smear_gate.weight": "smear_gate.kernel",
    "smear_lambda": "smear_lambda",
    "backout_lambda": "backout_lambda",
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
}


def our_path(name: str) -> str:
    """Our dotted path of an upstream weight."""
    for upstream, ours in NAMES.items():
        pattern = re.escape(upstream).replace(r"\{i\}", "(0|[1-9][0-9]*)")
        if match := re.fullmatch(pattern, name):
            return ours.replace("{i}", "".join(match.groups()))
    raise UserError(f"got the weight {name!r}, expected a name of upstream nanochat's GPT")


def params_from_upstream(state: Mapping[str, Array]) -> dict[str, Array]:
    """Our flat parameters for an upstream state dict."""
    params = {our_path(name): value for name, value in state.items()}
    return {path: v.T if path.endswith("kernel") else v for path, v in params.items()}
