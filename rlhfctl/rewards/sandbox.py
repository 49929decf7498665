"""Walls around a forked process that runs a program which nobody has read. Linux, standard library only.

`lock_in` is final for the calling process: limits of memory, CPU time and size, no file descriptor but one, and a
seccomp filter that lets through what computing takes and nothing else. There is no call left that opens a file or a
socket, makes a process, signals another one, or looks at its memory.
"""

import ctypes
import os
import platform
import resource
import signal
import struct

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
EPERM = 1

# BPF: load a word of seccomp_data (0: call number, 4: architecture), jump if equal, return.
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06

# (audit architecture, numbers of the calls that pass) by machine. Memory, signal handlers of its own, time, random
# numbers, reading and writing what is open already, and the end.
# fmt: off
CALLS = {
    "x86_64": (
        0xC000003E,
        (
            0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 35, 39, 60, 96, 98, 131, 186, 201, 202,
            219, 228, 229, 230, 231, 318, 334,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            57, 62, 63, 64, 80, 93, 94, 98, 101, 113, 114, 115, 124, 128, 132, 134, 135, 139, 165, 169, 172,
            178, 214, 215, 216, 222, 226, 233, 278, 293,
        ),
    ),
}
# fmt: on


def supported() -> str | None:
    """None where programs can be locked in here, else the reason why not."""
    if platform.system() != "Linux" or platform.machine() not in CALLS:
        return f"programs are run on Linux on {' or '.join(CALLS)} only, where they can be locked in"
    return None


def lock_in(descriptor: int, memory: int, cpu_seconds: int) -> None:
    """From here on the process can compute, and write to `descriptor`. memory: bytes beyond what is mapped already."""
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, PR_SET_PDEATHSIG, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if descriptor != 3:
        os.dup2(descriptor, 3)
    os.closerange(4, 1 << 16)

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: mapped + memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_NOFILE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    architecture, allowed = CALLS[platform.machine()]
    _filter(libc, architecture, allowed)


def _prctl(libc: ctypes.CDLL, option: int, argument: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def _filter(libc: ctypes.CDLL, architecture: int, allowed: tuple[int, ...]) -> None:
    program = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, RET_KILL_PROCESS)]
    program += [(LOAD, 0, 0, 0)]
    program += [(JUMP_EQUAL, len(allowed) - place, 0, call) for place, call in enumerate(allowed)]
    program += [(RETURN, 0, 0, RET_ERRNO | EPERM), (RETURN, 0, 0, RET_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_ulong(ctypes.addressof(header)), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses the seccomp filter")
