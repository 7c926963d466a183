"""Compare what this package computes with a folder of reference numbers; fail on any difference.

  python scripts/parity.py tests/goldens --core-data=DIR

Prints a line for everything compared. A number that is off, a file or a key that no comparison
reads, a file that is missing: exit status 1.
"""

import argparse
from pathlib import Path

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.parity.folder import compare_folder, table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder laid out as tests/goldens/README.md says")
    help = "folder of CORE's tasks, like the evaluation bundle; default FOLDER/../data/core"
    parser.add_argument("--core-data", type=Path, help=help)
    options = parser.parse_args(argv)
    beside = options.folder.resolve().parent / "data" / "core"
    core_data = options.core_data or (beside if beside.is_dir() else None)
    if core_data and not core_data.is_dir():
        raise UserError(f"--core-data got {core_data}, expected a folder of CORE tasks")
    rows, not_covered = compare_folder(options.folder, core_data)
    log(table(rows, not_covered))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
