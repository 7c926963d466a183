"""The inside of the sandbox: this process becomes the program. Only tools/sandbox.py starts it.

It puts its job's layers on itself, and on nothing else. Where the system refuses one, the parent is
told why and the program does not start; else it is imported, so that what stands under
`if __name__ == "__main__"` does not run. After its last line a secret goes back to the parent.
It imports little because thousands are started. After landlock(7), seccomp(2), capabilities(7).
"""

import ctypes
import json
import os
import resource
import struct
import sys

READY = b"ready\n"  # the report's first line when all layers are on, else "refused LAYER: REASON"

# System calls that are refused, each with its number on x86_64 and on aarch64. Those that take
# privileges are not all here: a program has none, and cannot make a namespace that gives it some.
_SYSCALLS = """
# processes: starting them (threads pass), signals, memory, priorities, limits, terminals
fork 57 -  vfork 58 -  clone 56 220  clone3 435 435  execve 59 221  execveat 322 281  kill 62 129
tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  ptrace 101 117
pidfd_send_signal 424 424  pidfd_open 434 434  pidfd_getfd 438 438  fcntl 72 25  prctl 157 167
process_vm_readv 310 270  process_vm_writev 311 271  move_pages 279 239  migrate_pages 256 238
prlimit64 302 261  setpriority 141 140  ioprio_set 251 30  sched_setaffinity 203 122
sched_setscheduler 144 119  sched_setparam 142 118  sched_setattr 314 274  ioctl 16 29
# the network and ways around the filter to it; memory that no limit counts
socket 41 198  io_uring_setup 425 425  io_uring_enter 426 426  io_uring_register 427 427
memfd_create 319 279  memfd_secret 447 447  shmget 29 194  msgget 68 186  semget 64 190
# what landlock lets pass: owners, modes, times and attributes of files, and before ABI 3 truncate
chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55  lchown 94 -
fchownat 260 54  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14
lremovexattr 198 15  fremovexattr 199 16  utime 132 -  utimes 235 -  futimesat 261 -
utimensat 280 88  truncate 76 45
# the file tree, namespaces, the kernel's message queues, keys and more
mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  unshare 272 97  setns 308 268
open_tree 428 428  fsopen 430 430  name_to_handle_at 303 264  fanotify_init 300 262  keyctl 250 219
add_key 248 217  request_key 249 218  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282
personality 135 92  modify_ldt 154 -  uselib 134 -  mq_open 240 180
"""
_LAST_KNOWN_SYSCALL = 462  # mseal; later ones, and x32's, do not exist in here
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp names machines
_LANDLOCK_CREATE, _LANDLOCK_ADD_PATH, _LANDLOCK_RESTRICT = 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38


def main() -> None:
    """Run the job that stdin holds; tools/sandbox.py writes it."""
    job = json.load(sys.stdin.buffer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.umask(0o022)
    with open("program.py", "wb") as file:
        file.write(job.pop("source").encode("utf-8", "surrogatepass"))
    report, secret = job["report"], job["secret"]
    for name in filter(LAYERS.get, job["layers"]):
        try:
            LAYERS[name](job)
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


def _limits(job: dict, layer: str = "limits") -> None:
    """Resource limits: SIGXCPU when the CPU time is up, and where that is not heard SIGKILL."""
    for name, soft in job[layer].items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        hard = soft + 1 if hard == resource.RLIM_INFINITY else min(soft + 1, hard)
        resource.setrlimit(which, (min(soft, hard), hard))


def _memory(job: dict) -> None:
    _limits(job, "memory")


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
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_PDEATHSIG, 9)  # SIGKILL
    if "bwrap" not in job["layers"] and os.getppid() != job["parent"]:
        os._exit(1)  # it died before it could take this process along


def _landlock(job: dict) -> None:
    """Files: only what is visible can be read, only the work folder written."""
    abi = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    everything = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1  # that this kernel knows
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
    machine, own = os.uname().machine, os.getpid()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"not written for {machine}")
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50001, 0x50026  # EPERM, ENOSYS
    # Which argument, how it is compared with which values, the answer if one fits, and if none.
    numbers = syscall_numbers(machine)
    rules: dict[str, tuple] = dict.fromkeys(numbers, (0, equal, [], allow, refuse))
    rules |= dict.fromkeys(("kill", "tkill", "tgkill"), (0, equal, [own], allow, refuse))
    rules["prlimit64"] = (0, equal, [0, own], allow, refuse)
    rules["clone"] = (0, any_bit, [0x10000], allow, refuse)  # CLONE_THREAD
    rules["clone3"] = (0, equal, [], allow, unknown)  # hides its flags; without it libc uses clone
    rules["ioctl"] = (1, equal, [0x5412, 0x541C], refuse, allow)  # TIOCSTI, TIOCLINUX
    rules["fcntl"] = (1, equal, [8, 15], refuse, allow)  # F_SETOWN, F_SETOWN_EX: signals to others
    rules["prctl"] = (0, equal, [_PR_SET_PDEATHSIG], refuse, allow)
    # (code, jump if true, jump if false, value); data: number at 0, architecture 4, arguments 16...
    lines = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (leave, 0, 0, kill)]
    lines += [(load, 0, 0, 0), (at_least, 0, 1, _LAST_KNOWN_SYSCALL + 1), (leave, 0, 0, unknown)]
    for name, (argument, test, values, hit, miss) in rules.items():
        body = [(load, 0, 0, 16 + 8 * argument)]
        for value in values:
            body += [(test, 0, 1, value), (leave, 0, 0, hit)]
        lines += [(equal, 0, len(body) + 1, numbers[name]), *body, (leave, 0, 0, miss)]
    lines += [(leave, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, 2, struct.pack("@HP", len(lines), ctypes.addressof(code)))


def syscall_numbers(machine: str) -> dict[str, int]:
    """The numbers of refused calls by name, as one kind of machine counts them."""
    words = " ".join(line for line in _SYSCALLS.splitlines() if line[:1] != "#").split()
    numbers = words[1::3] if machine == "x86_64" else words[2::3]
    return {name: int(no) for name, no in zip(words[::3], numbers, strict=True) if no != "-"}


def _call(name: str, *args: object) -> int:
    """A function of Linux's libc; OSError with its errno."""
    if sys.platform != "linux":
        raise OSError("only Linux has it")
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = ctypes.CDLL(None, use_errno=True)[name](*longs)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


LAYERS = {f.__name__[1:]: f for f in (_limits, _user, _memory, _privileges, _landlock, _seccomp)}
