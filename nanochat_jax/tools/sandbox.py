r"""Run programs that a model wrote, each in a process of its own that can harm nothing else.

    run_program("print(6 * 7)")     Outcome(status="ok", stdout="42\n", stderr="")

A program gets the standard library, an empty folder, no input and no environment. It stands behind
bubblewrap, where `bwrap` works, and the layers of sandbox_child.py. Our own code mounts nothing and
makes no namespaces: no refused call can change the machine. What the system refuses is found once
per process; no program runs without one of the others.

A program that knows this harness can read the secret that says "ok" in its own process, or return
objects that equal everything; a hole in the kernel lets it do more. For hostile code use a virtual
machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache, partial
from multiprocessing import Pipe
from pathlib import Path
from secrets import choice, token_bytes
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal, NamedTuple

from nanochat_jax.common import UserError
from nanochat_jax.hardware import usable_cpus
from nanochat_jax.tools import sandbox_child

CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import sandbox_child; sandbox_child.main()"
PYTHON = os.path.realpath(sys.executable)
HERE = os.path.dirname(__file__)
SPARE_USERS = range(61184, 65520)  # ids that systemd keeps for users without a name
LAYERS = ("bwrap", *sandbox_child.LAYERS)

# What a Python program sees: shared libraries, the standard library and our child's code.
VISIBLE = {"/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store", HERE}
VISIBLE |= {os.path.join(p, "lib") for p in (sys.base_prefix, sys.base_exec_prefix)}
VISIBLE |= {os.path.dirname(os.__file__), PYTHON}

# What a program cannot do, and the layers of which one is enough.
PROTECTIONS = {
    "network": ("bwrap", "seccomp"),
    "files": ("bwrap", "landlock"),  # reading and writing outside of its folder
    "modes": ("bwrap", "user", "seccomp"),  # owners, modes and times of files outside
    "disk": ("bwrap",),  # all its files together, not only each
    "signals": ("bwrap", "seccomp"),
    "processes": ("seccomp",),
    "survivors": ("bwrap", "seccomp"),
    "memory": ("memory",),
    "cpu": ("limits",),
    "privileges": ("privileges",),
    "time": ("parent",),
    "output": ("parent",),
}


class Limits(NamedTuple):
    """What one program may use."""

    wall_secs: float = 5.0
    cpu_secs: int = 5
    memory_bytes: int = 512 << 20  # address space, the interpreter's 30 MB included
    processes: int = 32  # threads; the user's others too, without bwrap and a user of its own
    output_bytes: int = 1 << 20  # of stdout, and of stderr
    file_bytes: int = 16 << 20  # each file; behind bwrap all of them together


class Outcome(NamedTuple):
    """How a program ended. ok: its last line was reached, and its exit status is 0. exit: status 0
    before its last line. error: an exception, a signal, another status. timeout: killed at
    wall_secs or cpu_secs. memory: an uncaught MemoryError. output: more than output_bytes."""

    status: Literal["ok", "exit", "error", "timeout", "memory", "output"]
    stdout: str  # cut at output_bytes, like stderr
    stderr: str


class LayerRefusedError(RuntimeError):
    """A layer that should be on is not: its name, and why."""


def run_program(source: str, **options) -> Outcome:
    return run_programs([source], **options)[0]


def run_programs(
    sources: Sequence[str],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    require: Iterable[str] = (),
    missing: dict[str, str] | None = None,
) -> list[Outcome]:
    """Outcomes in the order of the sources, `workers` (one per usable CPU) at a time.

    A program that times out beside others runs once more alone. UserError where a protection in
    `require` is not enforced, LayerRefusedError where a layer that is not `missing` is not on.
    """
    missing = find_missing() if missing is None else missing
    for name in require:
        enforced, how = protections(missing)[name]
        if not enforced:
            raise UserError(f"sandbox: {name} is {how}; install bubblewrap (bwrap)")
    run = partial(_run, limits=limits or Limits(), layers=[n for n in LAYERS if n not in missing])
    workers = max(1, min(workers or usable_cpus(), len(sources)))
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(run, sources))
    ends = zip(sources, outcomes, strict=True)
    return [run(s) if workers > 1 and o.status == "timeout" else o for s, o in ends]


@cache
def find_missing(without: tuple[str, ...] = ()) -> dict[str, str]:
    """The layers that this system refuses to an empty program, or that are in `without`: why."""
    missing = dict.fromkeys(without, "not wanted")
    if os.geteuid() != 0:
        missing["user"] = "only root can change its user"
    while True:
        try:
            outcome = run_program("", limits=Limits(wall_secs=60), missing=missing)
            if outcome.status == "ok":
                return missing
            raise LayerRefusedError("bwrap", f"an empty program ended with {outcome}")
        except LayerRefusedError as error:
            layer, why = error.args
            if layer in missing or layer not in LAYERS:
                raise
            missing[layer] = why


def protections(missing: dict[str, str]) -> dict[str, tuple[bool, str]]:
    """Whether each protection is enforced, and by which layers; why the others are not there."""
    found = {}
    for name, layers in PROTECTIONS.items():
        how = ", ".join(f"no {n} ({missing[n]})" if n in missing else n for n in layers)
        enforced = not missing.keys() >= set(layers)
        found[name] = enforced, f"{'enforced' if enforced else 'NOT ENFORCED'}: {how}"
    return found


def statement() -> list[str]:
    return [f"{name:<10} {how}" for name, (_, how) in protections(find_missing()).items()]


def _run(source: str, limits: Limits, layers: list[str]) -> Outcome:
    """Start the child, hand it the job, wait until it ends or has to."""
    word, deadline = token_bytes(16), time.monotonic() + limits.wall_secs
    with ExitStack() as stack, TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stdin, stdout, stderr, secret = (stack.enter_context(TemporaryFile()) for _ in range(4))
        report, child_report = (stack.enter_context(end) for end in Pipe(duplex=False))
        job = {"source": source, "layers": layers, "visible": list(filter(os.path.exists, VISIBLE))}
        job |= {"secret": secret.fileno(), "report": child_report.fileno(), "parent": os.getpid()}
        job |= {"folder": "/tmp" if "bwrap" in layers else folder, "uid": choice(SPARE_USERS)}
        bounds = {"CPU": limits.cpu_secs, "FSIZE": limits.file_bytes, "NPROC": limits.processes}
        job |= {"limits": bounds | {"CORE": 0, "NOFILE": 64}, "memory": {"AS": limits.memory_bytes}}
        os.pwrite(stdin.fileno(), json.dumps(job).encode(), 0)
        os.pwrite(secret.fileno(), word, 0)
        bwrap = _bwrap(job) if "bwrap" in layers else []
        python = [PYTHON, "-I", "-S", "-X", "utf8", "-c", CHILD, HERE]
        options = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "env": {}, "cwd": folder}
        options |= {"pass_fds": (job["secret"], job["report"]), "start_new_session": True}
        try:
            child = subprocess.Popen([*bwrap, *python], **options)
        except OSError as error:
            raise LayerRefusedError("bwrap" if bwrap else "python", str(error)) from None
        child_report.close()
        said, heard = b"", report.fileno()
        try:  # the report ends when the child does, if not before
            while report.poll(deadline - time.monotonic()) and (chunk := os.read(heard, 4096)):
                said = (said + chunk)[:4096]
            code = child.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        finally:
            with suppress(ProcessLookupError, PermissionError):  # its group: all that it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        texts = [os.pread(f.fileno(), limits.output_bytes + 1, 0) for f in (stdout, stderr)]
    out, err = (text[: limits.output_bytes].decode("utf-8", "replace") for text in texts)
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):  # as bwrap says it
        return Outcome("timeout", out, err)
    if not said.startswith(sandbox_child.READY):
        layer, _, why = said.decode().removeprefix("refused ").partition(": ")
        why = why or err.strip().removeprefix("bwrap: ") or f"exit status {code}, nothing said"
        raise LayerRefusedError(layer or ("bwrap" if bwrap else "python"), why)
    if max(map(len, texts)) > limits.output_bytes:
        return Outcome("output", out, err)
    told = said.removeprefix(sandbox_child.READY)
    if code == 0:
        return Outcome("ok" if told == word else "exit", out, err)
    return Outcome("memory" if told == b"memory" else "error", out, err)


def _bwrap(job: dict) -> list[str]:
    """A file tree of what is visible, read-only, and a small /tmp; no network, no processes."""
    if not (tool := shutil.which("bwrap")):
        raise LayerRefusedError("bwrap", "not installed")
    command = [tool, "--die-with-parent", "--new-session", "--unshare-cgroup-try"]
    command += [f"--unshare-{space}" for space in ("ipc", "net", "pid", "uts")]
    command += ["--size", str(job["limits"]["FSIZE"]), "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] * ("user" in job["layers"])
    for path in (*sorted(job["visible"]), "/dev/null", "/dev/urandom"):
        for parent in reversed(Path(path).parents[:-1]):
            if not parent.is_symlink():  # for all to read, also for a user of its own
                command += ["--perms", "755", "--dir", str(parent)]
        bind = "--dev-bind" if path.startswith("/dev/") else "--ro-bind"
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else [bind, path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]
