"""Look after the training text.

python scripts/data.py list                               the datasets, what of them is here
python scripts/data.py ensure --config=configs/demo.py    have config.data.name, however it comes
python scripts/data.py download --config=configs/d20.py --config.data.num_shards=8
python scripts/data.py pack --config.data.local_dir=FOLDER    make shards of your own text
python scripts/data.py demo                               make the demo's shards
"""

import sys

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import load, parse_argv
from nanochat_jax.data import datasets

COMMANDS = ("list", "ensure", "download", "pack", "demo")


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    if len(rest) != 1 or rest[0] not in COMMANDS:
        raise UserError(f"got {' '.join(rest) or 'no command'}, expected one of {COMMANDS}; --help")
    command, config = rest[0], load(path, overrides).data
    if command == "list":
        log(datasets.table(config.local_dir))
        return
    name = {"pack": "local", "demo": "demo"}.get(command, config.name)
    if command == "download" and not datasets.get(name).repo_id:
        verb = "pack" if name == "local" else "demo"
        raise UserError(f"{name} is made on this machine; run `python scripts/data.py {verb}`")
    again = command in ("pack", "demo")
    train, validation = datasets.ensure(
        name, num_shards=config.num_shards, local_dir=config.local_dir, again=again
    )
    log(f"{name}: {len(train)} training shards and {validation.name} in {validation.parent}")
    if name == "local" and not again:
        log("if your files have changed, `python scripts/data.py pack` packs them again")


if __name__ == "__main__":
    run_main(main)
