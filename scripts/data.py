"""Look after the training text.

  python scripts/data.py list
  python scripts/data.py ensure   --config=configs/demo.py
  python scripts/data.py download --config=configs/d20.py [--num-shards=N]
  python scripts/data.py pack     --config.data.local_dir=FOLDER
  python scripts/data.py demo

list shows the datasets and what of them is on the disk. ensure makes config.data.name available,
in whatever way it comes; nothing when it is there. download fetches config.data.num_shards (or
N) training shards of config.data.name and its validation shard, and continues what was interrupted.
pack makes shards of your own .parquet, .jsonl, .txt and .md files; demo builds the demo shards.
"""

import sys

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import load, parse_argv
from nanochat_jax.data import datasets

COMMANDS = ("list", "ensure", "download", "pack", "demo")


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    for word in [word for word in rest if word.startswith("--num-shards=")]:
        overrides["data.num_shards"] = word.partition("=")[2]
        rest.remove(word)
    if len(rest) != 1 or rest[0] not in COMMANDS:
        raise UserError(f"got {' '.join(rest) or 'no command'}, expected one of {COMMANDS}; --help")
    config = load(path, overrides).data
    command = rest[0]
    if command == "list":
        log(datasets.table(config.local_dir))
        return
    name = {"pack": "local", "demo": "demo"}.get(command, config.name)
    if command == "download" and not datasets.get(name).repo_id:
        verb = "pack" if name == "local" else "demo"
        raise UserError(f"{name} is made on this machine; run `python scripts/data.py {verb}`")
    train, validation = datasets.ensure(
        name,
        num_shards=config.num_shards,
        local_dir=config.local_dir,
        again=command in ("pack", "demo"),
    )
    log(f"{name}: {len(train)} training shards and {validation.name} in {validation.parent}")


if __name__ == "__main__":
    run_main(main)
