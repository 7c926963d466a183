"""Where a stage's numbers come from: machine, code, command and time, kept in
<stage>/run_info.json."""

import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock

from nanochat_jax import hardware
from nanochat_jax.common import UserError, read_json, write_json

ROOT = Path(__file__).parents[2]


class RunInfo:
    """run_info.json of one stage: kept current while it runs, continued over restarts."""

    def __init__(self, stage_dir: Path, is_main: bool = True, **facts: Any):
        self.path, self.is_main = stage_dir / "run_info.json", is_main
        before = read_json(self.path, "delete it") if self.path.exists() else {}
        self._began, self._secs_before = time.monotonic(), before.get("wall_secs", 0.0)
        self.values = {
            "hardware": hardware.describe(),
            "git": git_state(),
            "command": " ".join(sys.argv),
            "started_unix_secs": before.get("started_unix_secs", time.time()),
            "restarts": before.get("restarts", -1) + 1,
            **facts,
        }

    def update(self) -> None:
        self.values["wall_secs"] = self._secs_before + time.monotonic() - self._began
        if self.is_main:
            write_json(self.path, self.values)


def git_state() -> dict[str, Any]:
    """Commit and size of the uncommitted difference of the code that runs; {} outside a
    checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return {}
    if not commit:
        return {}
    changed = git("status", "--porcelain")
    return {
        "commit": commit,
        "dirty": bool(changed),
        "diff_lines": len(git("diff", "HEAD").splitlines()),
    }


def only_one(stage_dir: Path) -> AbstractContextManager:
    """Hold the stage for this process; a second one is told so. A killed process lets go."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(stage_dir / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{stage_dir} is in use by another process; wait for it, or choose another "
            "--config.run.name"
        ) from None
