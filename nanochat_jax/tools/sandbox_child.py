"""The inside of the sandbox: this process becomes the program. Only tools/sandbox.py starts it.

It puts its job's layers on itself and imports the program, a module named `program`, whose parts
under `if __name__ == "__main__"` do not run. A layer restricts this process and nothing else; where
the system refuses it, the parent is told why and the program does not start. When the last line is
reached, a secret goes back to the parent that nobody has read before.

Runs under `python -I -S`, and imports little because HumanEval starts thousands of these. Written
after landlock(7), seccomp(2) and capabilities(7).
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

READY = b"ready\n"  # the report's first line when all layers are on, else "refused LAYER: REASON"

# System calls that are refused, each with its number on x86_64 and on aarch64. Those that take
# privileges are not here: a program has none, and cannot make a namespace that gives it some.
_SYSCALLS = """
# processes: starting them (threads pass), signals, memory, priorities, limits
fork 57 -  vfork 58 -  clone 56 220  clone3 435 435  execve 59 221  execveat 322 281  kill 62 129
tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
pidfd_send_signal 424 424  pidfd_open 434 434  pidfd_getfd 438 438  ptrace 101 117  fcntl 72 25
process_vm_readv 310 270  process_vm_writev 311 271  move_pages 279 239  migrate_pages 256 238
prlimit64 302 261  setpriority 141 140  ioprio_set 251 30  sched_setaffinity 203 122
sched_setscheduler 144 119  sched_setparam 142 118  sched_setattr 314 274  prctl 157 167
# the network, what could open it behind the filter's back, terminals
socket 41 198  io_uring_setup 425 425  io_uring_enter 426 426  io_uring_register 427 427
ioctl 16 29
# memory that no limit counts
memfd_create 319 279  memfd_secret 447 447  shmget 29 194  msgget 68 186  semget 64 190
mq_open 240 180
# the file tree and namespaces
mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  unshare 272 97  setns 308 268
open_tree 428 428  fsopen 430 430  name_to_handle_at 303 264  fanotify_init 300 262
# what landlock lets pass: owners, modes, times and attributes of files, and before ABI 3 truncate
chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55  lchown 94 -
fchownat 260 54  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14
lremovexattr 198 15  fremovexattr 199 16  utime 132 -  utimes 235 -  futimesat 261 -
utimensat 280 88  truncate 76 45
# the kernel and the machine
keyctl 250 219  add_key 248 217  request_key 249 218  bpf 321 280  perf_event_open 298 241
userfaultfd 323 282  personality 135 92  modify_ldt 154 -  uselib 134 -
"""
_LAST_KNOWN_SYSCALL = 462  # mseal; later ones, and x32's, do not exist in here
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp names machines
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD_PATH, _LANDLOCK_RESTRICT = 444, 445, 446

_EPERM, _ENOSYS = 1, 38
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38


def main() -> None:
    """Run the job that stdin holds; tools/sandbox.py writes it."""
    job = json.load(sys.stdin.buffer)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # becomes 0, the lowest that is free
    os.environ.clear()
    os.umask(0o022)
    os.chdir(job["folder"])
    with open("program.py", "wb") as file:
        file.write(job.pop("source").encode("utf-8", "surrogatepass"))
    report, secret = job["report"], job["secret"]
    for name, layer in LAYERS.items():
        if name in job["layers"]:
            try:
                layer(job)
            except (OSError, ValueError) as error:  # ValueError: setrlimit's
                os.write(report, f"refused {name}: {error}".encode())
                os._exit(1)
    sys.argv, sys.path[0], sys.dont_write_bytecode = ["program.py"], job["folder"], True
    job.clear()
    os.write(report, READY)
    try:
        __import__("program")
    except SystemExit:
        raise
    except BaseException as error:  # whatever it raises, its own traceback without ours
        if isinstance(error, MemoryError):
            os.write(report, b"memory")
        own = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(own), own)
        sys.exit(1)
    os.write(report, os.read(secret, 64))


# --- the layers -----------------------------------------------------------------------------------


def _limits(job: dict) -> None:
    limits = job["limits"]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_secs"], 1)  # SIGXCPU, and where it is deaf SIGKILL
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_NPROC, limits["processes"])


def _memory(job: dict) -> None:
    _limit(resource.RLIMIT_AS, job["limits"]["memory_bytes"])


def _limit(which: int, soft: int, more: int = 0) -> None:
    hard = resource.getrlimit(which)[1]
    bound = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(which, (min(soft, bound), min(soft + more, bound)))


def _user(job: dict) -> None:
    """From root to a user that nobody is."""
    if "bwrap" not in job["layers"]:
        os.chown(job["folder"], job["uid"], job["uid"])
    os.setgroups([])
    os.setgid(job["uid"])
    os.setuid(job["uid"])
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"other users cannot read {os.path.dirname(os.__file__)}")


def _privileges(job: dict) -> None:
    """None of root's powers, no way to get them back, and death with the parent."""
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call("syscall", _machine(_CAPSET), header, none)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if "bwrap" not in job["layers"] and os.getppid() != job["parent"]:
        os._exit(1)  # it died before it could take this process along


def _landlock(job: dict) -> None:
    """Files: only what is visible can be read, only the work folder written."""
    abi = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)  # later kernels know more of them
    everything = (1 << rights) - 1
    execute, write, read, list_dir = 1, 2, 4, 8
    # Files; from 4 on TCP, from 6 on abstract sockets and signals to the outside.
    handled = struct.pack("=QQQ", everything, 3, 3)[: 8 + 8 * (abi >= 4) + 8 * (abi >= 6)]
    rules = _call("syscall", _LANDLOCK_CREATE, handled, len(handled), 0)
    allowed = {path: execute | read | list_dir for path in job["visible"]}
    allowed |= {"/dev/null": read | write, "/dev/urandom": read}
    allowed[job["folder"]] = everything & ~execute
    for path, access in allowed.items():
        if not os.path.isdir(path):
            access &= execute | write | read
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("syscall", _LANDLOCK_ADD_PATH, rules, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _seccomp(_job: dict) -> None:
    """System calls that a program of its own has no use for are refused with EPERM."""
    own = os.getpid()
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    # Calls that depend on an argument: which one, how it is tested against what, who passes.
    own_only = (0, equal, [own], True)
    depends = {"kill": own_only, "tkill": own_only, "tgkill": own_only}
    depends |= {"prlimit64": (0, equal, [0, own], True), "clone": (0, any_bit, [0x10000], True)}
    depends |= {"ioctl": (1, equal, [0x5412, 0x541C], False)}  # TIOCSTI, TIOCLINUX
    depends |= {"fcntl": (1, equal, [8, 15], False)}  # F_SETOWN, F_SETOWN_EX: signals to others
    depends |= {"prctl": (0, equal, [_PR_SET_PDEATHSIG], False)}
    # (code, jump if true, jump if false, value); data: number at 0, architecture 4, arguments 16...
    filter_ = [(load, 0, 0, 4), (equal, 1, 0, _machine(_AUDIT_ARCH)), (leave, 0, 0, kill)]
    filter_ += [(load, 0, 0, 0), (at_least, 0, 1, _LAST_KNOWN_SYSCALL + 1)]
    filter_ += [(leave, 0, 0, refuse | _ENOSYS)]
    for name, number in syscall_numbers(os.uname().machine).items():
        # clone3 keeps its flags in memory, unseen; without it libc uses clone.
        refused = refuse | (_ENOSYS if name == "clone3" else _EPERM)
        argument, test, values, passes = depends.get(name, (0, equal, [], True))
        hit, miss = (allow, refused) if passes else (refused, allow)
        body = [(load, 0, 0, 16 + 8 * argument)]
        for value in values:
            body += [(test, 0, 1, value), (leave, 0, 0, hit)]
        body += [(leave, 0, 0, miss)]
        filter_ += [(equal, 0, len(body), number), *body]
    filter_ += [(leave, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in filter_))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, 2, struct.pack("@HP", len(filter_), ctypes.addressof(code)))


def syscall_numbers(machine: str) -> dict[str, int]:
    """The numbers of refused calls by name, as one kind of machine counts them."""
    lines = [line for line in _SYSCALLS.splitlines() if not line.startswith("#")]
    words = " ".join(lines).split()
    numbers = words[1::3] if machine == "x86_64" else words[2::3]
    return {name: int(no) for name, no in zip(words[::3], numbers, strict=True) if no != "-"}


def _machine(table: dict[str, int]) -> int:
    if os.uname().machine not in table:
        raise OSError(_ENOSYS, f"not written for {os.uname().machine}")
    return table[os.uname().machine]


def _call(name: str, *args: object) -> int:
    """A function of Linux's libc; OSError with its errno."""
    if sys.platform != "linux":
        raise OSError(_ENOSYS, "only Linux has it")
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = ctypes.CDLL(None, use_errno=True)[name](*longs)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


LAYERS = {  # in this order; "bwrap" is the parent's
    "limits": _limits,
    "user": _user,
    "memory": _memory,
    "privileges": _privileges,
    "landlock": _landlock,
    "seccomp": _seccomp,
}
