"""What a run would be: size, text, memory, time and cost, without a GPU and without starting it.

  python scripts/plan.py --config=configs/d20.py [--gpu=H100] [--gpus=8] [--mfu=0.5] [--compile]
                          [--network=infiniband|ethernet]     between nodes of eight

--compile compiles the training step for as many devices, from shapes alone, and prints the memory
it needs; minutes for a large model.
"""

import os
import sys

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import load, parse_argv


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    options = {"gpu": "H100", "gpus": "8", "mfu": "0.5", "compile": "no", "network": "infiniband"}
    for word in rest:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in options or bool(value) == (name == "compile"):
            raise UserError(f"unknown argument {word!r}; --help shows what there is")
        options[name] = value or "yes"
    try:
        num_gpus, mfu = int(options["gpus"]), float(options["mfu"])
    except ValueError:
        raise UserError(f"--gpus and --mfu got {rest}, expected numbers") from None
    if num_gpus < 1:
        raise UserError(f"--gpus got {num_gpus}, expected at least 1")
    config = load(path, overrides)
    # Before JAX starts: as many CPU devices as there would be GPUs, to compile for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_gpus}"
    from nanochat_jax.plan import plan

    compile_step = options["compile"] == "yes"
    known = {"gpu": options["gpu"], "network": options["network"]}
    log(plan(config, **known, num_gpus=num_gpus, mfu=mfu, compile_step=compile_step))


if __name__ == "__main__":
    run_main(main)
