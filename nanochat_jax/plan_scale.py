"""What more GPUs would bring, and where they stop bringing it: a step's terms in closed form.

A step is taken as four terms, one after the other:

  model    FLOPs of forward and backward, divided by the GPUs, at a given utilisation
  Muon     its matrices divided among the GPUs, whole ones: some have one more than others
  reduce   float32 gradients, summed and left divided (reduce-scatter)
  gather   bfloat16 working copies of the weights, from the divided masters (all-gather)

A collective over B bytes goes through both levels: within a node of G GPUs B (G-1)/G bytes pass
each GPU's NVLink, then each GPU sends its part, B/G (M-1)/M bytes for M nodes, over its share of
the network. Latencies are left out, and so is what kernels lose when a GPU has few rows: both make
small shares worse than said here. The batch stays as the recipe has it, because that decides what
is learned; so a GPU gets fewer rows the more there are, and the communication stays what it is.
"""

import functools
from dataclasses import dataclass

from nanochat_jax.hardware import Accelerator
from nanochat_jax.model.accounting import param_counts, state_bytes, train_flops_per_token
from nanochat_jax.model.gpt import GPTConfig, param_shapes
from nanochat_jax.optim.build import label

GPUS_PER_NODE = 8
# Bytes/s per GPU and direction. Within a node: bus bandwidth that NCCL reaches on NVLink 4 (H100,
# H200), 3 (A100) and 5 (B200); over PCIe 4 x16 otherwise. Between nodes: line rates, 400 Gbit/s of
# InfiniBand for each GPU, or 100 Gbit/s of Ethernet for a node of eight.
NVLINK = {
    "h100": 370e9,
    "h200": 370e9,
    "gh200": 370e9,
    "a100": 230e9,
    "b200": 700e9,
    "gb200": 700e9,
}
PCIE = 20e9
NETWORKS = {"infiniband": 50e9, "ethernet": 12.5e9 / GPUS_PER_NODE}
MUON_ITERATIONS = 5
MUON_UTILISATION = 0.6  # of the peak, by its square bfloat16 products
SAVED_VALUES = 17  # bfloat16 values of model_dim kept per token and layer for the backward pass


@dataclass(frozen=True)
class Step:
    """One training step on some GPUs; all terms in seconds."""

    num_gpus: int
    rows: int  # of a GPU
    parts: int  # in which it works through them
    model_secs: float
    muon_secs: float
    reduce_secs: float
    gather_secs: float
    memory_bytes: float  # a GPU: divided state, working copy, gradients, activations

    @property
    def secs(self) -> float:
        return self.model_secs + self.muon_secs + self.reduce_secs + self.gather_secs

    @property
    def communication_frac(self) -> float:
        return (self.reduce_secs + self.gather_secs) / self.secs

    @property
    def efficiency(self) -> float:
        """Share of the time that goes into the model when nothing overlaps."""
        return self.model_secs / self.secs

    @property
    def overlapped_efficiency(self) -> float:
        """The same when communication hides behind one part's work, as far as that lasts."""
        hidden = min(self.reduce_secs + self.gather_secs, self.model_secs / self.parts)
        return self.model_secs / (self.secs - hidden)


def step_on(
    model: GPTConfig,
    card: Accelerator,
    num_gpus: int,
    *,
    batch_rows: int,
    device_batch_size: int,
    mfu: float,
    network: str,
) -> Step:
    """A step of `batch_rows` rows over `num_gpus` GPUs, which must divide them."""
    rows = batch_rows // num_gpus
    assert rows * num_gpus == batch_rows, (batch_rows, num_gpus)
    at_once = max(n for n in range(1, min(rows, device_batch_size) + 1) if rows % n == 0)
    params = param_counts(model)["total"]
    state = state_bytes(model)
    matrices = len(muon_matrices(model))
    owned_frac = -(-matrices // num_gpus) / matrices  # of the GPU that has most
    return Step(
        num_gpus=num_gpus,
        rows=rows,
        parts=rows // at_once,
        model_secs=rows * model.seq_len * train_flops_per_token(model) / (card.peak_flops * mfu),
        muon_secs=owned_frac * muon_flops(model) / (card.peak_flops * MUON_UTILISATION),
        reduce_secs=collective_secs(4 * params, num_gpus, card, network),
        gather_secs=collective_secs(2 * params, num_gpus, card, network),
        memory_bytes=(state["params"] + state["optimizer"]) / num_gpus
        + 2 * params
        + state["grads"]
        + at_once * model.seq_len * model.num_layers * SAVED_VALUES * 2 * model.model_dim,
    )


def collective_secs(size: float, num_gpus: int, card: Accelerator, network: str) -> float:
    """Seconds to reduce-scatter or all-gather `size` bytes over all GPUs."""
    in_node = min(num_gpus, GPUS_PER_NODE)
    nodes = num_gpus / in_node
    within = size * (in_node - 1) / in_node / link_bytes_per_sec(card)
    between = size / in_node * (nodes - 1) / nodes / NETWORKS[network]
    return within + between


def link_bytes_per_sec(card: Accelerator) -> float:
    return PCIE if "pcie" in card.words else NVLINK.get(card.words[0], PCIE)


def muon_flops(model: GPTConfig) -> int:
    """FLOPs to orthogonalise all matrices once.

    An iteration on m x n, m <= n: X X' and (...) X take 2 m m n each, the square of X X' 2 m^3.
    """
    sizes = muon_matrices(model)
    return MUON_ITERATIONS * sum(4 * m * m * n + 2 * m**3 for m, n in sizes)


@functools.cache
def muon_matrices(model: GPTConfig) -> tuple[tuple[int, ...], ...]:
    """(m, n), m <= n, of every matrix that Muon steps."""
    shapes = param_shapes(model).items()
    return tuple(tuple(sorted(leaf.shape)) for path, leaf in shapes if label(path) == "muon")


def most_gpus(model: GPTConfig, card: Accelerator, *, batch_rows: int, **kw) -> tuple[Step, Step]:
    """(the most GPUs, doubling, of which each works on the model half of the time; the most that
    the batch has rows for).

    Doubling stops being divisible at the odd part of the batch; recipes have powers of two.
    """
    steps, count = [], 1
    while batch_rows % count == 0:
        steps.append(step_on(model, card, count, batch_rows=batch_rows, **kw))
        count *= 2
    return [step for step in steps if step.efficiency >= 0.5][-1], steps[-1]
