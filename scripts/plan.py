"""What a run would be: size, text, memory, time and cost, without a GPU and without starting it.

  python scripts/plan.py --config=configs/d20.py [--gpu=H100] [--gpus=8] [--mfu=0.5]
                         [--network=infiniband|ethernet]     between nodes of eight

scripts/bench/memory.py compiles a step and says what it needs.
"""

import argparse
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # shapes need no accelerator

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import load, parse_argv
from nanochat_jax.plan import NETWORKS, plan


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--mfu", type=float, default=0.5)
    parser.add_argument("--network", default="infiniband", choices=NETWORKS)
    try:
        args, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help says what is expected") from None
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; --help lists what there is")
    if args.gpus < 1:
        raise UserError(f"--gpus got {args.gpus}, expected at least 1")
    known = {"gpu": args.gpu, "num_gpus": args.gpus, "mfu": args.mfu, "network": args.network}
    log(plan(load(path, overrides), **known))


if __name__ == "__main__":
    run_main(main)
