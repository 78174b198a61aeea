"""System call filters (seccomp), set with prctl(2) since the image has no libseccomp. They cannot be undone."""

import ctypes
import os
import struct
from collections.abc import Sequence

X32 = 0x40000000  # beginning with this, numbers are those of x86's third ABI
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
LOAD, EQUAL, AT_LEAST, RETURN = (
    0x20,
    0x15,
    0x35,
    0x06,
)  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # REFUSE with an error number
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # of linux/audit.h

# (code, operand, instructions to pass over if the comparison holds, and if it does not)
Step = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def apply(steps: Sequence[Step]) -> None:
    """Apply a filter to this thread and to the threads and programs that it starts; a call of another architecture ends the
    process.

    `steps` begin with the call's number loaded. Raises OSError where the kernel has no seccomp.
    """
    whole = [
        (LOAD, ARCHITECTURE, 0, 0),
        (EQUAL, AUDIT_ARCH[os.uname().machine], 1, 0),
        (RETURN, KILL, 0, 0),
        (LOAD, NUMBER, 0, 0),
        *steps,
    ]
    code = b"".join(struct.pack("HBBI", step, *jumps, operand) for step, operand, *jumps in whole)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(whole), code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)
    ):
        number = ctypes.get_errno()
        raise OSError(
            number,
            f"the kernel does not restrict system calls (seccomp): {os.strerror(number)}; enable CONFIG_SECCOMP_FILTER",
        )
