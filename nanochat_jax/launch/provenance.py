"""What a stage ran on and how long: <stage>/run_info.json; and that only one process runs it."""

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
            "git": _git_state(),
            "command": " ".join(sys.argv),
            "started_unix_secs": before.get("started_unix_secs", time.time()),
            "restarts": before.get("restarts", -1) + 1,
            **facts,
        }

    def update(self) -> None:
        self.values["wall_secs"] = self._secs_before + time.monotonic() - self._began
        if self.is_main:
            write_json(self.path, self.values)


def _git_state() -> dict[str, Any]:
    """Commit and uncommitted lines of the code that runs; {} outside a checkout or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changed, diff = git("rev-parse", "HEAD"), git("status", "-s"), git("diff", "HEAD")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(changed), "diff_lines": len(diff.splitlines())}


def only_one(stage_dir: Path) -> AbstractContextManager:
    """Hold the stage for this process; a second one is told so. A killed process lets go."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(stage_dir / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        what = "wait for it, or choose another --config.run.name"
        raise UserError(f"{stage_dir} is in use by another process; {what}") from None
