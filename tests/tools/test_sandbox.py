"""Programs that mean harm, each judged by what happened outside.

The attacks are made against all layers of this system, without bwrap, and with bwrap alone. Where
the system refuses something is played by a process that refuses it to itself with seccomp.
"""

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.tools import sandbox
from nanochat_jax.tools.sandbox import Limits, Outcome, run_program, run_programs
from nanochat_jax.tools.sandbox_child import syscall_numbers

WITHOUT = {"all": (), "no bwrap": ("bwrap",), "bwrap alone": ("landlock", "seccomp")}
PATIENT = Limits(wall_secs=20)  # where the clock is not the point: the machine may be busy
BARE = dict.fromkeys(set(sandbox.LAYERS) - {"limits"}, "no reason")


@pytest.fixture(params=WITHOUT)
def missing(request) -> dict[str, str]:
    found = sandbox.find_missing(WITHOUT[request.param])
    needed = {"bwrap"} if request.param == "bwrap alone" else {"landlock", "seccomp"}
    if lacking := needed & set(found):
        pytest.skip(f"this system has no {lacking}")
    return found


def entries(table: str) -> list[str]:
    return re.split(r"  +|\n", table.strip())  # one a line, or two spaces between them


@pytest.fixture
def run(missing):
    """Run a program behind these layers; none of its processes and mounts may be left."""

    def run(source: str, **limits) -> Outcome:
        before, mounts = in_sandboxes(), mount_table()
        bounds = Limits(**{"wall_secs": 20} | limits)
        outcome = run_program(source, limits=bounds, missing=missing)
        assert not left(before)
        assert mount_table() == mounts
        return outcome

    return run


def mount_table() -> list:
    return [Path("/proc/self/mountinfo").read_text(), os.listdir("/"), os.stat("/").st_ino]


def in_sandboxes() -> set[int]:
    processes = psutil.process_iter(["cmdline"])
    return {p.pid for p in processes if sandbox.CHILD in (p.info["cmdline"] or [])}


def left(before: set[int]) -> set[int]:
    """What appeared since and stays; sandboxes of others on this machine come and go."""
    rest, deadline = in_sandboxes() - before, time.monotonic() + 10
    while rest and time.monotonic() < deadline:
        time.sleep(0.05)
        rest &= in_sandboxes()
    return rest


def test_threads_up_to_a_number(run, missing):
    if {"bwrap", "user"} <= set(missing):
        pytest.skip("the user's other threads count too")
    source = "import threading as t\nwait = t.Event().wait\ntry:\n"
    source += "    for n in range(99): t.Thread(target=wait, daemon=True).start()\n"
    source += "except RuntimeError: print(n)"
    assert 5 < int(run(source, processes=10).stdout) < 10


WRITES = "import os\nfor fd in range(256):\n    try: os.write(fd, {})\n    except OSError: pass\n"
ENDS = {
    "ok": ["", "x = 1", "if __name__ == '__main__': 1 / 0"],
    "memory": ["raise MemoryError"],
    "error": entries("""
1 / 0  def f(:  input()  import numpy  raise KeyboardInterrupt  import sys; sys.exit(3)
import ctypes; ctypes.string_at(0)  import os; os.kill(os.getpid(), 9)  f = lambda: f(); f()"""),
    "exit": entries("""
import os; os._exit(0)  print('ok'); raise SystemExit  import os; os.closerange(0, 256); os._exit(0)
import atexit, os; atexit.register(os._exit, 0); 1 / 0
import os, sys; sys.excepthook = lambda *_: os._exit(0); 1 / 0
import os, threading as t; t.Thread(target=os._exit, args=[0]).start(); t.Event().wait()"""),
}  # fmt: skip
ENDS["error"] += ["x = '\ud800'", WRITES.format("b'refused seccomp: no'") + "1 / 0"]
ENDS["exit"] += [WRITES.format("b'ready\\nok'") + "os._exit(0)"]


def test_outcomes_in_order():
    before = len(psutil.Process().open_files())
    ends = [(source, status) for status, sources in ENDS.items() for source in sources]
    outcomes = run_programs([source for source, _ in ends], limits=PATIENT)
    assert [(s, o.status) for (s, _), o in zip(ends, outcomes, strict=True)] == ends
    assert len(psutil.Process().open_files()) == before


def test_a_traceback_is_the_programs_alone():
    stderr = run_program("def f():\n    return 1 / 0\nf()", limits=PATIENT).stderr
    assert "return 1 / 0" in stderr and "sandbox_child" not in stderr


def test_the_secret_is_in_no_frame_or_object_that_a_program_sees():
    source = """
import gc, os, sys
frame, seen = sys._getframe(), []
while frame:
    seen.append({k: repr(v) for k, v in frame.f_locals.items() if k not in ("frame", "seen")})
    frame = frame.f_back
seen = repr([seen, [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict, bytes))]])
for fd in range(3, 1000):  # a process with many files hands on a high number
    try: secret = os.pread(fd, 64, 0)
    except OSError: continue
    if secret: print(len(secret), repr(secret)[2:-1] in seen, len(seen) > 10_000)
"""
    assert run_program(source, limits=PATIENT).stdout == "16 False True\n"


def test_time_is_up(run):
    sources = [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal\nfor s in set(range(1, 65)) - {9, 19, 32, 33}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os; os.closerange(0, 256)\nwhile True: pass",
        "import os, time; os.kill(os.getpid(), 19); time.sleep(100)",
        "import os, time\nfor _ in range(9):\n    try: os.fork() or os.setsid() or "
        "time.sleep(100)\n    except OSError: pass\nwhile True: pass",
    ]
    with ThreadPoolExecutor(len(sources)) as pool:
        outcomes = pool.map(lambda source: run(source, wall_secs=0.7), sources)
    assert [outcome.status for outcome in outcomes] == ["timeout"] * len(sources)


def test_cpu_time_is_up():
    start = time.monotonic()
    outcome = run_program("while True: pass", limits=Limits(wall_secs=60, cpu_secs=1))
    assert outcome.status == "timeout" and time.monotonic() - start < 50


def test_a_time_out_beside_others_runs_once_more_alone(tmp_path):
    source = "import os, time\nif not os.path.exists({0!r}):\n    open({0!r}, 'w')\n"
    source += "    time.sleep(100)"
    once, twice = (source.format(str(tmp_path / name)) for name in "12")
    options = {"limits": Limits(wall_secs=1.5), "missing": BARE}  # it may write there
    assert run_program(once, **options).status == "timeout"
    assert run_programs([twice, ""], workers=2, **options)[0].status == "ok"


def test_memory_is_bounded(run):
    source = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert run(source, memory_bytes=128 << 20).status == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(run, stream):
    write = f"import sys\n{{}}: sys.{stream}.write('x' * 4096)"
    endless, finite = write.format("while True"), write.format("for _ in range(3)")
    cases = [(endless, 10_000, "output"), (finite, 12_287, "output"), (finite, 12_288, "ok")]
    for source, cap, status in cases:
        outcome = run(source, output_bytes=cap)
        assert (outcome.status, getattr(outcome, stream)) == (status, "x" * cap)


def test_files_are_bounded(run, missing):
    one = "f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 16))"
    assert "OSError" in run(one, file_bytes=1 << 20).stderr
    many = "for n in range(20): open(str(n), 'wb').write(bytes(1 << 19))"
    status = "error" if sandbox.protections(missing)["disk"][0] else "ok"
    assert run(many, file_bytes=1 << 20).status == status


def test_nothing_is_left_on_disk(tmp_path):
    source = "import os\nos.makedirs('a/b')\nopen('a/b/f', 'w')\nos.mkdir('c', 0)"
    program = f"from nanochat_jax.tools.sandbox import *; assert run_program({source!r})[0] == 'ok'"
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    before, mark = in_sandboxes(), tmp_path / "running"
    program = f"from nanochat_jax.tools.sandbox import *; find_missing(); open({str(mark)!r}, 'w')"
    program += "; run_program('import time; time.sleep(100)', limits=Limits(wall_secs=90))"
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while not (mark.exists() and in_sandboxes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert mark.exists() and not left(before)


@pytest.fixture
def world(tmp_path):
    """What programs attack, by the names that they use; it must be after as it was before."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("TOKEN-IN-FILE")
    (folder / "precious").chmod(0o600)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix.bind(f"\0sandbox-test-{os.getpid()}")
    unix.listen()

    def state():
        stats = ((path, path.stat()) for path in folder.iterdir())
        return [(p, stat.st_mode, stat.st_mtime, p.read_text()) for p, stat in stats]

    before, pid, other = state(), os.getpid(), bystander.pid
    facts = {"folder": str(folder), "precious": str(folder / "precious"), "pid": pid}
    facts |= {"home": str(Path.home()), "in_home": len(os.listdir(Path.home())), "other": other}
    facts |= {"pids": [pid, os.getppid(), other, -os.getpgid(0), -other]}
    facts |= {"tcp": tcp.getsockname(), "udp": udp.getsockname(), "unix": unix.getsockname()}
    with tcp, udp, unix:
        yield facts
        assert not select.select([tcp, udp, unix], [], [], 0)[0]  # nothing has arrived
    assert state() == before
    assert psutil.Process(other).status() != psutil.STATUS_STOPPED
    bystander.communicate(b"\n", timeout=20)
    assert bystander.returncode == 0


ATTACKS = {
    "files": """
open(folder + '/marker', 'w')  open(precious, 'a').write('x')  os.mkdir(folder + '/marker')
os.symlink('x', folder + '/marker')  os.link(precious, folder + '/marker')
os.rename(precious, folder + '/marker')  os.truncate(precious, 0)  os.unlink(precious)
os.symlink(folder, 'way'); open('way/marker', 'w').write('x')  shutil.rmtree(folder)
os.chmod(precious, 0)  os.utime(precious, (0, 0))  os.setxattr(precious, 'user.marker', b'x')
open(os.__file__, 'a')  open(precious).read()  os.listdir(folder)  assert os.environ
open(f'/proc/{pid}/environ').read()  open('/proc/self/mountinfo').read()  os.listdir('/proc')
assert len(os.listdir(home)) == in_home > 1 # bwrap shows the interpreter's folder
open('/etc/passwd').read()  os.chroot('..')
assert 'TOKEN' in subprocess.getoutput(f'cat {precious}; touch {folder}/marker')""",
    "processes": """
os.fork()  os.system('true') == 0 or 1 / 0  subprocess.run('true')  os.memfd_create('x')
os.posix_spawn('/bin/true', ['true'], {})  os.execv('/bin/true', ['true'])
assert c.unshare(0x10000000) == 0 # CLONE_NEWUSER""",
    "signals": """
os.setpriority(os.PRIO_PROCESS, other, 19)  os.sched_setaffinity(other, [0])  os.pidfd_open(other)
assert c.fcntl(0, 8, other) == 0 and c.fcntl(0, 9) > 0 # F_SETOWN
"""
    + "\n".join(f"os.kill(pids[{n}], {signal})" for n in range(5) for signal in (0, 9, 19)),
    "network": """
socket.create_connection(tcp, 1)  socket.socket(socket.AF_UNIX).connect(unix)
socket.getaddrinfo('example.com', 80)
socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', udp); 1 / 0 # it must not arrive""",
    "privileges": """
os.setuid(0); os.setgroups([0])  os.nice(-5)  os.mknod('device', 0o60644, os.makedev(8, 0))
socket.sethostname('sandbox')  time.clock_settime(time.CLOCK_REALTIME, 0)
assert c.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0  assert c.reboot(0x89abcdef) == 0
assert c.ptrace(16, pid, 0, 0) == 0 # PTRACE_ATTACH
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))""",
}


def attempts(lines: str, facts: dict) -> str:
    """A program that makes each attempt whatever the others came to, and prints what worked."""
    program = ["import ctypes, os, resource, shutil, signal, socket, subprocess, sys, time"]
    program += ["c = ctypes.CDLL(None)", *(f"{name} = {value!r}" for name, value in facts.items())]
    for line in entries(lines):
        program.append(f"try:\n    {line}\n    print({line!r})\nexcept Exception: pass")
    return "\n".join(program)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_come_to_nothing(run, missing, world, attack):
    if attack == "processes" and "seccomp" in missing:
        pytest.skip("bwrap alone only ends them")
    outcome = run(attempts(ATTACKS[attack], world))
    assert (outcome.status, outcome.stdout) == ("ok", "")


def test_attempts_that_work_are_printed():
    """The tests' own check: what prints nothing behind the layers prints something without."""
    lines = ["socket.socket()", "os.kill(os.getppid(), 0)", "subprocess.run('true')"]
    lines += ["open('/etc/passwd').read()", "os.listdir('/proc')"]
    program = attempts("\n".join(lines), {})
    assert run_program(program, limits=PATIENT, missing=BARE).stdout.splitlines() == lines


def test_system_calls_are_refused():
    if "seccomp" in sandbox.find_missing():
        pytest.skip("this system has no seccomp")
    numbers = syscall_numbers(os.uname().machine)
    depends = {"clone", "fcntl", "ioctl", "prctl", "prlimit64"}
    calls = [number for name, number in numbers.items() if name not in depends]
    calls += [463, 100_000, 0x40000000 + 39]  # too new, far out, x32's getpid
    source = "import ctypes\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
    source += f"for n in {calls}: print(call(n, -1, 0, 0, 0, 0, 0) + ctypes.get_errno())"
    enosys = {numbers["clone3"], *calls[-3:]}
    said = run_program(source, limits=PATIENT).stdout.split()
    assert said == ["37" if call in enosys else "0" for call in calls]  # -1 + ENOSYS, EPERM


# A process that refuses calls to itself and to what it starts, then runs programs; the filter lets
# mount pass, which once made the sandbox change the root of the whole machine.
REFUSING = """
import ctypes, json, os, struct, sys
spaces, (unshare, clone), clone3, landlock = 0x7E020000, map(int, sys.argv[1:3]), 435, 444
refused = {"unshare": [(unshare, 0, 1), (clone, spaces, 1), (clone3, 0, 38)]}
refused |= {"landlock": [(landlock, 0, 1)]}
lines = [(0x20, 0, 0, 0)]
for number, mask, errno in [rule for name in sys.argv[3:] for rule in refused.get(name, [])]:
    test = [(0x20, 0, 0, 16), (0x45, 0, 1, mask)] if mask else []
    lines += [(0x15, 0, len(test) + 1, number), *test, (6, 0, 0, 0x50000 | errno), (0x20, 0, 0, 0)]
code = b"".join(struct.pack("=HBBI", *line) for line in [*lines, (6, 0, 0, 0x7FFF0000)])
code = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
program = struct.pack("@HP", len(lines) + 1, ctypes.addressof(code))
assert libc.prctl(22, 2, program, 0, 0) == 0

from nanochat_jax.tools.sandbox import *
outcome = run_program("import os; print(os.getcwd()); open('mine', 'w')")
try:
    started = run_program("", missing={n: why for n, why in find_missing().items() if n == "user"})
except LayerRefusedError:
    started = ["refused"]
state = [open("/proc/self/mountinfo").read(), os.listdir("/"), os.stat("/").st_ino]
print(json.dumps([outcome[0], started[0], state, find_missing(), protections(find_missing())]))
"""

REFUSED = "nothing, bwrap, broken, unshare, landlock, bwrap landlock, unshare landlock".split(", ")


@pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
@pytest.mark.parametrize("refused", REFUSED)
def test_what_the_system_refuses_is_told_and_nothing_changes(refused, tmp_path, monkeypatch):
    numbers = {"x86_64": ("272", "56"), "aarch64": ("97", "220")}[os.uname().machine]
    words, mounts = refused.split(), mount_table()
    if refused == "broken":
        (tmp_path / "bwrap").write_text("no program")
        (tmp_path / "bwrap").chmod(0o755)
    if {"bwrap", "broken"} & set(words):
        monkeypatch.setenv("PATH", str(tmp_path))
    said = subprocess.check_output([sys.executable, "-c", REFUSING, *numbers, *words])
    outcome, started, state, missing, found = json.loads(said)
    assert outcome == "ok" and state == mount_table() == mounts
    gone = {"unshare": "bwrap", "broken": "bwrap"}
    assert {gone.get(name, name) for name in words} - {"nothing"} <= set(missing)
    assert all(missing.values())
    assert found["files"][0] == (not {"bwrap", "landlock"} <= set(missing))
    assert found["network"][0] and found["processes"][0]
    assert started == ("refused" if set(missing) - {"user"} else "ok")  # never behind less


def test_what_is_required_must_be_enforced():
    assert run_program("x = 1", limits=PATIENT, require=["time"], missing=BARE).status == "ok"
    with pytest.raises(UserError, match="network.*no reason"):
        run_program("x = 1", require=["time", "network"], missing=BARE)
    told = "\n".join(sandbox.statement())
    assert all(name in told for name in sandbox.PROTECTIONS)
