"""Run programs that a model wrote, each in a process that can harm nothing but itself.

    run_program("print(6 * 7)")     Outcome(status="ok", stdout="42\n", stderr="")
    statement()                     lines that say what is enforced on this machine, and why not

Each program gets an interpreter with the standard library, an empty folder, no input and no
environment, and stands behind as many layers as the system offers: bubblewrap where `bwrap` works,
and those of sandbox_child.py. Our own code mounts nothing and makes no namespaces, so that no
refused call can change the machine. The layers are found once per process; from then on a program
runs behind all of them or not at all.

What it does not promise: "ok" means that the last line was reached, told by a secret that the
program's text cannot contain. A program that leaves early or prints what it likes is not "ok", but
one that knows this harness can read the secret in its own process, or return objects that equal
everything: verdicts are safe from accidents and shortcuts, not from an opponent. Nor is the machine
safe from a program that knows a hole in the kernel; for hostile code use a virtual machine.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from secrets import choice, token_bytes
from typing import Literal, NamedTuple

from nanochat_jax.common import UserError
from nanochat_jax.hardware import usable_cpus
from nanochat_jax.tools.sandbox_child import LAYERS, READY

CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import sandbox_child; sandbox_child.main()"
SPARE_USERS = range(61184, 65520)  # ids that systemd keeps for users without a name

# What a program cannot do, and the layers of which one is enough; for the last two the parent is.
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
    "time": (),
    "output": (),
}


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_secs: float = 5.0
    cpu_secs: int = 5
    memory_bytes: int = 512 << 20  # address space, the interpreter's 30 MB included
    processes: int = 32  # threads; the user's others too, without bwrap and a user of its own
    output_bytes: int = 1 << 20  # of stdout, and of stderr
    file_bytes: int = 16 << 20  # each file; behind bwrap all of them together


DEFAULT_LIMITS = Limits()


class Outcome(NamedTuple):
    """How a program ended.

    ok       its last line was reached, and it ended with exit status 0
    exit     exit status 0 before its last line: sys.exit(), os._exit(0)
    error    an exception, a signal, or another exit status
    timeout  killed at wall_secs or cpu_secs
    memory   an uncaught MemoryError
    output   wrote more than output_bytes
    """

    status: Literal["ok", "exit", "error", "timeout", "memory", "output"]
    stdout: str  # cut at output_bytes, like stderr
    stderr: str


class Layers(NamedTuple):
    names: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()  # name, why the system does not offer it


class LayerRefusedError(RuntimeError):
    def __init__(self, layer: str, why: str):
        super().__init__(f"the sandbox's layer {layer!r} is refused: {why}")
        self.layer, self.why = layer, why


def run_program(source: str, **options) -> Outcome:
    """Run one program; the options are those of `run_programs`."""
    return run_programs([source], **options)[0]


def run_programs(
    sources: Iterable[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
    require: Iterable[str] = (),
    layers: Layers | None = None,
) -> list[Outcome]:
    """Outcomes in the order of the sources, `workers` (one per usable CPU) at a time.

    A program that times out beside others runs once more alone, and that outcome counts. `progress`
    is called with the number of programs done, after each, in the caller's thread. UserError where
    a protection in `require` is not enforced. `layers` are those that `find_layers` finds.
    """
    layers = layers or find_layers()
    for name in require:
        enforced, how = protections(layers)[name]
        if not enforced:
            raise UserError(f"the sandbox cannot enforce {name!r} here ({how}); install bubblewrap")
    run = partial(_run, limits=limits, layers=layers.names)
    sources, outcomes = list(sources), []
    workers = max(1, min(workers or usable_cpus(), len(sources)))
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(run, sources):
            outcomes.append(outcome)
            if progress:
                progress(len(outcomes))
    for number, source in enumerate(sources):
        if workers > 1 and outcomes[number].status == "timeout":
            outcomes[number] = run(source)
    return outcomes


def _run(source: str, limits: Limits, layers: tuple[str, ...]) -> Outcome:
    """Start the child, hand it the job, wait until it ends or has to."""
    word, deadline = token_bytes(16), time.monotonic() + limits.wall_secs
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True)
        folder = stack.enter_context(folder)
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
        stdin, stdout, stderr, secret = files
        ends = zip(os.pipe(), ("rb", "wb"), strict=True)
        report, child_report = (stack.enter_context(open(fd, mode, 0)) for fd, mode in ends)
        job = {"source": source, "layers": layers, "limits": asdict(limits), "visible": _visible()}
        job |= {"secret": secret.fileno(), "report": child_report.fileno(), "parent": os.getpid()}
        job |= {"folder": "/tmp" if "bwrap" in layers else folder, "uid": choice(SPARE_USERS)}
        for file, content in ((stdin, json.dumps(job).encode()), (secret, word)):
            file.write(content)
            file.seek(0)
        bwrap = _bwrap(limits, layers) if "bwrap" in layers else []
        python = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", "-c", CHILD]
        options = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "env": {}, "cwd": folder}
        options |= {"pass_fds": (job["secret"], job["report"]), "start_new_session": True}
        try:
            child = subprocess.Popen([*bwrap, *python, str(Path(__file__).parent)], **options)
        except OSError as error:
            raise LayerRefusedError("bwrap" if bwrap else "python", str(error)) from None
        child_report.close()
        try:
            said = _listen(report.fileno(), deadline)
            child.wait(max(deadline - time.monotonic(), 0))
            code = child.returncode
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        finally:
            with suppress(ProcessLookupError, PermissionError):  # its group: all that it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read(limits.output_bytes + 1))
    out, err = (text[: limits.output_bytes].decode("utf-8", "replace") for text in texts)
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):  # as bwrap says it
        return Outcome("timeout", out, err)
    if not said.startswith(READY):
        layer, _, why = said.decode().removeprefix("refused ").partition(": ")
        why = why or err.strip().removeprefix("bwrap: ") or f"exit status {code}, nothing said"
        raise LayerRefusedError(layer or ("bwrap" if bwrap else "python"), why)
    if max(map(len, texts)) > limits.output_bytes:
        return Outcome("output", out, err)
    told = said.removeprefix(READY)
    if code == 0:
        return Outcome("ok" if told == word else "exit", out, err)
    return Outcome("memory" if told == b"memory" else "error", out, err)


def _listen(report: int, deadline: float) -> bytes:
    """What the child reports, until it ends or the time is up."""
    said, poll = b"", select.poll()
    poll.register(report, select.POLLIN)
    while poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        chunk = os.read(report, 1 << 16)
        if not chunk:
            break
        said = (said + chunk)[:4096]
    return said


def _visible() -> list[str]:
    """What a Python program needs: shared libraries, the standard library and our child's code."""
    roots = {"/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store"}
    roots |= {os.path.join(p, "lib") for p in (sys.base_prefix, sys.base_exec_prefix)}
    roots |= {os.path.dirname(os.__file__), os.path.realpath(sys.executable)}
    roots.add(str(Path(__file__).parent))
    found: list[str] = []
    for path in sorted(filter(os.path.exists, roots)):
        if not any(path.startswith(f"{above}/") for above in found if not os.path.islink(above)):
            found.append(path)
    return found


def _bwrap(limits: Limits, layers: tuple[str, ...]) -> list[str]:
    """A file tree of what is visible, read-only, and a small /tmp; no network, no processes."""
    if not (tool := shutil.which("bwrap")):
        raise LayerRefusedError("bwrap", "not installed")
    command = [tool, "--die-with-parent", "--new-session", "--unshare-cgroup-try"]
    command += [f"--unshare-{space}" for space in ("ipc", "net", "pid", "uts")]
    command += ["--size", str(limits.file_bytes), "--perms", "1777", "--tmpfs", "/tmp"]
    if "user" in layers:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for path in (*_visible(), "/dev/null", "/dev/urandom"):
        for parent in reversed(Path(path).parents[:-1]):
            if not parent.is_symlink():  # for all to read, also for a user of its own
                command += ["--perms", "755", "--dir", str(parent)]
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


# --- what is enforced here ------------------------------------------------------------------------


@cache
def find_layers(without: tuple[str, ...] = ()) -> Layers:
    """All layers, less those that this system refuses to an empty program."""
    missing = dict.fromkeys(without, "not wanted")
    if os.geteuid() != 0:
        missing["user"] = "only root can change its user"
    names = [name for name in ("bwrap", *LAYERS) if name not in missing]
    while True:
        try:
            outcome = _run("", Limits(wall_secs=60), tuple(names))
            if outcome.status == "ok":
                return Layers(tuple(names), tuple(missing.items()))
            raise LayerRefusedError("bwrap", f"an empty program ended with {outcome}")
        except LayerRefusedError as error:
            if error.layer not in names:
                raise
            names.remove(error.layer)
            missing[error.layer] = error.why


def protections(layers: Layers | None = None) -> dict[str, tuple[bool, str]]:
    """Whether each protection is enforced, and by which layers, or why not."""
    names, missing = layers or find_layers()
    found = {name: (True, "the parent") for name in PROTECTIONS}
    for name, against in PROTECTIONS.items():
        if holding := [layer for layer in against if layer in names]:
            found[name] = True, ", ".join(holding)
        elif against:
            whys = dict(missing)
            lacking = [f"{layer} ({whys.get(layer, 'not wanted')})" for layer in against]
            found[name] = False, f"lacking: {', '.join(lacking)}"
    return found


def statement(layers: Layers | None = None) -> list[str]:
    """What is enforced on this system, for people: each layer, then each protection."""
    names, missing = layers or find_layers()
    lines = [f"layer {name:<12} on" for name in names]
    lines += [f"layer {name:<12} NOT ON: {why}" for name, why in missing]
    for name, (enforced, how) in protections(layers).items():
        lines.append(f"{name:<12} {'enforced' if enforced else 'NOT ENFORCED':<13} {how}")
    return lines
