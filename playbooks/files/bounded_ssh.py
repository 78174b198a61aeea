#!/usr/bin/python3
"""bounded_ssh.py WORD...: `ssh WORD...`, killed once it has printed more than LLMKEEP_SSH_BYTES (1 MiB).

Ansible keeps in memory what a host prints, without a bound of its own.
"""

import os
import selectors
import subprocess
import sys
from typing import IO, cast


def main() -> int:
    rest = limit = int(os.environ.get("LLMKEEP_SSH_BYTES", 1 << 20))
    with (
        selectors.DefaultSelector() as pipes,
        subprocess.Popen(["ssh", *sys.argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ssh,
    ):
        for pipe, output in ((ssh.stdout, 1), (ssh.stderr, 2)):
            pipes.register(cast(IO[bytes], pipe), selectors.EVENT_READ, output)
        while pipes.get_map():
            for key, _ in pipes.select():
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    pipes.unregister(key.fileobj)
                elif (rest := rest - len(chunk)) < 0:
                    ssh.kill()
                    os.write(2, f"it printed more than {limit} bytes: look at that host\n".encode())
                    return 255  # unreachable, for Ansible
                else:
                    os.write(key.data, chunk)
    return ssh.returncode


if __name__ == "__main__":
    sys.exit(main())
