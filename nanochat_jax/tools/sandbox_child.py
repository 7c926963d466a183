"""The inside of the sandbox: one process per program, started by tools/sandbox.py and nobody else.

  launcher   namespaces, jail ---fork---> program   limits, identity, landlock, seccomp, import
     |  watches two things: a lifeline from the parent, and the program
     +- when the parent lets go of the lifeline (or dies), the program and all it started die

Each protection is a layer, a function that raises OSError where the system refuses it; the job
names the layers to apply, and one that fails ends the launch, so a program never starts with less
than its parent counts on. The program is a module named `program` in an empty folder, imported;
parts under `if __name__ == "__main__"` do not run. That its last line was reached is told by
handing back a secret from a pipe which nobody reads before. As the first process of its namespace
it does not feel signals that it sends itself, unless it handles them; it does feel the launcher's.

Runs under `python -I -S`: the standard library only, nothing of this package. Written after
unshare(2), pivot_root(2), landlock(7) and seccomp(2).
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys

LINUX = sys.platform == "linux"
NOBODY = 65534

# Refused in a program; each with its number on x86_64 and on aarch64.
_SYSCALLS = """
# other processes: starting them (_seccomp lets threads through), signals, memory, priorities
fork 57 -  vfork 58 -  clone 56 220  clone3 435 435  kill 62 129  tkill 200 130  tgkill 234 131
rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  pidfd_send_signal 424 424  pidfd_open 434 434
pidfd_getfd 438 438  ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271
process_madvise 440 440  process_mrelease 448 448  kcmp 312 272  migrate_pages 256 238
move_pages 279 239  prlimit64 302 261  setpriority 141 140  ioprio_set 251 30
sched_setaffinity 203 122  sched_setscheduler 144 119  sched_setparam 142 118
sched_setattr 314 274  prctl 157 167
# the network, what could open it behind the filter's back, terminals
socket 41 198  io_uring_setup 425 425  io_uring_enter 426 426  io_uring_register 427 427
ioctl 16 29
# memory that no limit counts
memfd_create 319 279  memfd_secret 447 447  shmget 29 194  msgget 68 186  semget 64 190
mq_open 240 180
# the file tree and namespaces
mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  unshare 272 97  setns 308 268
fsopen 430 430  fsconfig 431 431  fsmount 432 432  fspick 433 433  open_tree 428 428
move_mount 429 429  mount_setattr 442 442  name_to_handle_at 303 264  open_by_handle_at 304 265
fanotify_init 300 262  quotactl 179 60  quotactl_fd 443 443
# the kernel and the machine
keyctl 250 219  add_key 248 217  request_key 249 218  bpf 321 280  perf_event_open 298 241
userfaultfd 323 282  kexec_load 246 104  kexec_file_load 320 294  init_module 175 105
finit_module 313 273  delete_module 176 106  reboot 169 142  swapon 167 224  swapoff 168 225
acct 163 89  syslog 103 116  settimeofday 164 170  clock_settime 227 112  adjtimex 159 171
clock_adjtime 305 266  sethostname 170 161  setdomainname 171 162  lookup_dcookie 212 18
vhangup 153 58  personality 135 92  iopl 172 -  ioperm 173 -  modify_ldt 154 -  uselib 134 -
"""
# Besides, without a jail: owners, modes, times and attributes of files, which landlock lets pass.
_METADATA_SYSCALLS = """
chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55  lchown 94 -
fchownat 260 54  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14
lremovexattr 198 15  fremovexattr 199 16  utime 132 -  utimes 235 -  futimesat 261 -
utimensat 280 88
"""
_LAST_KNOWN_SYSCALL = 462  # mseal; later ones, and those of other ABIs, do not exist in here
# Architecture (as seccomp names it), and numbers of calls that are made here, by machine.
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LANDLOCK_CREATE, _LANDLOCK_ADD_PATH, _LANDLOCK_RESTRICT = 444, 445, 446

_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_NAMESPACES = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000}
_NAMESPACES |= {"pid": 0x20000000, "net": 0x40000000}
_NEW_USER = 0x10000000

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC = 1, 2, 4, 8, 32, 4096, 16384
_PRIVATE, _DETACH = 1 << 18, 2
# Flags that a remount must repeat, as statvfs(3) and as mount(2) write them.
_KEEP = {2: _NOSUID, 4: _NODEV, 8: _NOEXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


def main() -> None:
    """Run the job that stdin holds: see `tools/sandbox.py`, which writes it."""
    job = json.load(sys.stdin.buffer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    job["uid"] = _free_uid()
    _apply(job, OUTSIDE)
    wake, bell = os.pipe()  # rings when the program stops or ends
    os.set_blocking(bell, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    program = os.fork()
    if program:
        _watch(job, program, wake)
    else:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (wake, bell, job["lifeline"]):
            os.close(fd)
        _become_program(job)


def _free_uid() -> int:
    """A user id that nobody has, so that its limits are its own; nobody's where ids are few."""
    if LINUX:
        with open("/proc/self/uid_map") as file:
            if int(file.read().split()[2]) < 0x7FFFFFFF:
                return NOBODY
    return 0x70000000 + os.getpid()


def _apply(job: dict, layers: dict) -> None:
    for name, layer in layers.items():
        if name in job["layers"]:
            try:
                layer(job)
            except (OSError, ValueError) as error:  # ValueError: setrlimit's
                _tell(job, failed=name, why=str(error))
                os._exit(1)


def _tell(job: dict, **message: object) -> None:
    os.write(job["control"], json.dumps(message).encode() + b"\n")


def _watch(job: dict, program: int, wake: int) -> None:
    """Wait for the program's end, or bring it about; a pid namespace's first process takes all
    others with it, and is not gone before they are."""
    both = select.poll()
    both.register(wake, select.POLLIN)
    both.register(job["lifeline"], select.POLLIN)
    while True:
        ready = [fd for fd, _ in both.poll()]
        if let_go := job["lifeline"] in ready:
            os.kill(program, signal.SIGKILL)
        else:
            os.read(wake, 4096)
        done, status, usage = os.wait4(program, 0 if let_go else os.WNOHANG)
        if done:
            break
    _tell(
        job,
        exit_code=os.waitstatus_to_exitcode(status),
        cpu_secs=usage.ru_utime + usage.ru_stime,
    )
    os._exit(0)


def _become_program(job: dict) -> None:
    folder = "/tmp" if "jail" in job["layers"] else job["folder"]
    os.chdir(folder)
    with open("program.py", "wb") as file:
        file.write(job.pop("source").encode("utf-8", "surrogatepass"))
    report, secret = job["report"], job["secret"]
    _apply(job, INSIDE)
    os.close(job["control"])
    sys.argv, sys.path[0], sys.dont_write_bytecode = ["program.py"], folder, True
    job.clear()
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


def _call(function, *args: object) -> int:
    """A C function of libc; OSError with its errno."""
    result = function(*args)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *args: object) -> int:
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _call(_libc().syscall, ctypes.c_long(number), *longs)


def _prctl(option: int, *args: object) -> None:
    longs = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    _call(_libc().prctl, option, *longs, *[ctypes.c_ulong(0)] * (4 - len(longs)))


def _machine(table: dict[str, int]) -> int:
    if platform.machine() not in table:
        raise OSError(_ENOSYS, f"not written for {platform.machine()}")
    return table[platform.machine()]


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() for word in (source, target, kind)]
    _call(_libc().mount, *words, ctypes.c_ulong(flags), options.encode())


def _namespaces(_job: dict, also: int = 0) -> None:
    _call(_libc().unshare, sum(_NAMESPACES.values()) | also)


def _user_namespaces(job: dict) -> None:
    """The same without being root: as nobody of a user namespace of its own."""
    maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {os.geteuid()} 1"}
    maps["gid_map"] = f"{NOBODY} {os.getegid()} 1"
    _namespaces(job, _NEW_USER)
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _visible() -> list[str]:
    """What a Python program needs: shared libraries and the standard library."""
    roots = {"/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store"}
    roots |= {os.path.join(p, "lib") for p in (sys.base_prefix, sys.base_exec_prefix)}
    roots.add(os.path.dirname(os.__file__))
    found: list[str] = []
    for path in sorted(filter(os.path.exists, roots)):
        if not any(path.startswith(f"{above}/") for above in found if not os.path.islink(above)):
            found.append(path)
    return found


def _jail(job: dict) -> None:
    """A file tree of its own: what is visible, read-only, and a small /tmp that vanishes."""
    root, small = job["folder"], _NOSUID | _NODEV
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", small, "size=1m,nr_inodes=1024,mode=755")
    for path in _visible():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        else:
            _bind(path, root + path)
            _read_only(root + path)
    os.mkdir(f"{root}/dev")
    for path in ("/dev/null", "/dev/urandom"):
        _bind(path, root + path)
    os.mkdir(f"{root}/tmp")
    options = f"size={job['limits']['file_bytes']},nr_inodes=1024,mode=1777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", small | _NOEXEC, options)
    _read_only(root)
    os.chdir(root)
    _syscall(_machine(_PIVOT_ROOT), b".", b".")  # the old root now lies on top of the new one
    _call(_libc().umount2, b".", _DETACH)
    os.chdir("/")


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        with open(target, "x"):
            pass
    _mount(path, target, "", _BIND | _REC)


def _read_only(path: str) -> None:
    flags = os.statvfs(path).f_flag
    kept = sum(mount for stat, mount in _KEEP.items() if flags & stat)
    _mount("none", path, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)


def _own_folder(job: dict) -> None:
    """Without a jail the folder is a real one, which the program's user must own."""
    if "jail" not in job["layers"]:
        os.chown(job["folder"], job["uid"], job["uid"])


def _user(job: dict) -> None:
    """From root to a user that nobody is."""
    os.setgroups([])
    os.setgid(job["uid"])
    os.setuid(job["uid"])
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"other users cannot read {os.path.dirname(os.__file__)}")


def _limits(job: dict) -> None:
    limits = job["limits"]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_secs"])  # soft = hard: SIGKILL, which none can catch
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_NPROC, limits["processes"])


def _memory(job: dict) -> None:
    _limit(resource.RLIMIT_AS, job["limits"]["memory_bytes"])


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _privileges(_job: dict) -> None:
    """None of root's powers, no way to get them back, and death with the launcher."""
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall(_machine(_CAPSET), header, none)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _landlock(job: dict) -> None:
    """Files: only what is visible can be read, only the work folder written."""
    abi = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)  # later kernels know more of them
    everything = (1 << rights) - 1
    execute, write, read, list_dir = 1, 2, 4, 8
    # Files; from 4 on TCP, from 6 on abstract sockets and signals to the outside.
    handled = struct.pack("=QQQ", everything, 3, 3)[: 8 + 8 * (abi >= 4) + 8 * (abi >= 6)]
    rules = _syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    allowed = {path: execute | read | list_dir for path in _visible()}
    allowed |= {"/dev/null": read | write, "/dev/urandom": read}
    allowed[os.getcwd()] = everything & ~execute
    for path, access in allowed.items():
        if not os.path.isdir(path):
            access &= execute | write | read
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall(_LANDLOCK_ADD_PATH, rules, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _numbers(table: str, machine: str) -> dict[str, int]:
    """Call numbers by name, as one kind of machine counts them."""
    lines = [line for line in table.splitlines() if not line.startswith("#")]
    words = " ".join(lines).split()
    numbers = words[1::3] if machine == "x86_64" else words[2::3]
    return {name: int(no) for name, no in zip(words[::3], numbers, strict=True) if no != "-"}


def _seccomp(job: dict) -> None:
    """System calls that a program of its own has no use for are refused with EPERM."""
    table = _SYSCALLS if "jail" in job["layers"] else _SYSCALLS + _METADATA_SYSCALLS
    own = os.getpid()
    only = {name: (0, [own]) for name in ("kill", "tkill", "tgkill")}
    only["prlimit64"] = (0, [0, own])
    never = {"ioctl": (1, [_TIOCSTI, _TIOCLINUX]), "prctl": (0, [_PR_SET_PDEATHSIG])}
    architecture = _machine(_AUDIT_ARCH)

    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    # (code, jump if true, jump if false, value); data: number at 0, architecture 4, arguments 16...
    filter_ = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill)]
    filter_ += [(load, 0, 0, 0), (at_least, 0, 1, _LAST_KNOWN_SYSCALL + 1)]
    filter_ += [(leave, 0, 0, refuse | _ENOSYS)]
    for name, number in _numbers(table, platform.machine()).items():
        if name == "clone":  # threads
            body = [(load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD)]
            body += [(leave, 0, 0, refuse | _EPERM), (leave, 0, 0, allow)]
        elif name == "clone3":  # keeps its flags in memory, unseen; libc then uses clone
            body = [(leave, 0, 0, refuse | _ENOSYS)]
        elif name in only or name in never:
            argument, values = (only | never)[name]
            hit, miss = (allow, refuse | _EPERM) if name in only else (refuse | _EPERM, allow)
            body = [(load, 0, 0, 16 + 8 * argument)]
            for value in values:
                body += [(equal, 0, 1, value), (leave, 0, 0, hit)]
            body += [(leave, 0, 0, miss)]
        else:
            body = [(leave, 0, 0, refuse | _EPERM)]
        filter_ += [(equal, 0, len(body), number), *body]
    filter_ += [(leave, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in filter_))
    program = struct.pack("@HP", len(filter_), ctypes.addressof(code))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, program)


# In this order: before the fork, and after it in the program's process.
OUTSIDE = {
    "namespaces": _namespaces,
    "user namespaces": _user_namespaces,
    "jail": _jail,
    "user": _own_folder,
}
INSIDE = {
    "limits": _limits,
    "user": _user,
    "memory": _memory,
    "privileges": _privileges,
    "landlock": _landlock,
    "seccomp": _seccomp,
}
