"""Removes from a process everything that parsing does not need: files, sockets, programs, other processes, root, memory and
time."""

import errno
import os
import resource

from llmserve.documents.parsers import CPU_SECONDS, MEMORY_BYTES
from llmserve.seccomp import ALLOW, EQUAL, REFUSE, RETURN, apply

NOBODY = 65534
# System calls that remain, on x86_64 and aarch64. None opens, connects, starts or signals anything: the process reads and
# writes what its caller has opened.
CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
LIMITS = {
    resource.RLIMIT_AS: MEMORY_BYTES,
    resource.RLIMIT_CPU: CPU_SECONDS,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 0,
    resource.RLIMIT_NPROC: 0,
}


def confine() -> None:
    """Confine this process permanently; import everything that parsing needs first. All other system calls fail with EPERM.

    Raises OSError if the kernel refuses.
    """
    for limit, most in LIMITS.items():
        hard = resource.getrlimit(limit)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    column = ("x86_64", "aarch64").index(os.uname().machine)
    numbers = [numbers[column] for numbers in CALLS.values()]
    allowed = [(EQUAL, number, len(numbers) - place, 0) for place, number in enumerate(numbers)]
    apply([*allowed, (RETURN, REFUSE | errno.EPERM, 0, 0), (RETURN, ALLOW, 0, 0)])
