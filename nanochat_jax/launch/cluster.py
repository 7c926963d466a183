"""Several processes as one run: who started them, how they meet, and how they end together.

Every process holds a connection to process 0. The system closes that of a process that is killed:
process 0 says which one is gone and ends, which ends the others. We read the launchers' variables
ourselves, because jax.distributed takes SLURM's job for its step, gives one GPU to a process that
is for all, and does not know Open MPI 5.
"""

import atexit
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.common import UserError, base_dir, log

PORT = 55527  # of process 0, where the launcher does not make it differ from job to job
HEARTBEAT_SECS = 50  # silent for so long is dead to jax.distributed
MEET_SECS = 300  # for all processes to start
GRACE_SECS = 3.0  # for a process that has an error of its own to say so before it is ended
FOLDER_SECS = 15  # for what process 0 has written to be seen by the others
HELLO = struct.Struct("!QI")  # the run's secret, the process
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # half a minute; Linux


@dataclass(frozen=True)
class Launch:
    """One process of several."""

    launcher: str  # a key of LAUNCHERS, or "flags"
    coordinator: str  # host:port of process 0; empty: not known
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] = ()  # GPUs for this process; empty: all it can see

    @property
    def name(self) -> str:
        return f"process {self.process_id} of {self.num_processes}"


def _slurm(env: Mapping[str, str]) -> Launch:
    tasks, nodes = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_STEP_NUM_NODES")
    # The first node, of lists like node7,x2 and node[001-004,007],x2.
    first = re.match(r"([^,\[]*)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
    host = "".join(part or "" for part in first.groups()) if first else ""
    port = env.get("JAX_COORDINATOR_PORT", 61440 + _number(env, "SLURM_JOB_ID") % 4096)
    gpus = (_number(env, "SLURM_LOCALID"),) if tasks > nodes else ()
    return Launch("slurm", f"{host}:{port}", tasks, _number(env, "SLURM_PROCID"), gpus)


def _openmpi(env: Mapping[str, str]) -> Launch:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    size, rank, here, local_rank = (_number(env, f"OMPI_COMM_WORLD_{name}") for name in names)
    address = f"127.0.0.1:{env.get('JAX_COORDINATOR_PORT', PORT)}"  # it names no other machine
    gpus = (local_rank,) if here > 1 else ()
    return Launch("openmpi", address if here == size else "", size, rank, gpus)


def _kubernetes(env: Mapping[str, str]) -> Launch:  # a pod sees its own GPUs
    size, index = _number(env, "JAX_NUM_PROCESSES"), _number(env, "JOB_COMPLETION_INDEX")
    return Launch("kubernetes", env["JAX_COORDINATOR_ADDRESS"], size, index)


LAUNCHERS = {"openmpi": _openmpi, "slurm": _slurm, "kubernetes": _kubernetes}


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise UserError(f"{name} got {env[name]!r}, expected a number; set config.mesh.launcher")
    return int(env[name])


def find(
    env: Mapping[str, str],
    launcher: str = "auto",
    coordinator: str = "",
    num_processes: int = 1,
    process_id: int = 0,
    local_device_ids: str = "",
) -> Launch | None:
    """How this process was started, from the environment and keys of config.mesh; None: it is
    alone. auto: the flags if they say several processes, else the first launcher with several."""
    if launcher not in (known := ("auto", "none", "flags", *LAUNCHERS)):
        raise UserError(f"config.mesh.launcher got {launcher!r}, expected {' | '.join(known)}")
    if launcher == "flags" or (launcher == "auto" and num_processes > 1):
        found = Launch("flags", coordinator, num_processes, process_id)
    else:
        found = _started_by(launcher, env)
    if found is None or found.num_processes == 1:
        return None
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS") or found.coordinator
    if not (re.fullmatch(r".+:\d+", coordinator) and 0 <= found.process_id < found.num_processes):
        raise UserError(
            f"launcher {found.launcher} got coordinator {coordinator!r}, {found.name}; expected "
            "HOST:PORT of process 0 (Open MPI on several machines does not tell it) and a process "
            "below their number; set --config.mesh.coordinator, num_processes and process_id"
        )
    # A process takes its own of all GPUs that it sees, unless the launcher shows it only that one.
    gpus = found.local_device_ids if "," in env.get("CUDA_VISIBLE_DEVICES", ",") else ()
    if local_device_ids:
        if not re.fullmatch(r"\d+(,\d+)*", local_device_ids):
            got = f"config.mesh.local_device_ids got {local_device_ids!r}"
            raise UserError(f"{got}, expected numbers like 0,1")
        gpus = tuple(map(int, local_device_ids.split(",")))
    return replace(found, coordinator=coordinator, local_device_ids=gpus)


def _started_by(launcher: str, env: Mapping[str, str]) -> Launch | None:
    """What a launcher's variables say; for auto the first of all that started several processes."""
    for name in LAUNCHERS if launcher == "auto" else {launcher} - {"none"}:
        try:
            if (found := LAUNCHERS[name](env)).num_processes > 1:
                return found
        except KeyError as missing:
            if launcher != "auto":
                got = f"config.mesh.launcher={launcher} got an environment without {missing}"
                raise UserError(f"{got}; start with that launcher, or take flags") from None
    several = "JAX_COORDINATOR_ADDRESS" in env and env.get("JAX_NUM_PROCESSES") != "1"
    if launcher == "auto" and several:
        raise UserError(
            "got JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES and JOB_COMPLETION_INDEX; set "
            "--config.mesh.num_processes and process_id, or launcher=none for one process"
        )
    return None


def join(launch: Launch) -> None:
    """Meet the other processes; ends this one, with a line, when they are not all there in time."""
    os.environ["NANOCHAT_PROCESS_INDEX"] = str(launch.process_id)  # all but 0 are silent from here
    gpus = f", GPUs {launch.local_device_ids} here" if launch.local_device_ids else ""
    who = f"launcher {launch.launcher}: {launch.num_processes} processes"
    log(f"{who}, waiting for them at {launch.coordinator}{gpus}")
    late = f"{launch.name} did not meet the others within {MEET_SECS} s, expected all of them to "
    late += f"reach process 0 at {launch.coordinator}; see config.mesh"
    # Ours, because jax.distributed aborts with a stack trace when its own time is up.
    too_late = threading.Timer(MEET_SECS, _end, [late])
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
        said = str(error).splitlines()[0]
        raise UserError(
            f"{launch.name} got {said!r}, expected a free port at {launch.coordinator}; choose "
            "another with config.mesh.coordinator or, under slurm and openmpi, JAX_COORDINATOR_PORT"
        ) from None
    too_late.cancel()


def watch(launch: Launch) -> None:
    """From now on this process ends when another one does, with one line that says so. UserError
    when the processes do not write to one folder."""
    port, secret, server = 0, 0, None
    if launch.process_id == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        server.settimeout(MEET_SECS)
        port, secret = server.getsockname()[1], secrets.randbits(31)
    port, secret = multihost_utils.broadcast_one_to_all(np.array([port, secret], np.int32)).tolist()
    mark = base_dir() / f".together_{secret}"
    if server:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        lines = _accept(server, secret, set(range(1, launch.num_processes)))
    else:
        host = launch.coordinator.rsplit(":", 1)[0].strip("[]")
        line = socket.create_connection((host, port), timeout=MEET_SECS)
        line.sendall(HELLO.pack(secret, launch.process_id))
        lines = {line: 0}
    leaving = threading.Event()
    atexit.register(leaving.set)  # after which all meet in jax.distributed's shutdown
    for line in lines:
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in KEEPALIVE.keys() & vars(socket).keys():
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE[name])
    threading.Thread(target=_wait_for_an_end, args=(lines, leaving, launch), daemon=True).start()
    _require_one_folder(launch, mark)


def _require_one_folder(launch: Launch, mark: Path) -> None:
    """UserError unless this process sees the file that process 0 has made."""
    stop = time.monotonic() + FOLDER_SECS
    while not mark.exists():
        if time.monotonic() > stop:
            got = f"$NANOCHAT_BASE_DIR got {base_dir()}, which {launch.name} does not share with"
            raise UserError(f"{got} process 0; expected one folder that all machines see")
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
            with suppress(OSError, struct.error):
                told, process = HELLO.unpack(line.recv(HELLO.size, socket.MSG_WAITALL))
                if told == secret and process in missing:
                    lines[line] = process
                    missing.discard(process)
            if line not in lines:
                line.close()
    return lines


def _wait_for_an_end(lines: dict[socket.socket, int], leaving, launch: Launch) -> None:
    gone = lines[connection.wait(list(lines))[0]]  # type: ignore  # nobody writes: one was closed
    if gone and not leaving.is_set():
        time.sleep(GRACE_SECS)
    if not leaving.is_set():
        who = f"process {gone} of {launch.num_processes} is gone (killed, crashed, or its machine"
        what = f"process {launch.process_id} ends too. Its own output may say why, and the same"
        _end(f"{who} is); {what} command continues from the last checkpoint")


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
