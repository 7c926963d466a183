"""Programs that mean harm, each judged by what happened outside.

Every attack is made against all layers together, and again with some of them away, as on systems
that do not offer them: without namespaces (containers), and with namespaces only.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tools import sandbox, sandbox_child
from nanochat_jax.tools.sandbox import Limits, Outcome, run_program, run_programs

NAMESPACES = {"namespaces", "user namespaces"}
WITHOUT = {
    "all layers": set(),
    "no namespaces": NAMESPACES | {"jail", "user"},
    "namespaces only": {"landlock", "seccomp"},
}
PATIENT = 20.0  # wall_secs where the clock is not the point: the machine may be busy


@pytest.fixture(params=WITHOUT)
def layers(request) -> set[str]:
    names = set(sandbox._layers().names)
    kept = names - WITHOUT[request.param]
    if request.param == "no namespaces" and not {"landlock", "seccomp"} <= kept:
        pytest.skip("this system has neither landlock nor seccomp")
    if request.param == "namespaces only" and not (kept & NAMESPACES and "jail" in kept):
        pytest.skip("this system has no namespaces")
    if request.param == "all layers" and not all(p.enforced for p in enforced(*ATTACKED)):
        pytest.skip("this system cannot hold these attacks; scripts/sandbox.py tells")
    return kept


ATTACKED = ("network", "files", "writing", "environment", "signals", "survivors", "memory")


def enforced(*names: str) -> list[sandbox.Protection]:
    return [p for p in sandbox.protections() if p.name in names]


@pytest.fixture
def run(layers):
    """Run a program behind these layers; nothing of it may be left, in memory or on disk."""

    def run(source: str, **limits) -> Outcome:
        before = in_sandboxes()
        kept = tuple(name for name in sandbox._layers().names if name in layers)
        outcome = sandbox._run(source, Limits(**{"wall_secs": PATIENT} | limits), kept)
        assert not left(before)
        return outcome

    return run


def in_sandboxes() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline", "status"]):
        if sandbox.CHILD in (process.info["cmdline"] or []):
            found.add(process.pid)
    return found


def left(before: set[int], secs: float = 10.0) -> set[int]:
    """What appeared since and stays; sandboxes of others on this machine come and go."""
    deadline = time.monotonic() + secs
    while (rest := in_sandboxes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return rest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, which must be after as it was before."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").write_text("precious")
    (path / "private").touch(mode=0o600)
    (path / "private").write_text("TOKEN-IN-FILE")
    monkeypatch.setenv("NANOCHAT_TOKEN", "TOKEN-IN-ENVIRONMENT")
    before = (path / "precious").stat()
    yield path
    after = (path / "precious").stat()
    assert {p.name for p in path.iterdir()} >= {"precious", "private"}
    assert not (path / "marker").exists()
    assert (path / "precious").read_text() == "precious"
    assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)


def attempts(*lines: str, **facts: object) -> str:
    """A program that makes each attempt whatever the others came to, and prints what worked."""
    return "\n".join(
        [
            "import ctypes, os, shutil, signal, socket, subprocess, sys, threading, time",
            *[f"{name} = {value!r}" for name, value in facts.items()],
            *[f"try: {line}; print('did', {number})\nexcept Exception: pass"
              for number, line in enumerate(lines)],
        ]
    )  # fmt: skip


# --- what programs may do -------------------------------------------------------------------------


def test_a_program_runs(run):
    outcome = run("import json, math, random, sys\nprint(math.pi)\nprint('é', file=sys.stderr)")
    assert (outcome.status, outcome.exit_code) == ("ok", 0)
    assert (outcome.stdout, outcome.stderr) == ("3.141592653589793\n", "é\n")


def test_files_of_its_own_and_threads(run):
    source = """
import tempfile, threading
open("mine", "w").write("text")
with tempfile.NamedTemporaryFile("w") as file:
    file.write(open("mine").read())
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
"""
    assert run(source).stdout == "thread\n"


ENDS = [
    ("x = 1", "ok", 0),
    ("", "ok", 0),
    ("1 / 0", "error", 1),
    ("assert False", "error", 1),
    ("def f(:", "error", 1),
    ("x = '\ud800'", "error", 1),
    ("import sys; sys.exit(3)", "error", 3),
    ("input()", "error", 1),
    ("import numpy", "error", 1),
    ("raise MemoryError", "memory", 1),
    ("raise KeyboardInterrupt", "error", 1),
    ("import ctypes; ctypes.string_at(0)", "error", -signal.SIGSEGV),
    ("if __name__ == '__main__': 1 / 0", "ok", 0),
]


def test_outcomes():
    sources = [source for source, _, _ in ENDS]
    outcomes = run_programs(sources, limits=Limits(wall_secs=PATIENT))
    ends = [(s, o.status, o.exit_code) for s, o in zip(sources, outcomes, strict=True)]
    assert ends == ENDS


def test_a_traceback_is_the_programs_alone():
    stderr = run_program("def f():\n    return 1 / 0\nf()").stderr
    assert "return 1 / 0" in stderr and "ZeroDivisionError" in stderr
    assert "sandbox_child" not in stderr


def test_many_in_parallel_from_many_threads():
    calls = []

    def ask(start: int) -> list[str]:
        numbers = range(start, start + 4)
        outcomes = run_programs([f"print({n})" for n in numbers], progress=calls.append)
        return [outcome.stdout.strip() for outcome in outcomes]

    fds = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, (0, 10, 20)))
    assert answers == [[str(n) for n in range(start, start + 4)] for start in (0, 10, 20)]
    assert sorted(calls) == sorted([1, 2, 3, 4] * 3)
    if fds:
        assert len(os.listdir("/proc/self/fd")) == fds


# --- the verdict ----------------------------------------------------------------------------------

EARLY = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "print('ok'); raise SystemExit",
    "import os; os.execv('/bin/true', ['true'])",
    "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
    "import os, sys; sys.excepthook = lambda *_: os._exit(0); 1 / 0",
    "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass",
    "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "import os\nfor fd in range(256):\n    try: os.write(fd, b'ok')\n    except OSError: pass\n"
    "os._exit(0)",
    "import os; os.closerange(0, 256); os._exit(0)",
]


def test_who_leaves_before_the_last_line_is_not_ok():
    outcomes = run_programs(EARLY, limits=Limits(wall_secs=PATIENT))
    for source, outcome in zip(EARLY, outcomes, strict=True):
        assert outcome.status in ("exit", "error"), (source, outcome)


def test_the_secret_is_in_no_frame_or_object_that_a_program_sees(monkeypatch):
    word = bytes(range(16))
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda _: word.hex())
    source = """
import gc, sys
frame = sys._getframe()
while frame:
    print({name: repr(value) for name, value in frame.f_locals.items() if name != "frame"})
    frame = frame.f_back
print([o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))])
"""
    outcome = run_program(source, limits=Limits(wall_secs=PATIENT, output_bytes=100 << 20))
    assert outcome.status == "ok" and len(outcome.stdout) > 10_000
    assert word.hex() not in outcome.stdout


# --- time, memory, output, disk -------------------------------------------------------------------


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(100)",
    "deaf": "import signal\nfor s in set(range(1, 65)) - {9, 19, 32, 33}:\n"
    "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "closed": "import os; os.closerange(0, 256)\nwhile True: pass",
    "thread": "import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()",
    "stopped": "import os, time; os.kill(os.getpid(), 19); time.sleep(100)",
}


def test_time_is_up(run):
    with ThreadPoolExecutor(len(ENDLESS)) as pool:
        outcomes = pool.map(lambda source: run(source, wall_secs=0.5), ENDLESS.values())
    for name, outcome in zip(ENDLESS, outcomes, strict=True):
        assert (outcome.status, outcome.exit_code) == ("timeout", -signal.SIGKILL), name
        assert 0.5 <= outcome.wall_secs < 0.5 + sandbox.GRACE_SECS, name


def test_cpu_time_is_up():
    outcome = run_program("while True: pass", limits=Limits(wall_secs=60, cpu_secs=1))
    assert outcome.status == "timeout" and outcome.wall_secs < 50


def test_memory_is_bounded(run):
    source = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert run(source, memory_bytes=128 << 20).status == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(run, stream):
    write = f"import sys\n{{}}: sys.{stream}.write('x' * 4096)"
    endless, finite = write.format("while True"), write.format("for _ in range(3)")
    for source, cap, status in [
        (endless, 10_000, "output"),
        (finite, 3 * 4096 - 1, "output"),
        (finite, 3 * 4096, "ok"),
    ]:
        outcome = run(source, output_bytes=cap)
        assert outcome.status == status
        assert getattr(outcome, stream) == "x" * cap


def test_one_file_is_bounded(run):
    source = "f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 16))"
    outcome = run(source, file_bytes=1 << 20)
    assert outcome.status == "error" and "OSError" in outcome.stderr


def test_all_files_together_are_bounded(run, layers):
    if "jail" not in layers:
        pytest.skip("only a jail counts them together")
    source = "for n in range(100): open(str(n), 'wb').write(bytes(1 << 19))"
    outcome = run(source, file_bytes=1 << 20)
    assert outcome.status == "error" and "No space left" in outcome.stderr


def test_nothing_is_left_on_disk(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("import os\nos.makedirs('a/b/c')\nopen('a/b/f', 'w')\nos.chmod('a/b', 0)\nos.chmod('a', 0)")
    assert not list(tmp_path.iterdir())


def test_deep_recursion_ends_the_program_alone():
    deep = "import sys; sys.setrecursionlimit(10**9)\n"
    sources = ["def f(): return f()\nf()", deep + "def f(): return f()\nf()"]
    sources += [deep + "def f(_): return list(map(f, [0]))\nf(0)"]
    outcomes = run_programs(sources, limits=Limits(wall_secs=PATIENT, memory_bytes=48 << 20))
    assert {outcome.status for outcome in outcomes} <= {"error", "memory"}
    assert "RecursionError" in outcomes[0].stderr


# --- processes ------------------------------------------------------------------------------------


def test_fork_bomb(run):
    source = """
import os, threading
while True:
    try: os.fork()
    except OSError: pass
"""
    counts = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.05):
            counts.append(len(psutil.Process().children(recursive=True)))

    counter = threading.Thread(target=count)
    counter.start()
    outcome = run(source, wall_secs=0.6, processes=8)
    stop.set()
    counter.join()
    assert outcome.status == "timeout"
    assert 0 < max(counts) <= 9  # 8 and the launcher


def test_thread_bomb(run, layers):
    if not layers & NAMESPACES:
        pytest.skip("without namespaces the user's other threads count too")
    source = """
import threading
wait = threading.Event()
threading.stack_size(32768)
try:
    for n in range(100): threading.Thread(target=wait.wait, daemon=True).start()
except RuntimeError: pass
print(n)
"""
    assert int(run(source, processes=10).stdout) == 9


def test_daemons_die(run):
    source = """
import os, sys, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 256)
            time.sleep(100)
        os._exit(0)
except OSError:
    os.setsid() if os.getpid() != os.getsid(0) else None
"""
    assert run(source).status == "ok"


def test_signals_reach_nobody_else(run):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ours = (os.getpid(), os.getppid(), bystander.pid, os.getpgid(0))
    targets = [*ours, *(-pid for pid in ours)]
    lines = [f"os.kill({pid}, {number})" for pid in targets for number in (9, 15, 19)]
    lines += ["os.kill(0, 15)", "os.kill(-1, 15)", f"os.killpg({os.getpgid(0)}, 9)"]
    lines += [f"signal.pidfd_send_signal(os.pidfd_open({bystander.pid}), 9)"]
    lines += [f"os.setpriority(os.PRIO_PROCESS, {bystander.pid}, 19)"]
    outcome = run(attempts("signal.signal(15, signal.SIG_IGN)", *lines))
    done = {int(n) for n in re.findall(r"did (\d+)", outcome.stdout)} - {0}
    harmless = {
        len(targets) * 3 + n for n in (1, 2)
    }  # in a namespace: all it sees, which is itself
    assert outcome.status == "ok" and done <= harmless
    assert bystander.poll() is None
    assert psutil.Process(bystander.pid).status() != psutil.STATUS_STOPPED
    assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == os.getpriority(os.PRIO_PROCESS, 0)
    bystander.communicate(b"\n", timeout=20)
    assert bystander.returncode == 0


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    before = in_sandboxes()
    program = "from nanochat_jax.tools.sandbox import *\n"
    program += "run_program('import time; time.sleep(100)', limits=Limits(wall_secs=90))"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    deadline = time.monotonic() + 30
    while len(in_sandboxes() - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # past the probe, which starts sandboxes too
    parent.kill()
    parent.wait()
    assert not left(before)


# --- files, secrets, network, privileges ----------------------------------------------------------


def test_files_outside_are_not_written(run, folder):
    lines = [
        "open(folder + '/marker', 'w')",
        "open(folder + '/precious', 'a').write('x')",
        "os.mkdir(folder + '/marker')",
        "os.symlink('x', folder + '/marker')",
        "os.link(folder + '/precious', folder + '/marker')",
        "os.rename(folder + '/precious', folder + '/marker')",
        "os.truncate(folder + '/precious', 0)",
        "os.unlink(folder + '/precious')",
        "os.symlink(folder, 'way'); open('way/marker', 'w').write('x')",
        "shutil.rmtree(folder)",
        "os.chmod(folder + '/precious', 0)",
        "os.utime(folder + '/precious', (0, 0))",
        "os.setxattr(folder + '/precious', 'user.marker', b'x')",
        "open(os.__file__, 'a')",
        "open(os.path.dirname(os.__file__) + '/sandbox_marker', 'w')",
    ]
    outcome = run(attempts(*lines, folder=str(folder)))
    assert (outcome.status, outcome.stdout) == ("ok", "")
    marker = Path(os.__file__).with_name("sandbox_marker")
    try:
        assert not marker.exists()
    finally:
        marker.unlink(missing_ok=True)


def test_a_jail_alone_is_read_only():
    names = [name for name in sandbox._layers().names if name in NAMESPACES | {"jail"}]
    if "jail" not in names:
        pytest.skip("this system has no jail")
    source = """
for place in (__import__("os").__file__, "/new"):
    try: open(place, "ab")
    except OSError as error: print(error.strerror)
"""
    outcome = sandbox._run(source, Limits(wall_secs=PATIENT), tuple(names))
    lines = outcome.stdout.splitlines()
    assert len(lines) == 2 and set(lines) <= {"Read-only file system", "Permission denied"}
    if os.geteuid() == 0:
        assert set(lines) == {"Read-only file system"}


def test_secrets_are_not_read(run, folder):
    lines = [
        "print(open(folder + '/private').read())",
        "print(os.listdir(folder))",
        "print(os.environ)",
        "print(open(f'/proc/{pid}/environ').read())",
        "print(open(f'/proc/{pid}/mem', 'rb'))",
        "print(open('/proc/self/environ').read(), open('/proc/self/mountinfo').read())",
        "print([open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()])",
        "print(os.listdir(os.path.expanduser('~')))",
        "print(open('/etc/shadow').read())",
        "print(open('/etc/passwd').read())",
        "os.fchdir(3); print(os.listdir('.'))",
        "os.chroot('..'); print(os.listdir('.'))",
    ]
    outcome = run(attempts(*lines, folder=str(folder), pid=os.getpid()))
    assert outcome.status == "ok"
    done = set(map(int, re.findall(r"did (\d+)", outcome.stdout)))
    assert done == {2}, outcome.stdout  # its own environment, which is empty
    assert "environ({})" in outcome.stdout and "TOKEN" not in outcome.stdout


def test_an_exec_stays_inside(run, folder):
    shell = f"echo > {folder}/marker; cat {folder}/private; rm -r {folder}; echo here"
    outcome = run(f"import os; os.execv('/bin/sh', ['sh', '-c', {shell!r}])")
    assert outcome.status in ("exit", "error")
    assert "TOKEN" not in outcome.stdout + outcome.stderr


def test_a_subprocess_stays_inside(run, folder):
    shell = f"echo > {folder}/marker; cat {folder}/private; rm -r {folder}"
    outcome = run(attempts(f"print(subprocess.getoutput({shell!r}))", f"os.system({shell!r})"))
    assert outcome.status == "ok" and "TOKEN" not in outcome.stdout + outcome.stderr


def test_no_network(run, tmp_path):
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    unix, abstract = (socket.socket(socket.AF_UNIX) for _ in range(2))
    udp.bind(("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        unix.bind(f"{place}/s")
        os.chmod(f"{place}/s", 0o777)
        abstract.bind(f"\0sandbox-test-{os.getpid()}")
        for server in (tcp, unix, abstract):
            server.listen()
        lines = [
            f"socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 1)",
            "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
            f"u.sendto(b'x', ('127.0.0.1', {udp.getsockname()[1]}))",
            f"socket.socket(socket.AF_UNIX).connect({place + '/s'!r})",
            f"socket.socket(socket.AF_UNIX).connect({abstract.getsockname()!r})",
            "socket.getaddrinfo('example.com', 80)",
            "socket.create_connection(('8.8.8.8', 53), 1)",
        ]
        outcome = run(attempts(*lines))
        assert (outcome.status, outcome.stdout) == ("ok", "")
        for server in (tcp, unix, abstract):
            server.setblocking(False)
            with server, pytest.raises(BlockingIOError):
                server.accept()
        udp.setblocking(False)
        with udp, pytest.raises(BlockingIOError):
            udp.recv(1)


def test_privileges_are_out_of_reach(run, layers):
    lines = [
        "assert os.getuid(); os.setuid(0)",
        "os.setgroups([0])",
        "os.chroot('/')",
        "os.nice(-5)",
        "os.mknod('device', 0o60644, os.makedev(8, 0))",
        "socket.sethostname('sandbox')",
        "time.clock_settime(time.CLOCK_REALTIME, 0)",
        "assert c.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
        "assert c.ptrace(16, pid, 0, 0) == 0",  # PTRACE_ATTACH
        "assert c.setns(os.open('/proc/1/ns/net', 0), 0) == 0",
        "assert c.reboot(0x89abcdef) == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    ]
    head = "import ctypes; c = ctypes.CDLL(None)\n"
    outcome = run(head + attempts(*lines, pid=os.getpid()))
    assert (outcome.status, outcome.stdout) == ("ok", "")


# Each of these calls through libc would do no harm if it got through, and must be EPERM or ENOSYS.
REFUSED = ["socket", "ptrace", "mount", "unshare", "keyctl", "bpf", "userfaultfd", "add_key"]
REFUSED += ["io_uring_setup", "memfd_create", "perf_event_open", "shmget", "setns", "pidfd_open"]
REFUSED += ["process_vm_readv", "open_by_handle_at", "clone3", "personality", "chroot"]


@pytest.mark.skipif(os.uname().machine not in sandbox_child._AUDIT_ARCH, reason="no filter")
def test_system_calls_are_refused():
    if "seccomp" not in sandbox._layers().names:
        pytest.skip("this system has no seccomp")
    numbers = sandbox_child._numbers(sandbox_child._SYSCALLS, os.uname().machine)
    calls = [numbers[name] for name in REFUSED] + [463, 100_000, 0x40000000 + 39]
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {calls}:
    print(libc.syscall(number, -1, 0, 0, 0, 0, 0), ctypes.get_errno())
"""
    answers = run_program(source, limits=Limits(wall_secs=PATIENT)).stdout.split("\n")[:-1]
    expected = ["-1 38" if name == "clone3" else "-1 1" for name in REFUSED] + ["-1 38"] * 3
    assert answers == expected


@pytest.mark.parametrize(
    "machine, header",
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_system_call_numbers_are_the_kernels(machine, header):
    if not Path(header).exists():
        pytest.skip("no kernel headers")
    text = Path(header).read_text()
    known = {name: int(no) for name, no in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    numbers = sandbox_child._numbers(
        sandbox_child._SYSCALLS + sandbox_child._METADATA_SYSCALLS, machine
    )
    assert {name: known[name] for name in numbers if name in known} == {
        name: no for name, no in numbers.items() if name in known
    }
    assert len(numbers.keys() & known.keys()) > 60


# --- the statement --------------------------------------------------------------------------------


def test_the_statement_is_what_trying_found(monkeypatch):
    full = sandbox.protections()
    names = [protection.name for protection in full]
    assert names == [*sandbox._DEEDS, *sandbox._BY_PARENT]
    bare = ("limits", "memory")
    monkeypatch.setattr(sandbox, "_layers", lambda: sandbox._Layers(bare, {"seccomp": "why not"}))
    found = {p.name: p for p in sandbox.protections.__wrapped__()}
    assert not any(found[name].enforced for name in ("network", "files", "writing", "signals"))
    assert found["network"].how.endswith("seccomp (why not)")
    assert "NOT ENFORCED" in str(found["network"])
    assert all(found[name].enforced for name in ("cpu", "time", "output"))


def test_what_is_required_must_be_enforced(monkeypatch):
    def known(*_):
        return [sandbox.Protection("network", False, "x"), sandbox.Protection("time", True, "")]

    monkeypatch.setattr(sandbox, "protections", known)
    assert run_program("print(1)", require=["time"]).stdout == "1\n"
    with pytest.raises(UserError, match="cannot enforce 'network' here"):
        run_program("print(1)", require=["time", "network"])
    with pytest.raises(UserError, match="require got nonsense, expected some of network, time"):
        run_program("print(1)", require=["nonsense"])


def test_a_program_never_starts_with_less_than_was_found(monkeypatch, tmp_path):
    if sys.platform != "linux":
        pytest.skip("no such layers")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wrong = sandbox._Layers(("user namespaces", "user"), {})  # ids that are not mapped there
    monkeypatch.setattr(sandbox, "_layers", lambda: wrong)
    with pytest.raises(RuntimeError, match="lost its layer 'user"):
        run_program(f"open({str(tmp_path / 'marker')!r}, 'w')")
    assert not (tmp_path / "marker").exists()


def test_limits_are_checked():
    with pytest.raises(UserError, match="memory_bytes got 0, expected more than 0"):
        Limits(memory_bytes=0)


def test_a_layer_that_is_refused_is_left_out_and_told(monkeypatch):
    if not NAMESPACES & set(sandbox._layers().names):
        pytest.skip("this system has no namespaces")
    launch, refused = sandbox._launch, NAMESPACES | {"jail"}

    def poor(source, limits, layers):
        for layer in layers:
            if layer in refused:
                return sandbox._Refused(layer, "not permitted")
        return launch(source, limits, layers)

    monkeypatch.setattr(sandbox, "_launch", poor)
    layers = sandbox._layers.__wrapped__()
    assert not refused & set(layers.names) and "landlock" in layers.names
    assert layers.missing["jail"] == layers.missing["user namespaces"] == "not permitted"


def test_the_attacks_work_where_nothing_stands_against_them(folder):
    """The tests' own check: what prints nothing inside prints something outside."""
    (folder / "x").mkdir()
    lines = ["shutil.rmtree(folder + '/x')", "print(open(folder + '/private').read())"]
    lines += ["socket.socket()", "os.kill(os.getppid(), 0)", "print(os.environ['NANOCHAT_TOKEN'])"]
    command = [sys.executable, "-c", attempts(*lines, folder=str(folder))]
    done = subprocess.run(command, capture_output=True, text=True).stdout
    assert re.findall(r"did (\d)", done) == list("01234") and done.count("TOKEN-IN") == 2
