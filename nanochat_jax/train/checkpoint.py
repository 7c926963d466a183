"""Checkpoints: written in the background, checked by checksum, readable on any number of devices.

  checkpoints/step_000040/
    arrays/params/     Orbax: {dotted path: float32 array}
    arrays/state/      Orbax: the rest of TrainState, {path: array}
    host.json          step, metrics so far, resolved config, tokenizer hash
    data_<p>.json      data state of process p's lanes, packing buffer included
    checksums.json     SHA-256 and size of every file above; written last
  checkpoints/scores.json   {step: validation bpb}, from which the best is known

A step directory without checksums.json is an unfinished save, removed at the next start. A damaged
checkpoint is renamed, and the one before it is used.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
    return min(known, key=lambda step: known[step], default=None)


def read_host(directory: Path, step: int) -> dict[str, Any]:
    return read_json(step_dir(directory, step) / "host.json", "verify with scripts/checkpoint.py")


def read_data_states(directory: Path, step: int) -> list[dict[str, Any]]:
    """The loader state of each process that saved (data.pipeline.merge_states joins them)."""
    files = sorted(step_dir(directory, step).glob("data_*.json"))
    return [read_json(file, "verify with scripts/checkpoint.py") for file in files]


def restore_params(directory: Path, step: int, shardings=None) -> dict[str, jax.Array]:
    """Parameters alone: onto `shardings` ({path: sharding}), or all onto the first device."""
    path, standard = step_dir(directory, step).absolute() / "arrays", ocp.StandardCheckpointHandler
    handler = ocp.CompositeCheckpointHandler(params=standard(), state=standard())
    with ocp.Checkpointer(handler) as checkpointer:
        saved, target = checkpointer.metadata(path).item_metadata["params"], {}
        first = SingleDeviceSharding(jax.local_devices()[0])
        for name, leaf in saved.items():
            place = shardings[name] if shardings else first
            target[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
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
    """The checkpoints of one stage: the newest `keep` and the best. host_info: written to the
    host.json of each. on_save: called when a save has begun."""

    def __init__(
        self, directory: Path, keep: int, host_info: dict | None = None, on_save=lambda: None
    ):
        self.directory = Path(directory).absolute()
        self.keep, self.host_info, self.on_save = keep, host_info or {}, on_save
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher = ThreadPoolExecutor(1, "finish_saves")
        self._saving: Future[None] | None = None
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for folder in self.directory.glob("step_*"):
                if not (folder / CHECKSUMS).exists():
                    log(f"removing {folder}: its save did not finish")
                    shutil.rmtree(folder)

    def save(self, state: TrainState, host: dict[str, Any], data_state: dict[str, Any]) -> None:
        """Begin to save a state by path (Owners.to_paths); waits only for an earlier save."""
        self.wait()
        folder = step_dir(self.directory, int(state.step))
        if (folder / CHECKSUMS).exists():
            return
        try:
            write_json(folder / f"data_{jax.process_index()}.json", data_state)
            if jax.process_index() == 0:
                write_json(folder / "host.json", host | self.host_info)
            self._orbax.save(folder / "arrays", _items(ocp.args.StandardSave, state), force=True)
        except OSError as error:
            raise _disk_error(folder, error) from error
        self._saving = self._finisher.submit(self._finish, folder)
        self.on_save()

    def wait(self) -> None:
        """Return when the last save is on disk, or raise what went wrong with it."""
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except OSError as error:
            raise _disk_error(self.directory, error) from error

    def restore(self, target: TrainState, step: int) -> TrainState:
        """The state at `step`, by path, laid out as `target` (Owners.on_disk) says."""
        arrays, rest = step_dir(self.directory, step) / "arrays", target._replace(params={})
        restored = self._orbax.restore(arrays, args=_items(ocp.args.StandardRestore, target))
        leaves = [restored["state"][name] for name in _flat(rest)]
        return jax.tree.structure(rest).unflatten(leaves)._replace(params=restored["params"])

    def latest_intact(self) -> int | None:
        """The newest step whose files match their checksums, the same on all processes; damaged
        ones are renamed, so that their steps can be saved again."""
        newest = -1
        for step in list_steps(self.directory)[::-1] if jax.process_index() == 0 else ():
            if not (lines := damage(self.directory, step)):
                newest = step
                break
            folder = step_dir(self.directory, step)
            aside = folder.with_name(f"damaged_{folder.name}_{time.time_ns()}")
            folder.rename(aside)
            log(f"checkpoint at step {step} is damaged ({lines[0]}); it is now {aside}")
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def record_score(self, step: int, bpb: float) -> None:
        """Remember the validation bpb of a saved step."""
        if jax.process_index() == 0:
            self.wait()
            write_json(self.directory / "scores.json", scores(self.directory) | {step: bpb})

    def _finish(self, folder: Path) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sums = {
                str(f.relative_to(folder)): {"sha256": sha256_file(f), "bytes": f.stat().st_size}
                for f in files
            }
            write_json(folder / CHECKSUMS, sums)
            prune(self.directory, self.keep)


def prune(directory: Path, keep: int) -> list[int]:
    """Delete all checkpoints but the newest `keep` and the best; returns the steps deleted."""
    if keep < 1:
        raise UserError(f"checkpoints to keep: got {keep}, expected at least 1")
    steps, best = list_steps(directory), best_step(directory)
    gone = [step for step in steps[:-keep] if step != best]
    for step in gone:
        folder = step_dir(directory, step)
        (folder / CHECKSUMS).unlink()  # first, so that a crash in between leaves no half checkpoint
        shutil.rmtree(folder)
    return gone


def scores(directory: Path) -> dict[int, float]:
    """{step: validation bpb} of the checkpoints that are there."""
    path, kept = directory / "scores.json", set(list_steps(directory))
    saved = json.loads(path.read_text()) if path.exists() else {}
    return {int(step): bpb for step, bpb in saved.items() if int(step) in kept}


def _disk_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"could not write the checkpoint {folder}: {error}; is the disk full?")


def _items(kind: Callable, state: TrainState):
    """The two parts of a checkpoint as `kind`, an argument of Orbax."""
    rest = kind(_flat(state._replace(params={})))
    return ocp.args.Composite(params=kind(state.params), state=rest)


def _flat(tree) -> dict[str, Any]:
    """{path: leaf}: a checkpoint then depends on names, not on the order of a tuple."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
