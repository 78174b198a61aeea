"""tunnel_handshake.py UNIT SOCKET: what stunnel's UNIT logs about the server behind SOCKET.

Prints the server's address, the host name for which its certificate was verified, and the TLS version. Exit 1 if
stunnel ends the connection, or has not logged the TLS version after 6 s.
"""

import socket
import subprocess
import sys
import time

FACTS = ("s_connect: connected ", "CERT: ", " ciphersuite: ")
TRIES, PAUSE_SECONDS = 60, 0.1


def log_lines(unit: str, since: float) -> list[str]:
    journal = ["journalctl", "--quiet", "--output=cat", f"--unit={unit}", f"--since=@{since:.6f}"]
    lines = subprocess.run(journal, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.partition(": ")[2] for line in lines if any(fact in line for fact in FACTS)]


def main() -> None:
    unit, place = sys.argv[1:]
    since = time.time()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        connection.settimeout(PAUSE_SECONDS)
        for _ in range(TRIES):
            lines = log_lines(unit, since)
            if any(FACTS[-1] in line for line in lines):
                print("\n".join(lines))
                return
            try:
                ended = not connection.recv(1)
            except TimeoutError:
                ended = False
            except OSError:
                ended = True
            if ended:
                sys.exit(f"{unit} ended the connection: {'; '.join(log_lines(unit, since))}")
    sys.exit(f"{unit} has no handshake after {TRIES * PAUSE_SECONDS:.0f} s: {'; '.join(lines)}")


if __name__ == "__main__":
    main()
