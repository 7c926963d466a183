"""Look after the checkpoints of a run.

  python scripts/checkpoint.py list    RUN [STAGE]            steps, sizes, validation bpb
  python scripts/checkpoint.py verify  RUN [STAGE] [--step=N] every file against its checksum
  python scripts/checkpoint.py prune   RUN  STAGE  [--keep=N] all but the newest N and the best
  python scripts/checkpoint.py digest  RUN  STAGE  [--step=N] one SHA-256 over the parameters

RUN is a name in $NANOCHAT_BASE_DIR/runs, STAGE one of base, mid, sft, rl.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading files needs no accelerator

from nanochat_jax.common import UserError, log, run_dir, run_main
from nanochat_jax.train import checkpoint as ck

STAGES = ("base", "mid", "sft", "rl")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("run")
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("--step", type=int)
    parser.add_argument("--keep", type=int, default=1)
    args = parser.parse_args()
    if args.verb in ("prune", "digest") and not args.stage:
        raise UserError(f"{args.verb} needs a stage, expected one of {', '.join(STAGES)}")
    stages = [args.stage] if args.stage else STAGES
    folders = {s: run_dir(args.run) / s / "checkpoints" for s in stages}
    steps = {s: ck.list_steps(folder) for s, folder in folders.items()}
    if not any(steps.values()):
        raise UserError(f"no checkpoints in {run_dir(args.run)} for {', '.join(stages)}")
    if args.step is not None:
        if args.step not in sum(steps.values(), []):
            raise UserError(f"no checkpoint of step {args.step}, there are {steps}")
        steps = {s: [n for n in known if n == args.step] for s, known in steps.items()}
    return VERBS[args.verb](folders, steps, args.keep)


def show(folders: dict[str, Path], steps: dict[str, list[int]], _keep: int) -> int:
    for stage, folder in folders.items():
        scores, best = ck.scores(folder), ck.best_step(folder)
        for step in steps[stage]:
            files = ck.step_dir(folder, step).rglob("*")
            size = sum(p.stat().st_size for p in files if p.is_file()) / 1e6
            score = f"val_bpb {scores[step]:.4f}" if step in scores else ""
            log(f"{stage:<5} step {step:>7}  {size:>9.1f} MB  {score}{' best' * (step == best)}")
    return 0


def verify(folders: dict[str, Path], steps: dict[str, list[int]], _keep: int) -> int:
    bad = 0
    for stage, folder in folders.items():
        for step in steps[stage]:
            bad += bool(lines := ck.damage(folder, step))
            log("\n  ".join([f"{stage:<5} step {step:>7}  {'DAMAGED' if lines else 'ok'}", *lines]))
    return bool(bad)


def prune(folders: dict[str, Path], _steps: dict[str, list[int]], keep: int) -> int:
    for folder in folders.values():
        log(f"deleted {ck.prune(folder, keep) or 'nothing'}, kept {ck.list_steps(folder)}")
    return 0


def digest(folders: dict[str, Path], steps: dict[str, list[int]], _keep: int) -> int:
    for stage, folder in folders.items():
        log(ck.digest(ck.restore_params(folder, steps[stage][-1])))
    return 0


VERBS = {"list": show, "verify": verify, "prune": prune, "digest": digest}

if __name__ == "__main__":
    run_main(main)
