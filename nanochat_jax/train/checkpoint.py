"""Checkpoints: whole or not there, checked by checksum, readable on any number of devices.

  checkpoints/step_000040/
    arrays/params/     Orbax: {dotted path: float32 array}
    arrays/state/      Orbax: the rest of TrainState, {path: array}
    host.json          step, metrics so far, resolved config, tokenizer hash
    data_<p>.json      data state of process p's lanes, packing buffer included
    checksums.json     SHA-256 and size of every file above; written last
  checkpoints/scores.json   {step: validation bpb}, from which the best is known

Saving copies the state to host memory and writes in the background. A step directory without
checksums.json is a save that never finished: it is not listed, and removed at the next start. Kept
are the newest `keep` and the best; a damaged one is set aside, loudly, for the one before.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from nanochat_jax.common import UserError, log, read_json, sha256_file, write_json
from nanochat_jax.train.state import TrainState

CHECKSUMS = "checksums.json"


def step_dir(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def list_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints, oldest first."""
    return sorted(int(p.parent.name[5:]) for p in directory.glob(f"step_*/{CHECKSUMS}"))


def damage(directory: Path, step: int) -> list[str]:
    """One line per file that is missing or differs from its checksum; empty when all is well."""
    folder = step_dir(directory, step)
    try:
        expected = read_json(folder / CHECKSUMS, "the save did not finish")
    except UserError as error:
        return [str(error)]
    lines = []
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            lines.append(f"{path}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif sha256_file(path) != entry["sha256"]:
            lines.append(f"{path}: content differs from its checksum")
    return lines


def best_step(directory: Path) -> int | None:
    known = scores(directory)
    return min(known, key=lambda s: known[s]) if known else None


def read_host(directory: Path, step: int) -> dict[str, Any]:
    return read_json(step_dir(directory, step) / "host.json", "verify with scripts/checkpoint.py")


def read_data_states(directory: Path, step: int) -> list[dict[str, Any]]:
    """The loader state of each process that saved; merged, any number of processes can go on."""
    files = sorted(step_dir(directory, step).glob("data_*.json"))
    return [read_json(file, "verify with scripts/checkpoint.py") for file in files]


def restore_params(directory: Path, step: int, shardings=None) -> dict[str, jax.Array]:
    """Parameters alone: onto `shardings` ({path: sharding}), or all onto the first device."""
    path = step_dir(directory, step).absolute() / "arrays"
    first = SingleDeviceSharding(jax.local_devices()[0])
    standard = ocp.StandardCheckpointHandler
    handler = ocp.CompositeCheckpointHandler(params=standard(), state=standard())
    with ocp.Checkpointer(handler) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata["params"]
        shardings = shardings or dict.fromkeys(saved, first)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in saved.items()
        }
        restore = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        return checkpointer.restore(path, args=restore)["params"]


def digest(params: dict[str, jax.Array]) -> str:
    """One SHA-256 over names, types, shapes and bits of all parameters."""
    total = hashlib.sha256()
    for name in sorted(params):
        array = np.asarray(params[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of one stage, written in the background.

    host_info: saved as it is in the host.json of each. on_save: called once a save has begun.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        host_info: dict[str, Any] | None = None,
        on_save: Callable[[], None] = lambda: None,
    ):
        self.directory = Path(directory).absolute()
        self.keep, self.host_info, self.on_save = keep, host_info or {}, on_save
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for folder in self.directory.glob("step_*"):
                if not (folder / CHECKSUMS).exists():
                    log(f"removing {folder}: its save did not finish")
                    shutil.rmtree(folder)

    def save(self, state: TrainState, host: dict[str, Any], data_state: dict[str, Any]) -> None:
        """Start saving at state.step, a state by path (Owners.to_paths); waits only for an earlier
        save that is still being written."""
        self.wait()
        step = int(state.step)
        folder = step_dir(self.directory, step)
        if (folder / CHECKSUMS).exists():
            return
        rest = _flat(state._replace(params={}))
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), state=ocp.args.StandardSave(rest)
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"data_{jax.process_index()}.json", data_state)
            if jax.process_index() == 0:
                write_json(folder / "host.json", host | self.host_info)
            self._orbax.save(folder / "arrays", args=items, force=True)
        except OSError as error:
            raise self._disk_error(folder, error) from error
        self._finisher = threading.Thread(target=self._finish, args=(folder,), daemon=True)
        self._finisher.start()
        self.on_save()

    def wait(self) -> None:
        """Return when the last save is on disk, or raise what went wrong with it."""
        if self._finisher:
            self._finisher.join()
            self._finisher = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise self._disk_error(self.directory, failure) from failure

    def restore(self, target: TrainState, step: int) -> TrainState:
        """The state at `step`, by path, laid out as `target` (Owners.on_disk) says."""
        rest = _flat(target._replace(params={}))
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(target.params), state=ocp.args.StandardRestore(rest)
        )
        restored = self._orbax.restore(step_dir(self.directory, step) / "arrays", args=items)
        treedef = jax.tree.structure(target._replace(params={}))
        state = treedef.unflatten([restored["state"][name] for name in rest])
        return state._replace(params=restored["params"])

    def latest_intact(self) -> int | None:
        """The newest step whose files match their checksums, the same on all processes.

        Damaged ones are set aside (renamed), so that their steps can be saved again.
        """
        newest = -1
        for step in list_steps(self.directory)[::-1] if jax.process_index() == 0 else ():
            if not (lines := damage(self.directory, step)):
                newest = step
                break
            folder = step_dir(self.directory, step)
            aside = folder.with_name(f"damaged_{folder.name}_{time.time_ns()}")
            folder.rename(aside)
            log(f"checkpoint at step {step} is damaged ({lines[0]}); it is now {aside}")
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def record_score(self, step: int, bpb: float) -> None:
        """Remember the validation bpb of a saved step."""
        if jax.process_index() == 0:
            self.wait()
            known = scores(self.directory) | {step: bpb}
            kept = set(list_steps(self.directory))
            known = {s: v for s, v in known.items() if s in kept}
            write_json(self.directory / "scores.json", known)

    def _finish(self, folder: Path) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                sums = {str(p.relative_to(folder)): _checksum(p) for p in files}
                write_json(folder / CHECKSUMS, sums)
                prune(self.directory, self.keep)
        except BaseException as error:  # handed to the main thread by wait()
            self._failure = error

    def _disk_error(self, folder: Path, error: BaseException) -> BaseException:
        if isinstance(error, OSError):
            return UserError(f"could not write the checkpoint {folder}: {error}; is the disk full?")
        return error


def prune(directory: Path, keep: int) -> list[int]:
    """Delete all checkpoints but the newest `keep` and the best; returns the steps deleted."""
    if keep < 1:
        raise UserError(f"checkpoints to keep: got {keep}, expected at least 1")
    steps = list_steps(directory)
    wanted = set(steps[-keep:]) | {best_step(directory)}
    gone = [step for step in steps if step not in wanted]
    for step in gone:
        folder = step_dir(directory, step)
        (folder / CHECKSUMS).unlink()  # first, so that a crash in between leaves no half checkpoint
        shutil.rmtree(folder)
    return gone


def scores(directory: Path) -> dict[int, float]:
    path = directory / "scores.json"
    if not path.exists():
        return {}
    kept = set(list_steps(directory))
    return {int(s): v for s, v in json.loads(path.read_text()).items() if int(s) in kept}


def _checksum(file: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def _flat(tree) -> dict[str, Any]:
    """{path: leaf}; names survive where the order of a tuple or an optax class would not."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
