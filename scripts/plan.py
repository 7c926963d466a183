"""What a run would be: size, text, memory, time and cost, without a GPU and without starting it.

  python scripts/plan.py --config=configs/d20.py [--gpu=H100] [--gpus=8] [--mfu=0.5]
                         [--network=infiniband|ethernet]     between nodes of eight
  python scripts/plan.py --config=configs/d20.py --gpu=h100 --gpus=8 --compile

--compile: the real step, compiled for that GPU without having one, in some minutes: memory of each
layout and which is taken, kernels, bytes, what is sent. Needs the packages of the extra gpu.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # shapes need no accelerator

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import load, parse_argv, parse_options
from nanochat_jax.plan import NETWORKS, plan


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args = parse_options(
        rest, flags=("compile",), gpu="H100", gpus=8, mfu=0.5, network=tuple(NETWORKS)
    )
    if args.gpus < 1:
        raise UserError(f"--gpus got {args.gpus}, expected at least 1")
    if args.compile:
        from nanochat_jax.ahead.step import compile_run  # starts JAX's compiler for GPUs

        log(compile_run(load(path, overrides), gpu=args.gpu, num_gpus=args.gpus))
        return
    known = {"gpu": args.gpu, "num_gpus": args.gpus, "mfu": args.mfu, "network": args.network}
    log(plan(load(path, overrides), **known))


if __name__ == "__main__":
    run_main(main)
