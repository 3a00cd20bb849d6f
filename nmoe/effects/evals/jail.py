"""What stands between a graded program and the machine. Run as a program of its own, with nothing but Python's library.

`main` reads one line of JSON from standard input and writes one to standard output. The program gets
new namespaces (mounts, processes, network, IPC, host name; users, unless it is started by root), a file system of
Python's own folders and the system's libraries, all read-only, no /proc, no capability, another user's rights, limits
on memory, time and output, and may start no process or thread. It has one process, whose id is known here: it is killed
whatever it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITIES = 64
NOBODY = 65534

PROGRAM = """
import json, sys
given = json.loads(sys.stdin.readline())
scope = {"__name__": "program"}
exec(compile(given["program"], "program", "exec"), scope)
asked = json.loads(sys.stdin.readline())
results = []
for arguments in asked["calls"]:
    try:
        results.append(["value", json.loads(json.dumps(scope[asked["entry"]](*arguments)))])
    except Exception as error:
        results.append(["error", type(error).__name__])
sys.stdout.write("\\n" + asked["nonce"] + json.dumps(results) + "\\n")
sys.stdout.flush()
"""
"""What runs inside. The expected results are not there: whatever the program reads or prints, it has to know them."""


def main() -> None:
    """Run one program. Writes: standard output, one line: `status`, and what the program printed."""
    given = json.loads(sys.stdin.readline())
    try:
        root = os.getuid() == 0
        _leave(given["folder"])
        outcome = _watched(given, root)
    except OSError as error:
        outcome = {"status": "refused", "output": f"{error.strerror} ({error.filename or 'namespaces'})"}
    sys.stdout.write(f"{json.dumps(outcome)}\n")


def _call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises: OSError with its name when it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def shown(prefix: str) -> list[str]:
    """The folders a program sees: the libraries, and Python's own unless it lies in one of them."""
    system = ["/usr", "/lib", "/lib64"]
    return system if any(f"{prefix}/".startswith(f"{path}/") for path in system) else [*system, prefix]


def _leave(folder: str) -> None:
    """Go into new namespaces, whose root will be `folder`: Python and the libraries, read-only."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"none", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path in shown(os.path.realpath(sys.base_prefix)):
        if os.path.islink(path):
            os.symlink(os.readlink(path), folder + path)
        elif os.path.isdir(path):
            os.makedirs(folder + path)
            _call("mount", path.encode(), (folder + path).encode(), None, MS_BIND | MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)  # MOUNT_ATTR_* have these values
    where = (ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_long(AT_FDCWD), folder.encode(), AT_RECURSIVE)
    _call("syscall", *where, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)))


def _watched(given: dict[str, object], root: bool) -> dict[str, object]:
    """Start the program in a process of its own, read what it prints, and end it in time."""
    executable = os.path.realpath(sys.executable)  # while its links are there
    for_program, from_program = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.dup2(for_program[0], 0)
            os.dup2(from_program[1], 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.closerange(3, 256)
            _confine(given, root)
            os.execve(executable, [executable, "-I", "-S", "-c", PROGRAM], {})
        finally:
            os._exit(125)
    os.close(for_program[0])
    os.close(from_program[1])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(for_program[1], f"{json.dumps(given['first'])}\n{json.dumps(given['second'])}\n".encode())
        os.close(for_program[1])
    except BrokenPipeError:  # it ended before it read
        os.close(for_program[1])
    status, output = _read(from_program[0], float(str(given["seconds"])), int(str(given["output_bytes"])))
    os.kill(process, signal.SIGKILL)  # the first of its namespace: with it everything in it ends
    os.waitpid(process, 0)
    return {"status": status, "output": output.decode("utf-8", "replace")}


def _confine(given: dict[str, object], root: bool) -> None:
    """Give up, in the process that becomes the program, everything it does not need."""
    folder, memory = str(given["folder"]), int(str(given["memory_bytes"]))
    seconds = int(float(str(given["seconds"]))) + 1
    os.chroot(folder)
    os.chdir("/")
    for capability in range(CAPABILITIES):
        try:
            _call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:  # beyond the last one of this kernel
            break
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    nothing = (ctypes.c_uint32 * 6)()
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), nothing)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),  # after the change of user: a count above it would make execve fail
    ):
        resource.setrlimit(what, (limit, limit))


def _read(source: int, seconds: float, most: int) -> tuple[str, bytes]:
    """What comes from a pipe until its end, the time or the size is reached: ended, time, output."""
    end, output = time.monotonic() + seconds, b""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return "time", output
        ready, _, _ = select.select([source], [], [], left)
        if ready:
            part = os.read(source, 1 << 16)
            output += part
            if not part:
                return "ended", output
            if len(output) > most:
                return "output", output[:most]
