"""Write conversations about who the assistant is, made from a persona file, one JSON a line.

  python scripts/identity.py --out=FILE.jsonl                       configs/persona.toml
  python scripts/identity.py --persona=FILE.toml --out=FILE.jsonl --count=1000

A mixture needs no such file, `identity train` generates the same; it is there to be read, edited
and used as `json FILE.jsonl`.
"""

import argparse
import json
from pathlib import Path

from nanochat_jax.common import UserError, atomic_write, log, run_main
from nanochat_jax.tasks.identity import Identity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--persona", default="", help="default: configs/persona.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_000, help="conversations (default 1000)")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count is {args.count}, expected at least 1")
    task = Identity("train", args.persona)
    lines = [json.dumps(task.example(i), ensure_ascii=False) for i in range(args.count)]
    try:
        atomic_write(args.out, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(
            f"--out got {args.out} ({error.strerror}), expected a file to write; choose another"
        ) from None
    log(f"{args.count:,} conversations of {task.persona['name']} in {args.out}")


if __name__ == "__main__":
    run_main(main)
