"""A reference model, rebuilt as ours from the numbers in its files.

Sizes and learning rates come from the json. What a generation fixes (rotary base, extras, betas)
comes from the recipe that people train with, so that the recipe itself is compared too.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax import recipe
from nanochat_jax.config import CONFIGS, load
from nanochat_jax.interop.upstream import params_from_upstream
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.optim.build import OptimConfig
from nanochat_jax.parity.reference import Reference, Row

RECIPES = {"classic": CONFIGS / "d20.py", "modern": CONFIGS / "gpt2.py"}
KEYS = {  # the reference's word: ours
    "config.sequence_len": "model.seq_len",
    "config.vocab_size": "tokenizer.vocab_size",
    "config.n_layer": "model.depth",
    "config.n_head": "model.num_heads",
    "config.n_kv_head": "model.num_kv_heads",
    "config.n_embd": "model.model_dim",
    "config.window_pattern": "model.window_pattern",
    "optimizer.embedding_lr": "optim.embed_lr",
    "optimizer.unembedding_lr": "optim.unembed_lr",
    "optimizer.matrix_lr": "optim.matrix_lr",
    "optimizer.scalar_lr": "optim.scalar_lr",
}


@dataclass(frozen=True)
class Case:
    """arrays and settings: the two files of a model."""

    arrays: Reference
    settings: Reference
    config: GPTConfig
    optim: OptimConfig
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


def read_case(arrays: Reference, settings: Reference, generation: str) -> Case:
    overrides = {"model.compute_dtype": "float32"}
    for theirs, ours in KEYS.items():
        if theirs in settings:
            overrides[ours] = str(settings[theirs]).upper()
    config = load(RECIPES[generation], overrides)
    o = config.optim
    params = params_from_upstream(arrays["state"])
    return Case(
        arrays=arrays,
        settings=settings,
        config=recipe.gpt_config(config),
        optim=recipe.optim_config(config, "cpu", embed_lr=o.embed_lr, unembed_lr=o.unembed_lr),
        params={path: jnp.asarray(value, jnp.float32) for path, value in params.items()},
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
