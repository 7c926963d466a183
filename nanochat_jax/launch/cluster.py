"""Several processes as one run: who started them, how they meet, and how they end together.

  find()   the launcher's environment, or the recipe's flags -> Launch; None: one process
  join()   jax.distributed, before JAX starts its devices
  watch()  one connection from each process to process 0, held open as long as both live

When a process is killed the system closes its connection, so process 0 knows at once, says which
one is gone and ends, and by that ends the others; a machine that lost its power is found by TCP's
keepalive. The last checkpoint stays, and the same command continues from it. JAX's own heartbeats
are the net below: they find a process that lives but hangs, and end the others less politely.

We read the environment ourselves instead of leaving it to jax.distributed: under SLURM that shows
GPU i to the i-th process of a machine even when one process is for all of its GPUs, and counts the
tasks of the job instead of those of the step; under Open MPI 5 it finds no address.
"""

import atexit
import os
import re
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError, base_dir, log

# What each launcher sets: number of processes, this one, then what else tells who sits where.
SETS = {
    "openmpi": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "slurm": (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_NODES",
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_ID",
    ),
    "kubernetes": ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS"),
}
PORT = 55527  # of process 0, where the launcher does not make it differ from job to job
HEARTBEAT_SECS = 50  # silent for so long is dead to jax.distributed
MEET_SECS = 300  # for all processes to start
GRACE_SECS = 3.0  # for a process that has an error of its own to say so before it is ended
FOLDER_SECS = 15  # for what process 0 has written to be seen by the others
HELLO = struct.Struct("!QI")  # the run's secret, the process


@dataclass(frozen=True)
class Launch:
    """One process of several."""

    launcher: str  # a key of SETS, or "flags"
    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] = ()  # GPUs for this process; empty: all it can see


def find(
    env: Mapping[str, str],
    *,
    launcher: str = "auto",
    coordinator: str = "",
    num_processes: int = 1,
    process_id: int = 0,
    local_device_ids: str = "",
) -> Launch | None:
    """How this process was started, from the environment and config.mesh; None: it is alone.

    auto: the flags if they say several processes, else the first launcher that started several.
    """
    if launcher not in ("auto", "none", "flags", *SETS):
        raise UserError(
            f"config.mesh.launcher got {launcher!r}, expected auto, none, flags or one of "
            f"{', '.join(SETS)}"
        )
    if launcher == "auto":
        launcher = "flags" if num_processes > 1 else _detect(env)
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    if launcher == "none":
        return None
    if launcher == "flags":
        share: tuple[int, ...] = ()
    else:
        if missing := [name for name in SETS[launcher] if name not in env]:
            raise UserError(
                f"config.mesh.launcher={launcher} got an environment without {', '.join(missing)}; "
                "start with that launcher, or take config.mesh.launcher=flags"
            )
        num_processes, process_id = (_number(env, name) for name in SETS[launcher][:2])
        coordinator = coordinator or _coordinator(env, launcher)
        share = _share(env, launcher)
    if num_processes == 1:
        return None
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= process_id < num_processes:
        raise UserError(
            f"launcher {launcher} got coordinator {coordinator!r}, process {process_id} of "
            f"{num_processes}; expected host:port of process 0 and a process below "
            f"{num_processes}; set --config.mesh.coordinator, num_processes and process_id"
        )
    if local_device_ids:
        if not re.fullmatch(r"\d+(,\d+)*", local_device_ids):
            raise UserError(
                f"config.mesh.local_device_ids got {local_device_ids!r}, expected numbers like 0,1"
            )
        share = tuple(map(int, local_device_ids.split(",")))
    return Launch(launcher, coordinator, num_processes, process_id, share)


def _detect(env: Mapping[str, str]) -> str:
    for name, variables in SETS.items():
        if all(v in env for v in variables) and _number(env, variables[0]) > 1:
            return name
    if "JAX_COORDINATOR_ADDRESS" in env and env.get("JAX_NUM_PROCESSES") != "1":
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, but no launcher of several processes was found; "
            "Kubernetes needs JAX_NUM_PROCESSES and JOB_COMPLETION_INDEX too, others "
            "--config.mesh.num_processes and process_id; --config.mesh.launcher=none is one process"
        )
    return "none"


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise UserError(f"{name} got {env[name]!r}, expected a number; set config.mesh.launcher")
    return int(env[name])


def _coordinator(env: Mapping[str, str], launcher: str) -> str:
    """host:port of process 0; JAX_COORDINATOR_PORT chooses another port."""
    port = int(env.get("JAX_COORDINATOR_PORT", PORT))
    if launcher == "slurm":  # its first node, of lists like node7,x2 and node[001-004,007],x2
        first = re.match(r"([^,\[]*)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
        host = "".join(part or "" for part in first.groups()) if first else ""
        if "JAX_COORDINATOR_PORT" not in env:
            port = 61440 + _number(env, "SLURM_JOB_ID") % 4096
        return f"{host}:{port}"
    if _number(env, "OMPI_COMM_WORLD_SIZE") == _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"):
        return f"127.0.0.1:{port}"
    raise UserError(
        "Open MPI started processes on several machines and does not tell where process 0 is; "
        "expected --config.mesh.coordinator=HOST:PORT with the first machine of its host list"
    )


def _share(env: Mapping[str, str], launcher: str) -> tuple[int, ...]:
    """Its own GPU when several processes of a machine all see all of its GPUs."""
    if "," not in env.get("CUDA_VISIBLE_DEVICES", ","):  # the launcher has divided them
        return ()
    if launcher == "slurm":
        several = _number(env, "SLURM_STEP_NUM_TASKS") > _number(env, "SLURM_STEP_NUM_NODES")
        return (_number(env, "SLURM_LOCALID"),) if several else ()
    if launcher == "openmpi" and _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1:
        return (_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),)
    return ()  # a pod sees its own GPUs


def join(launch: Launch, timeout_secs: float = MEET_SECS) -> None:
    """Meet the other processes; ends this one, with a line, when they are not all there in time."""
    os.environ["NANOCHAT_PROCESS_INDEX"] = str(launch.process_id)  # all but 0 are silent from here
    gpus = f", GPUs {launch.local_device_ids} here" if launch.local_device_ids else ""
    log(
        f"launcher {launch.launcher}: {launch.num_processes} processes, waiting for them at "
        f"{launch.coordinator}{gpus}"
    )
    # Ours, because jax.distributed aborts with a stack trace when its own time is up.
    too_late = threading.Timer(
        timeout_secs,
        _end,
        [
            f"process {launch.process_id} of {launch.num_processes} did not meet the others at "
            f"{launch.coordinator} within {timeout_secs:g} s, expected all to be started and this "
            "to be an address of process 0 that every machine reaches; see config.mesh"
        ],
    )
    too_late.daemon = True
    too_late.start()
    sys.excepthook = _end_with_traceback
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * MEET_SECS,
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {launch.process_id} got {str(error).splitlines()[0]!r}, expected a free port "
            f"at {launch.coordinator}; choose another with config.mesh.coordinator or, under "
            "slurm and openmpi, JAX_COORDINATOR_PORT"
        ) from None
    too_late.cancel()


def watch(launch: Launch) -> None:
    """From now on this process ends when another one does, with one line that says so.

    UserError when the processes do not write to one folder.
    """
    process, others = launch.process_id, range(1, launch.num_processes)
    server = None
    port, secret = 0, 0
    if process == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        server.settimeout(MEET_SECS)
        port, secret = server.getsockname()[1], secrets.randbits(31)
        base_dir().mkdir(parents=True, exist_ok=True)
        _mark(secret).touch()
    port, secret = multihost_utils.broadcast_one_to_all(np.array([port, secret], np.int32)).tolist()
    if server:
        lines = _accept(server, secret, set(others))
    else:
        host = launch.coordinator.rsplit(":", 1)[0].strip("[]")
        line = socket.create_connection((host, port), timeout=MEET_SECS)
        line.sendall(HELLO.pack(secret, process))
        lines = {line: 0}
    leaving = threading.Event()
    atexit.register(leaving.set)  # after which all meet in jax.distributed's shutdown
    for line in lines:
        line.settimeout(None)
        _keep_alive(line)
    threading.Thread(target=_wait_for_an_end, args=(lines, leaving, launch), daemon=True).start()
    _require_one_folder(launch, _mark(secret))


def _mark(secret: int) -> Path:
    return base_dir() / f".together_{secret}"


def _require_one_folder(launch: Launch, mark: Path) -> None:
    """UserError unless this process sees the file that process 0 has made."""
    stop = time.monotonic() + FOLDER_SECS
    while not mark.exists():
        if time.monotonic() > stop:
            raise UserError(
                f"$NANOCHAT_BASE_DIR got {base_dir()}, which process {launch.process_id} of "
                f"{launch.num_processes} does not share with process 0; expected one folder that "
                "all machines see"
            )
        time.sleep(0.2)
    multihost_utils.sync_global_devices("all have seen the mark")
    if launch.process_id == 0:
        mark.unlink()


def _accept(server: socket.socket, secret: int, missing: set[int]) -> dict[socket.socket, int]:
    """A connection from each of the missing processes; strangers are turned away."""
    lines = {}
    with server:
        while missing:
            line, _ = server.accept()
            line.settimeout(10.0)
            try:
                hello = HELLO.unpack(line.recv(HELLO.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                hello = (None, None)
            if hello[0] == secret and hello[1] in missing:
                lines[line] = hello[1]
                missing.discard(hello[1])
            else:
                line.close()
    return lines


def _keep_alive(line: socket.socket) -> None:
    """Find a machine that is gone without a word within half a minute."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # Linux
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _wait_for_an_end(lines: dict[socket.socket, int], leaving, launch: Launch) -> None:
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line, selectors.EVENT_READ)
        ready = selector.select()  # nobody ever writes: readable is closed
    gone = lines[ready[0][0].fileobj]  # type: ignore[index]
    if gone and not leaving.is_set():
        time.sleep(GRACE_SECS)
    if leaving.is_set():
        return
    _end(
        f"process {gone} of {launch.num_processes} is gone (killed, crashed, or its machine is), "
        f"so process {launch.process_id} ends too; its own output may say why, and the same "
        "command continues from the last checkpoint"
    )


def _end(message: str) -> None:
    """From a thread: the main one may wait for another process for ever."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_traceback(kind, error, traceback) -> None:
    """sys.excepthook of a process that must not wait in jax.distributed's shutdown for others."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(2 * GRACE_SECS)  # when another process is gone, _wait_for_an_end says it better
    sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    os._exit(1)
