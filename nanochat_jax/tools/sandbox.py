"""Run programs that a model wrote, each in a process that can harm nothing but itself.

    run_program("print(6 * 7)")     Outcome(status="ok", stdout="42\n", ...)
    protections()                   what a program cannot do on this system, found by trying
    run_program(source, require=("network", "files"))     refuse where these are not to be had

Each program gets an interpreter with the standard library, an empty folder, no input and no
environment, and stands behind as many layers as the system offers (sandbox_child.py): namespaces,
a file tree of its own, a user of its own, resource limits, no privileges, landlock, seccomp. Which
ones work is found once per process; from then on a program runs behind all of these or not at all.
The parent keeps the clock and counts the output; no signals, so any thread may call. The child
holds a lifeline, so nothing is left running when the parent dies.

What it does not promise: "ok" means that the last line was reached, told by a secret that the
program's text cannot contain. A program that leaves early or prints what it likes is not "ok", but
one that knows this harness can read the secret in its own process, or return objects that equal
everything: verdicts are safe from accidents and shortcuts, not from an opponent. Nor is the machine
safe from a program that knows a hole in the kernel; for hostile code use a virtual machine.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import IO, Literal, NamedTuple

from nanochat_jax.common import UserError

CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import sandbox_child; sandbox_child.main()"
GRACE_SECS = 5.0  # to end what was told to end, even on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_secs: float = 5.0
    cpu_secs: int = 5
    memory_bytes: int = 512 << 20  # address space, the interpreter's 30 MB included
    processes: int = 32  # threads; processes too, where seccomp does not refuse them
    output_bytes: int = 1 << 20  # of stdout, and of stderr
    file_bytes: int = 16 << 20  # each file; in a jail all of them together

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) <= 0:
                raise UserError(f"Limits: {field.name} got {value}, expected more than 0")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ok       its last line was reached, and it ended with exit status 0
    exit     exit status 0 before its last line: sys.exit(), os._exit(0)
    error    an exception, a signal, or another exit status
    timeout  killed at wall_secs or cpu_secs
    memory   an uncaught MemoryError
    output   killed at output_bytes
    """

    status: Literal["ok", "exit", "error", "timeout", "memory", "output"]
    exit_code: int  # minus the signal's number when one ended it
    stdout: str  # cut at output_bytes, like stderr
    stderr: str
    wall_secs: float


@dataclass(frozen=True)
class Protection:
    name: str
    enforced: bool
    how: str

    def __str__(self) -> str:
        return f"{self.name:<12} {'enforced' if self.enforced else 'NOT ENFORCED':<13} {self.how}"


def run_program(
    source: str, *, limits: Limits = DEFAULT_LIMITS, require: Iterable[str] = ()
) -> Outcome:
    """Run one program. UserError where a protection in `require` is not to be had here."""
    return run_programs([source], limits=limits, workers=1, require=require)[0]


def run_programs(
    sources: Iterable[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
    require: Iterable[str] = (),
) -> list[Outcome]:
    """Outcomes in the order of the sources, `workers` (one per CPU) at a time.

    `progress` is called with the number of programs done, after each, in the caller's thread.
    """
    _check_required(require)
    layers = _layers().names
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = [pool.submit(_run, source, limits, layers) for source in sources]
        try:
            for count, job in enumerate(as_completed(jobs), 1):
                job.result()
                if progress:
                    progress(count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [job.result() for job in jobs]


def _check_required(require: Iterable[str]) -> None:
    if not (require := set(require)):
        return
    known = {protection.name: protection for protection in protections()}
    if wrong := sorted(require - known.keys()):
        raise UserError(f"require got {', '.join(wrong)}, expected some of {', '.join(known)}")
    for name in sorted(require):
        if not known[name].enforced:
            raise UserError(
                f"the sandbox cannot enforce {name!r} here ({known[name].how}); run where it can, "
                "such as Linux with user namespaces, or do not require it"
            )


# --- one run --------------------------------------------------------------------------------------


class _Refused(NamedTuple):
    """A layer that the system does not offer."""

    layer: str
    why: str


def _run(source: str, limits: Limits, layers: tuple[str, ...]) -> Outcome:
    outcome = _launch(source, limits, layers)
    if isinstance(outcome, _Refused):
        raise RuntimeError(f"the sandbox lost its layer {outcome.layer!r}: {outcome.why}")
    return outcome


def _launch(source: str, limits: Limits, layers: tuple[str, ...]) -> Outcome | _Refused:
    """Start the child, hand it the job, collect what it says until it ends or has to."""
    word = secrets.token_hex(16).encode()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True)
        )
        child_lifeline, lifeline = _pipe(stack)
        child_secret, secret = _pipe(stack)
        control, child_control = _pipe(stack)
        report, child_report = _pipe(stack)
        theirs = {"lifeline": child_lifeline, "secret": child_secret}
        theirs |= {"control": child_control, "report": child_report}
        job = {"source": source, "folder": folder, "layers": layers, "limits": asdict(limits)}
        job |= {name: pipe.fileno() for name, pipe in theirs.items()}
        stdin = stack.enter_context(tempfile.TemporaryFile())
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        secret.write(word)
        secret.close()

        start = time.monotonic()
        options = ("-I", "-S", "-X", "utf8", "-c", CHILD)
        child = stack.enter_context(
            subprocess.Popen(
                [sys.executable, *options, str(Path(__file__).parent)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd=folder,
                pass_fds=[pipe.fileno() for pipe in theirs.values()],
                start_new_session=True,
            )
        )
        stack.callback(_end, child)
        for pipe in theirs.values():
            pipe.close()
        assert child.stdout and child.stderr
        taken = {stream: bytearray() for stream in (child.stdout, child.stderr, control, report)}
        why_killed = _collect(taken, start + limits.wall_secs, limits.output_bytes)
        with suppress(BrokenPipeError):  # let go: the child kills what still runs
            lifeline.write(b"x")
        lifeline.close()
        _collect({control: taken[control]}, time.monotonic() + GRACE_SECS, 1 << 16)
        wall_secs = time.monotonic() - start

    texts = [taken[stream][: limits.output_bytes] for stream in (child.stdout, child.stderr)]
    stdout, stderr = (text.decode("utf-8", "replace") for text in texts)
    end: dict = {}
    for line in taken[control].splitlines():
        end |= json.loads(line)
    if "failed" in end:
        return _Refused(end["failed"], end["why"])
    if not end and not why_killed:
        raise RuntimeError(f"the sandbox's launcher broke: {stderr.strip() or child.returncode}")
    code = end.get("exit_code", -signal.SIGKILL)
    # Nobody else kills like this; the kernel's limit counts ticks, and differs from what was used.
    if not why_killed and code == -signal.SIGKILL and end["cpu_secs"] > 0.5 * limits.cpu_secs:
        why_killed = "timeout"
    if why_killed:
        status = why_killed
    elif code == 0:
        status = "ok" if secrets.compare_digest(bytes(taken[report]), word) else "exit"
    else:
        status = "memory" if taken[report] == b"memory" else "error"
    return Outcome(status, code, stdout, stderr, wall_secs)


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return (
        stack.enter_context(open(read, "rb", buffering=0)),
        stack.enter_context(open(write, "wb", buffering=0)),
    )


def _collect(
    taken: dict[IO[bytes], bytearray], deadline: float, cap_bytes: int
) -> Literal["timeout", "output"] | None:
    """Read the streams until all have ended; say so if the clock or the cap came first."""
    with selectors.DefaultSelector() as selector:
        for stream in taken:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            for key, _ in selector.select(left):
                stream: IO[bytes] = key.fileobj  # type: ignore
                chunk = os.read(key.fd, 1 << 16)
                taken[stream] += chunk
                if not chunk:
                    selector.unregister(stream)
                if len(taken[stream]) > cap_bytes:
                    return "output"
    return None


def _end(child: subprocess.Popen) -> None:
    """Kill the launcher and its group: gone already, but for an interrupt or a launcher stuck."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# --- what is enforced here ------------------------------------------------------------------------


class _Layers(NamedTuple):
    names: tuple[str, ...]
    missing: dict[str, str]  # why


@cache
def _layers() -> _Layers:
    """The layers that this system offers: all that there are, less those that it refuses."""
    missing: dict[str, str] = {}
    if sys.platform != "linux":
        names = ["user", "limits", "memory"]
    else:
        names = ["jail", "user", "limits", "memory", "privileges", "landlock", "seccomp"]
        names.insert(0, "namespaces" if os.geteuid() == 0 else "user namespaces")
    if os.geteuid() != 0:
        missing["user"] = "only root can change its user"
        names = [name for name in names if name != "user"]
    while isinstance(refused := _launch("", Limits(wall_secs=60), tuple(names)), _Refused):
        missing[refused.layer] = refused.why
        if refused.layer == "namespaces":
            names.append("user namespaces")
        names.remove(refused.layer)
    if refused.status != "ok":
        raise RuntimeError(f"the sandbox cannot run an empty program: {refused}")
    return _Layers(tuple(names), missing)


# What a program must not be able to do, as a program that tries, and the layers that stand against
# it. A deed that raises one of _FAILURES failed.
_DEEDS = {
    "network": ("socket.create_connection(('127.0.0.1', port), 1)", "namespaces seccomp"),
    "files": ("open(private).read()", "jail landlock user"),
    "writing": ("open(private + '2', 'x')", "jail landlock user"),
    "modes": ("os.chmod(private, 0o644)", "jail user seccomp"),
    "disk": ("for n in '012': open(n, 'wb').write(bytes(file_bytes // 2))", "jail"),
    "environment": ("os.environ or open(f'/proc/{pid}/environ').read()", "jail landlock user"),
    "signals": ("os.kill(pid, 0)", "namespaces seccomp user"),
    "forks": ("os.fork() or os._exit(0)", "seccomp limits"),
    "survivors": ("assert os.getpid() != 1; os.fork() or os._exit(0)", "namespaces seccomp limits"),
    "memory": ("bytearray(memory_bytes)", "memory"),
    "cpu": ("assert not 0 <= resource.getrlimit(resource.RLIMIT_CPU)[1] <= cpu_secs", "limits"),
    "privileges": ("os.chroot('.')", "privileges user seccomp"),
}
_PROBE = """
import json, os, resource, socket
facts, deeds, done = {facts!r}, {deeds!r}, []
for name, deed in deeds.items():
    try:
        exec(deed, globals() | facts)
    except (OSError, MemoryError, AssertionError):
        continue
    done.append(name)
print(json.dumps(done))
"""
_BY_PARENT = {"time": "killed at wall_secs", "output": "killed at output_bytes"}


@cache
def protections() -> list[Protection]:
    """What is enforced on this system: each deed is tried once, inside, and must fail."""
    layers = _layers()
    limits = Limits(wall_secs=60, file_bytes=1 << 20)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        private = Path(folder, "private")
        private.touch(mode=0o600)
        facts = asdict(limits) | {"port": server.getsockname()[1], "pid": os.getpid()}
        facts["private"] = str(private)
        deeds = {name: deed for name, (deed, _) in _DEEDS.items()}
        outcome = _run(_PROBE.format(facts=facts, deeds=deeds), limits, layers.names)
    if outcome.status != "ok":
        raise RuntimeError(f"the sandbox's probe failed: {outcome}")
    done = json.loads(outcome.stdout)
    found = [
        Protection(name, name not in done, _how(against.split(), layers, name not in done))
        for name, (_, against) in _DEEDS.items()
    ]
    return found + [Protection(name, True, how) for name, how in _BY_PARENT.items()]


def _how(against: list[str], layers: _Layers, enforced: bool) -> str:
    """Layers that stand against a deed, or why there are none."""
    if "namespaces" in against:
        against = ["user namespaces", *against]
    if enforced:
        return ", ".join(name for name in against if name in layers.names) or "by itself"
    lacking = {name: layers.missing.get(name, "") for name in against if name not in layers.names}
    if not lacking:
        return "no layer holds"
    return "lacking: " + ", ".join(f"{name} ({why})" for name, why in lacking.items())
