"""Imports of peft, which imports bitsandbytes, without torch's compiler.

bitsandbytes compiles functions for CPUs when it is imported, which imports Inductor: 1.2 s of CPU in each process. Called,
they would need a C++ compiler, which no host has; without one bitsandbytes calls the functions as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block, `torch.compile` returns functions as they are."""
    compiler = torch.compile

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function or unchanged

    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = compiler
