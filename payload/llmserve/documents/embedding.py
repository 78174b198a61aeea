"""Vectors of passages, from an engine on this host: a client for programs without an event loop."""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmserve.protocol import LINE_LIMIT, Beat, Done, Failed, Generate, Hello, ProtocolError, decode, encode

TEXTS = 64  # in one request
SECONDS = 300.0  # for one request, others' before it included


class EmbeddingError(Exception):
    """The engine gave no vectors; the message says why."""


class TooLong(EmbeddingError):
    """A text has more tokens than the model accepts."""


class Embedder:
    """A connection to the engine."""

    def __init__(self, link: socket.socket, address: Path) -> None:
        """Raises EmbeddingError if the engine does not run a model for embeddings."""
        self.link = link
        self.frames = link.makefile("rb")
        self.number = 0
        hello = self.frame()
        if not isinstance(hello, Hello) or not hello.dimensions:
            raise EmbeddingError(
                f"{address} is not an engine for embeddings: set documents.model to a model for embeddings"
            )
        self.hello = hello

    def frame(self) -> object:
        """The next frame that is not a beat; raises EmbeddingError."""
        while True:
            try:
                frame = decode(self.frames.readline(LINE_LIMIT))
            except (OSError, ProtocolError) as error:
                raise EmbeddingError(
                    f"the engine for embeddings closed the connection ({error}): see its log"
                ) from None
            if not isinstance(frame, Beat):
                return frame

    def vectors(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each passage, shape (texts, dimensions); raises EmbeddingError."""
        vectors: list[list[float]] = []
        prompt = self.hello.prompts.get("document", "")
        for start in range(0, len(texts), TEXTS):
            self.number += 1
            request = Generate(
                self.number, False, 0, inputs=[prompt + text for text in texts[start : start + TEXTS]]
            )
            self.link.sendall(encode(request))
            match self.frame():
                case Done(text=text):
                    vectors += [each["embedding"] for each in json.loads(text)]
                case Failed(code="context_length_exceeded", message=message):
                    raise TooLong(message)
                case Failed(message=message):
                    raise EmbeddingError(f"the engine for embeddings refused: {message}")
                case _:
                    raise EmbeddingError("the engine for embeddings sent an unexpected frame")
        return vectors


@contextmanager
def connected(address: Path) -> Iterator[Embedder]:
    """Connect to the engine on this UNIX socket; raises EmbeddingError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(SECONDS)
        try:
            link.connect(str(address))
        except OSError as error:
            raise EmbeddingError(f"{address}: {error.strerror}: start the engine for embeddings") from None
        yield Embedder(link, address)
