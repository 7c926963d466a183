"""What the sandbox for generated programs enforces on this machine.

  python scripts/sandbox.py
  python scripts/sandbox.py --humaneval=HumanEval.jsonl

The second also runs a file's problems: every canonical solution must pass, and every one with a
wrong body must not. Exit status 1 if any verdict is wrong.
"""

import argparse
from pathlib import Path

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.sources import SOURCES, read_rows
from nanochat_jax.tools.sandbox import statement

# Bodies that are wrong for any problem, taken in turn.
WRONG = """\
return None
raise ValueError('wrong')
this is not Python
import os; os._exit(0)
import os; return os.fork()
return [0] * 10**12""".splitlines()


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--humaneval", type=Path, help="a file with a problem in JSON per line")
    parser.add_argument("--workers", type=int, help="programs at a time, by default one per CPU")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers got {args.workers}, expected 1 or more")
    for line in statement():
        log(line)
    return check(args.humaneval, args.workers) if args.humaneval else 0


def check(path: Path, workers: int | None) -> int:
    """Grade canonical and wrong solutions of all problems; 1 if any verdict is wrong."""
    rows = list(read_rows(path, SOURCES["humaneval"].row))
    task = HumanEval(rows, workers=workers)
    bodies = [*WRONG, "while True: pass", *WRONG * len(rows)][: len(rows)]  # one takes its time
    right = task.grade([(i, task[i]["messages"][1]["content"]) for i in range(len(rows))])
    wrong = task.grade([(i, f"{rows[i]['prompt']}    {b}\n") for i, b in enumerate(bodies)])
    log(f"canonical solutions: {sum(right)} of {len(rows)} pass; wrong ones: {sum(wrong)} pass")
    return int(not all(right) or any(wrong))


if __name__ == "__main__":
    run_main(main)
