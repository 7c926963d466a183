"""Peak memory of a training step with and without each measure against it; one JSON line last.

  python scripts/bench/memory.py                       d20, 32 rows of 2,048 tokens a device
  python scripts/bench/memory.py --shape=tiny --devices=2

Nothing runs: each step is compiled from shapes alone, on a CPU too. Every line differs from the
first by one measure. By the compiler's own analysis, of a device. On a CPU all is too high: its
compiler computes bfloat16 in float32, and without fused attention the scores are kept.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.common import UserError, run_main
from nanochat_jax.model import fp8
from nanochat_jax.model.loss import cross_entropy_sum
from nanochat_jax.model.sharding import make_mesh
from scripts.bench import common
from scripts.bench.train import naive_sum

MEASURES = {  # name: changes of the model
    "tiled loss, bfloat16": {},
    "attention [T, T]": {"attention_backend": "xla"},
    "all logits at once": {},
    "float32": {"compute_dtype": "float32"},
    "fp8": {"fp8_layers": tuple(fp8.LAYERS)},
    "remat names": {"remat": "names"},
    "remat full": {"remat": "full"},
    "state shared by all devices": {},
    "remat full, state shared by all devices": {"remat": "full"},
}


def main() -> None:
    parser = common.parser(__doc__, secs=0)
    parser.add_argument("--devices", type=int, default=8, help="that share the state")
    args = parser.parse_args()
    # Before the devices start: fake ones, where there is no GPU, and no time spent on machine code.
    flags = f"--xla_force_host_platform_device_count={args.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = flags
    if len(jax.devices()) < args.devices:
        raise UserError(f"--devices got {args.devices}, expected at most {len(jax.devices())}")
    shape = common.load_shape(args.shape or "d20", "gpu")
    shape = replace(shape, accumulate=1)
    rows = []
    for name, changes in MEASURES.items():
        changed = replace(shape, model=replace(shape.model, **changes))
        devices = jax.devices()[: args.devices if "shared" in name else 1]
        mesh = make_mesh(data=len(devices), devices=devices)
        loss_sum = naive_sum if "logits" in name else cross_entropy_sum
        rows.append({"what": name, "mib": common.Training(changed, mesh, loss_sum).bytes / 2**20})
    common.finish("memory", rows, shape=shape.name, rows_at_once=shape.rows, devices=args.devices)


if __name__ == "__main__":
    run_main(main)
