"""Denies network sockets to an engine: the containers of a pod share one network, which has the policy's and the metrics' ports.

On hosts systemd does the same (`PrivateNetwork=`, `RestrictAddressFamilies=`).
"""

import errno
import os

from llmserve.seccomp import ALLOW, AT_LEAST, EQUAL, FIRST_ARGUMENT, LOAD, REFUSE, RETURN, X32, apply

# The numbers of socket(2) and io_uring_setup(2), which can open sockets as well.
CALLS = {"x86_64": (41, 425), "aarch64": (198, 425)}
AF_UNIX = 1


def unix_sockets_only() -> None:
    """From now on this thread, and the threads and programs that it starts, get EAFNOSUPPORT for all sockets but UNIX ones.

    Cannot be undone; call it before any thread is started. Raises OSError where the kernel has no seccomp.
    """
    socket, io_uring = CALLS[os.uname().machine]
    apply(
        [
            (AT_LEAST, X32, 4, 0),
            (EQUAL, io_uring, 3, 0),
            (EQUAL, socket, 0, 3),
            (LOAD, FIRST_ARGUMENT, 0, 0),
            (EQUAL, AF_UNIX, 1, 0),
            (RETURN, REFUSE | errno.EAFNOSUPPORT, 0, 0),
            (RETURN, ALLOW, 0, 0),
        ]
    )
