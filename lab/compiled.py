"""Run by each Python of a container when it starts: what was imported from a zip once is not compiled again.

Ansible sends each module as a zip of sources, of which Python keeps no bytecode: to compile the same fifty files is half of what
a task costs a host. The bytecode lies in the host's memory, by the source's hash, and only root has it.
"""

# To import pathlib would take each Python's start ten milliseconds; and the folder is root's alone.
# ruff: noqa: PTH103, PTH104, PTH123, S302

import _imp
import marshal
import os
import zipimport
from types import CodeType

FOLDER = "/run/lab/compiled"

compile_source = zipimport._compile_source  # type: ignore[attr-defined]


def compiled(path: str, source: bytes) -> CodeType:
    """What zipimport would make of a source."""
    place = f"{FOLDER}/{_imp.source_hash(0, source).hex()}"
    try:
        with open(place, "rb") as file:
            code: CodeType = marshal.load(file)
            return code
    except (OSError, ValueError, EOFError):
        code = compile_source(path, source)
    staged = f"{place}.{os.getpid()}"
    try:
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        with open(staged, "wb") as file:
            marshal.dump(code, file)
        os.rename(staged, place)
    except OSError:
        pass  # another user's, or a unit that may not write there
    return code


zipimport._compile_source = compiled  # type: ignore[attr-defined]
