"""uvicorn's HTTP protocol, with a bound on the head of a request and our envelope for what is no HTTP."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmserve.errors import ApiError

HEAD_BYTES = 64 * 1024  # request line and headers; the parser itself would take any number
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    in_head = False
    head_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_head, self.head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is over."""
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; too many before the end of its head are refused."""
        super().data_received(data)
        if self.in_head and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                message = (
                    f"request line and headers are longer than {HEAD_BYTES} bytes: send the prompt by POST"
                )
                self.refuse(ApiError(431, "head_too_large", message))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to bytes that it cannot parse."""
        self.refuse(ApiError(400, "invalid_http", f"{msg} Send HTTP/1.1"))

    def refuse(self, error: ApiError) -> None:
        """Answer without a handler, and hang up."""
        body = error.body()
        start = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (
            error.status,
            REASONS[error.status],
        )
        self.transport.write(start + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        self.transport.close()
