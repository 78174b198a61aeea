"""Takes sockets of networks away from an engine: the containers of a pod share one, with the policy's and the metrics' ports.

On hosts systemd does the same (`PrivateNetwork=`, `RestrictAddressFamilies=`). Written for prctl(2) since the image has no
libseccomp.
"""

import ctypes
import errno
import os
import struct

# AUDIT_ARCH_* of linux/audit.h, and the numbers of socket(2) and io_uring_setup(2), which can open sockets as well.
ARCHITECTURES = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
X32 = 0x40000000  # beginning with this, numbers are those of x86's third ABI
AF_UNIX = 1
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
LOAD, EQUAL, AT_LEAST, RETURN = (
    0x20,
    0x15,
    0x35,
    0x06,
)  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EAFNOSUPPORT, 0x80000000


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def unix_sockets_only() -> None:
    """From now on this thread, threads that it starts and programs get EAFNOSUPPORT for sockets other than UNIX ones.

    Cannot be undone; call it before any thread is started. Raises OSError where the kernel has no seccomp.
    """
    architecture, socket, io_uring = ARCHITECTURES[os.uname().machine]
    # (code, operand, instructions to pass over if the comparison holds, and if it does not)
    steps = [
        (LOAD, ARCHITECTURE, 0, 0),
        (EQUAL, architecture, 1, 0),
        (RETURN, KILL, 0, 0),
        (LOAD, NUMBER, 0, 0),
        (AT_LEAST, X32, 4, 0),
        (EQUAL, io_uring, 3, 0),
        (EQUAL, socket, 0, 3),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (EQUAL, AF_UNIX, 1, 0),
        (RETURN, REFUSE, 0, 0),
        (RETURN, ALLOW, 0, 0),
    ]
    code = b"".join(struct.pack("HBBI", step, *jumps, operand) for step, operand, *jumps in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)
    ):
        number = ctypes.get_errno()
        raise OSError(
            number,
            f"the kernel does not restrict sockets (seccomp): {os.strerror(number)}; enable CONFIG_SECCOMP_FILTER",
        )
