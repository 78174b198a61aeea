"""The gateway's end of an engine's socket, for tests of the protocol."""

import socket

from service import Service

from llmserve.protocol import Beat, Delta, Done, Frame, Hello, decode, encode


class Gateway:
    def __init__(self, service: Service, model: str = "random") -> None:
        """Connect and read the Hello."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(service.folder / f"{model}.sock"))
        self.lines = self.socket.makefile("rb")
        hello = decode(self.lines.readline())
        assert isinstance(hello, Hello)
        self.hello = hello

    def say(self, *frames: Frame) -> None:
        self.socket.sendall(b"".join(encode(frame) for frame in frames))

    def read(self) -> Delta | Done:
        """The next frame of an answer, skipping beats."""
        while isinstance(frame := decode(self.lines.readline()), Beat):
            pass
        assert isinstance(frame, Delta | Done), frame
        return frame

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
