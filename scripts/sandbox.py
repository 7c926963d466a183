"""What the sandbox for generated programs enforces on this machine.

  python scripts/sandbox.py
  python scripts/sandbox.py --humaneval=HumanEval.jsonl

The second also tries the sandbox on the problems of a file: every canonical solution must pass, and
every one with a wrong body must not. Exit status 1 if any verdict is wrong.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.tasks.humaneval import HumanEval, program
from nanochat_jax.tools.sandbox import protections, run_programs

# Bodies that are wrong for any problem, taken in turn, and one that costs its whole time.
WRONG = (
    "return None",
    "pass",
    "raise ValueError('wrong')",
    "return undefined_name",
    "this is not Python",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "import os; print('ok', flush=True); os.kill(os.getpid(), 9); os._exit(0)",
    "return [0] * 10**12",
    "import socket; return socket.create_connection(('127.0.0.1', 22))",
    "import os; return os.fork()",
)
ENDLESS, NUM_ENDLESS = "while True: pass", 4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--humaneval", type=Path, help="a file with a problem in JSON per line")
    parser.add_argument("--workers", type=int, help="programs at a time, by default one per CPU")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise UserError(
            f"--workers got {args.workers}, expected 1 or more; the default is one per CPU"
        )
    for protection in protections():
        log(str(protection))
    return check(args.humaneval, args.workers) if args.humaneval else 0


def check(path: Path, workers: int | None) -> int:
    """Run canonical and wrong solutions of all problems; 1 if a verdict is not what it must be."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--humaneval got {path} ({error}), expected JSON lines") from None
    task = HumanEval(rows)
    right = [conversation["messages"][1]["content"] for conversation in task]
    bodies = [WRONG[i % len(WRONG)] for i in range(len(rows) - NUM_ENDLESS)]
    bodies = ([ENDLESS] * NUM_ENDLESS + bodies)[: len(rows)]
    wrong = [row["prompt"] + f"    {body}\n" for row, body in zip(rows, bodies, strict=True)]
    sources = [
        program(row["prompt"], answer, row["test"], row["entry_point"])
        for answers in (right, wrong)
        for row, answer in zip(rows, answers, strict=True)
    ]
    start = time.monotonic()
    outcomes = run_programs(sources, workers=workers)
    secs = time.monotonic() - start
    mistaken = 0
    for name, part in (("canonical", outcomes[: len(rows)]), ("wrong", outcomes[len(rows) :])):
        statuses = Counter(outcome.status for outcome in part)
        log(f"{name:<12} {', '.join(f'{n} {status}' for status, n in statuses.most_common())}")
        for row, outcome in zip(rows, part, strict=True):
            if (outcome.status == "ok") != (name == "canonical"):
                mistaken += 1
                log(f"  {row['task_id']}: {outcome.status}, {outcome.stderr.strip()[-200:]!r}")
    log(f"{len(outcomes)} programs in {secs:.1f} s, {mistaken} wrong verdicts")
    return bool(mistaken)


if __name__ == "__main__":
    run_main(main)
