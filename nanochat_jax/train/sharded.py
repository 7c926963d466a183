"""What each device keeps between steps: its share of every array, no two devices the same numbers.

  by path  {"blocks.3.attn.c_q.kernel": [D, N*H], ...}              model, checkpoints, conversions
  owned    {"blocks.512x512": [K, 512, 512], "wte.table": [V, D]}   masters and optimizer state

Matrices of the blocks that have the same shape form a stack, which is split by matrix: a device has
all of a matrix that it owns, so Muon sends nothing. Tables and head are split by rows. Scalars and
the smear gate lie everywhere. Leading dims are padded with zeros, which stay 0 under every
optimizer here, to a multiple of the number of devices.

This is the idea of ZeRO (arXiv 1910.02054): once a step the weights are gathered, each device adds
up the gradient of its own rows, and the sum over all devices goes back to the owner.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.model.sharding import OWNERS, ROW_AXES, ROWS, param_shardings, param_spec


class Owners:
    """The two forms of a model's parameters on a mesh, and the ways between them.

    by_path(params): masters by path, placed for evaluation and inference
    to_paths(tree), to_owned(tree): to and from the on-disk form (by path, split by rows where rows
    divide) without gathering anything; each dict in the tree keyed by parameters changes its form
    """

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.alone = mesh.size == mesh.shape["tensor"]  # there is one row shard
        shapes = param_shapes(config)
        placed = param_shardings(mesh, shapes)
        self.rows = {path: leaf.shape[0] for path, leaf in shapes.items()}
        self.members: dict[str, list[str]] = {}  # owned name: paths
        for path, leaf in shapes.items():
            name = "blocks." + "x".join(map(str, leaf.shape)) if _is_stack(path) else path
            self.members.setdefault(name, []).append(path)
        self.everywhere = {n for n in self.members if not _is_stack(n) and param_spec(n) == P()}
        self.by_path = jax.jit(lambda params: _place(self.split(self._turn(params)), placed))
        self.to_paths = jax.jit(lambda tree: self._by_rows(self._split_tree(self._turn(tree))))

    def to_owned(self, tree):
        places = self.shardings(jax.eval_shape(self.owned, tree))
        return jax.jit(self.owned, out_shardings=places)(tree)

    def join(self, by_path: dict) -> dict:
        """By path -> owned, of parameters or of anything kept per parameter."""

        def join_one(name, values):
            if isinstance(values[0], optax.MaskedNode):  # another optimizer's
                return values[0]
            whole = jnp.stack(values) if _is_stack(name) else values[0]
            padding = 0 if name in self.everywhere else -len(whole) % self.mesh.size
            return jnp.pad(whole, [(0, padding)] + [(0, 0)] * (whole.ndim - 1))

        return {n: join_one(n, [by_path[p] for p in paths]) for n, paths in self.members.items()}

    def split(self, owned: dict) -> dict:
        """Owned -> by path."""
        by_path = {}
        for name, paths in self.members.items():
            for index, path in enumerate(paths):
                whole = owned[name]
                if not isinstance(whole, optax.MaskedNode):
                    whole = whole[index] if _is_stack(name) else whole[: self.rows[path]]
                by_path[path] = whole
        return {path: by_path[path] for path in self.rows}

    def owned(self, tree):
        """A tree by path in its owned form; for use inside jit, with `shardings` for its place."""
        return self._turn(self._map_dicts(self.join, self.rows, self._by_rows(tree)))

    def shardings(self, tree):
        """Where the leaves of an owned tree lie."""

        def place(path, _leaf):
            names = {key.key for key in path if hasattr(key, "key")}
            mine = names & (self.members.keys() - self.everywhere)
            return NamedSharding(self.mesh, OWNERS if mine else P())

        return jax.tree_util.tree_map_with_path(place, tree)

    def on_disk(self, tree):
        """The on-disk form of an owned tree of shapes, as shapes with shardings."""
        shapes = jax.eval_shape(self._split_tree, tree)
        return jax.tree.map(lambda a: a.update(sharding=self._row_sharding(a)), shapes)

    # Inside a step's shard_map over the row axes, where an owned array is this device's share.

    def specs(self) -> dict[str, P]:
        return {name: P() if name in self.everywhere else ROWS for name in self.members}

    def gather(self, shares: dict, dtype) -> dict:
        """All weights by path in the compute dtype; those that lie everywhere in float32."""

        def gather_one(name, share):
            if name in self.everywhere:
                return share
            share = share.astype(dtype)
            return share if self.alone else lax.all_gather(share, ROW_AXES, tiled=True)

        def split_by_tensor(path, weight):
            spec = P(*(axis if axis == "tensor" else None for axis in param_spec(path)))
            return lax.with_sharding_constraint(weight, spec)

        weights = self.split({name: gather_one(name, share) for name, share in shares.items()})
        if self.mesh.shape["tensor"] == 1:
            return weights
        return {path: split_by_tensor(path, weight) for path, weight in weights.items()}

    def scatter(self, grads: dict) -> dict:
        """This device's share of the sum over all devices of gradients by path."""

        def scatter_one(name, grad):
            if self.alone:
                return grad
            if name in self.everywhere:
                return lax.psum(grad, ROW_AXES)
            return lax.psum_scatter(grad, ROW_AXES, tiled=True)

        return {name: scatter_one(name, grad) for name, grad in self.join(grads).items()}

    def _split_tree(self, tree):
        return self._map_dicts(self.split, self.members, tree)

    def _map_dicts(self, function, names: dict, tree):
        def is_keyed(node) -> bool:
            return isinstance(node, dict) and node.keys() == names.keys()

        return jax.tree.map(lambda n: function(n) if is_keyed(n) else n, tree, is_leaf=is_keyed)

    def _turn(self, tree):
        """Split stacks by rows of their matrices, so that (un)stacking moves nothing."""
        by_rows = NamedSharding(self.mesh, P(None, *OWNERS))

        def turn(leaf):
            divides = leaf.ndim == 3 and leaf.shape[1] % self.mesh.size == 0
            return lax.with_sharding_constraint(leaf, by_rows) if divides else leaf

        return jax.tree.map(turn, tree)

    def _by_rows(self, tree):
        return _place(tree, jax.tree.map(self._row_sharding, tree))

    def _row_sharding(self, leaf) -> NamedSharding:
        divides = leaf.ndim > 1 and leaf.shape[0] % self.mesh.size == 0
        return NamedSharding(self.mesh, OWNERS if divides else P())


def _is_stack(name: str) -> bool:
    return name.startswith("blocks.")


def _place(tree, shardings):
    return jax.tree.map(lax.with_sharding_constraint, tree, shardings)
