"""The reference model of one generation, rebuilt as ours from the numbers in its two files.

Sizes come from the json; what makes the generation (rotary base, extras, optimizer) comes from the
recipe people train with, so that the recipe itself is compared too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.config import CONFIGS, load
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.parity.reference import Reference, read_arrays, read_settings
from nanochat_jax.recipe import gpt_config

RECIPES = {"classic": CONFIGS / "d20.py", "modern": CONFIGS / "gpt2.py"}
SIZES = {
    "sequence_len": "model.seq_len",
    "vocab_size": "tokenizer.vocab_size",
    "n_layer": "model.depth",
    "n_head": "model.num_heads",
    "n_kv_head": "model.num_kv_heads",
    "n_embd": "model.model_dim",
    "window_pattern": "model.window_pattern",
}


@dataclass(frozen=True)
class Case:
    """arrays and settings: the two files; ids and targets [B, T] of the one batch in them."""

    arrays: Reference
    settings: Reference
    recipe: Any  # the ConfigDict of the generation
    config: GPTConfig
    params: dict[str, jax.Array]
    ids: jax.Array
    targets: jax.Array
    mesh: Mesh

    @property
    def tile(self) -> int:
        """Time steps of a loss tile: several tiles, and a last one that is not full."""
        return next((n for n in (7, 5, 3) if self.ids.shape[1] % n), 7)

    def take_params(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays by upstream's names below `prefix`, under our names and in our layout."""
        return params_from_upstream(self.arrays.under(prefix))


def read_case(folder: Path, generation: str) -> Case:
    """Raises UserError for a file that is missing or broken, KeyError for a key."""
    arrays = read_arrays(folder / f"{generation}.npz")
    settings = read_settings(folder / f"{generation}.json")
    overrides = {"model.compute_dtype": "float32"}
    for theirs, ours in SIZES.items():
        if theirs != "window_pattern" or f"config.{theirs}" in settings:  # classic has none
            overrides[ours] = str(settings.take(f"config.{theirs}")).upper()
    recipe = load(RECIPES[generation], overrides)
    params = params_from_upstream(arrays.under("state/"))
    return Case(
        arrays=arrays,
        settings=settings,
        recipe=recipe,
        config=gpt_config(recipe),
        params={path: jnp.asarray(value, jnp.float32) for path, value in params.items()},
        ids=jnp.asarray(arrays.take("idx"), jnp.int32),
        targets=jnp.asarray(arrays.take("targets"), jnp.int32),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 on one device, whatever the process is set to."""
    with (
        jax.default_matmul_precision("highest"),
        jax.enable_x64(False),
        jax.default_device(jax.devices()[0]),
    ):
        yield
