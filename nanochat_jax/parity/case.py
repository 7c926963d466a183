"""A reference model, rebuilt as ours from the numbers in its files.

Sizes come from the json. What a generation fixes (rotary base, extras, optimizer) comes from the
recipe that people train with, so that the recipe itself is compared too.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.config import CONFIGS, Recipe, load
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.parity.reference import Reference, Row
from nanochat_jax.recipe import gpt_config

RECIPES = {"classic": CONFIGS / "d20.py", "modern": CONFIGS / "gpt2.py"}
SIZES = {
    "sequence_len": "model.seq_len",
    "vocab_size": "tokenizer.vocab_size",
    "n_layer": "model.depth",
    "n_head": "model.num_heads",
    "n_kv_head": "model.num_kv_heads",
    "n_embd": "model.model_dim",
    "window_pattern": "model.window_pattern",  # classic has none
}


@dataclass(frozen=True)
class Case:
    """arrays and settings: the two files of a model."""

    arrays: Reference
    settings: Reference
    recipe: Recipe  # of the generation, with the sizes of the json
    config: GPTConfig
    params: dict[str, jax.Array]
    mesh: Mesh

    @property
    def batch(self) -> dict[str, jax.Array]:
        keys = {"inputs": "idx", "targets": "targets"}
        return {ours: jnp.asarray(self.arrays[key], jnp.int32) for ours, key in keys.items()}

    @property
    def tile(self) -> int:
        """Time steps of a loss tile, so that there are several and the last one is not full."""
        return next((n for n in (7, 5, 3) if self.arrays["idx"].shape[1] % n), 7)

    def arrays_of_params(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below `prefix`, by our names and in our layout."""
        return params_from_upstream(self.arrays[prefix])

    def compare_shapes(self, what: str) -> Row:
        ours = {path: leaf.shape for path, leaf in param_shapes(self.config).items()}
        return self.arrays.compare(what, ours, {path: v.shape for path, v in self.params.items()})


def read_case(
    arrays: Reference,
    settings: Reference,
    generation: str,
    weights: str = "state",
    sizes: str = "config",
) -> Case:
    """weights, sizes: what stands before the keys of the weights ("": nothing) and the sizes."""
    overrides = {"model.compute_dtype": "float32"}
    for theirs, ours in SIZES.items():
        if f"{sizes}.{theirs}" in settings or theirs != "window_pattern":
            overrides[ours] = str(settings[f"{sizes}.{theirs}"]).upper()
    recipe = load(RECIPES[generation], overrides)
    params = params_from_upstream(arrays[weights] if weights else arrays)
    return Case(
        arrays=arrays,
        settings=settings,
        recipe=recipe,
        config=gpt_config(recipe),
        params={path: jnp.asarray(value, jnp.float32) for path, value in params.items()},
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
