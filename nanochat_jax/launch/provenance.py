"""What a stage ran on and how long (<stage>/run_info.json), and that only one process runs it."""

import subprocess
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import filelock

from nanochat_jax import hardware
from nanochat_jax.common import UserError, read_json, write_json


class RunInfo:
    """run_info.json of one stage: kept current while it runs, continued over restarts."""

    def __init__(self, stage_dir: Path, is_main: bool = True):
        self.path, self.is_main = stage_dir / "run_info.json", is_main
        before = read_json(self.path, "delete it") if self.path.exists() else {}
        self._began, self._secs_before = time.monotonic(), before.get("wall_secs", 0.0)
        self.values: dict[str, Any] = {
            "hardware": hardware.describe(),
            "git": _git_state(),
            "command": " ".join(sys.argv),
            "started_unix_secs": before.get("started_unix_secs", time.time()),
            "restarts": before.get("restarts", -1) + 1,
        }

    def update(self) -> None:
        self.values["wall_secs"] = self._secs_before + time.monotonic() - self._began
        if self.is_main:
            write_json(self.path, self.values)


def _git_state() -> dict[str, Any]:
    """Commit and uncommitted lines of the code that runs; {} outside a checkout or without git."""
    root = Path(__file__).parents[2]
    read = partial(subprocess.check_output, cwd=root, stderr=subprocess.DEVNULL, text=True)
    try:
        asked = ("rev-parse HEAD", "status -s", "diff HEAD")
        commit, changed, diff = (read(["git", *words.split()]) for words in asked)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.strip(), "dirty": bool(changed), "diff_lines": diff.count("\n")}


def only_one(stage_dir: Path) -> AbstractContextManager:
    """Hold the stage for this process; a second one is told so. The lock ends with the process."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(stage_dir / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        what_to_do = "wait for it, or choose another --config.run.name"
        raise UserError(f"{stage_dir} is in use by another process; {what_to_do}") from None
