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
    parser.add_argument("verb", choices=("list", "verify", "prune", "digest"))
    parser.add_argument("run")
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("--step", type=int)
    parser.add_argument("--keep", type=int, default=1)
    args = parser.parse_args()
    if args.verb in ("prune", "digest") and not args.stage:
        raise UserError(f"{args.verb} needs a stage, expected one of {', '.join(STAGES)}")
    stages = [args.stage] if args.stage else STAGES
    folders = {stage: run_dir(args.run) / stage / "checkpoints" for stage in stages}
    found = [(stage, step) for stage in stages for step in ck.list_steps(folders[stage])]
    chosen = [(stage, step) for stage, step in found if args.step in (None, step)]
    if not chosen:
        step = "" if args.step is None else f" of step {args.step}, there are {found}"
        raise UserError(f"no checkpoints in {run_dir(args.run)} for {', '.join(stages)}{step}")
    if args.verb == "prune":
        folder = folders[args.stage]
        log(f"deleted {ck.prune(folder, args.keep) or 'nothing'}, kept {ck.list_steps(folder)}")
        return 0
    if args.verb == "digest":
        log(ck.digest(ck.restore_params(folders[args.stage], chosen[-1][1])))
        return 0
    check = show if args.verb == "list" else verify
    return max(check(folders[stage], f"{stage:<5} step {step:>7}", step) for stage, step in chosen)


def show(folder: Path, name: str, step: int) -> int:
    files, scores = ck.step_dir(folder, step).rglob("*"), ck.scores(folder)
    size = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    score = f"val_bpb {scores[step]:.4f}" if step in scores else ""
    log(f"{name}  {size:>9.1f} MB  {score}{' best' * (step == ck.best_step(folder))}")
    return 0


def verify(folder: Path, name: str, step: int) -> int:
    damage = ck.damage(folder, step)
    log("\n  ".join([f"{name}  {'DAMAGED' if damage else 'ok'}", *damage]))
    return int(bool(damage))


if __name__ == "__main__":
    run_main(main)
