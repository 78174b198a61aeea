"""`vllm serve`: its command and its parser, by the names that vLLM gives them, and a server that repeats what it is asked."""

import argparse
import contextlib
import hmac
import http.server
import json
import os
import signal
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

WORDS = (
    "config",
    "model",
    "served-model-name",
    "uds",
    "api-key",
    "load-format",
    "quantization",
    "tool-call-parser",
)
NUMBERS = (
    *("block-size", "max-model-len", "max-num-batched-tokens", "max-num-seqs", "pipeline-parallel-size", "seed"),
    *("shutdown-timeout", "tensor-parallel-size"),
)  # fmt: skip
SWITCHES = (
    *("disable-fastapi-docs", "disable-uvicorn-access-log", "enable-auto-tool-choice", "enable-prefix-caching"),
    *("enforce-eager", "trust-remote-code"),
)  # fmt: skip


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes a configuration file's entries as options, as vLLM's does."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if "--config" in given:
            place = given.index("--config")
            given[place : place + 2] = self.words(yaml.safe_load(Path(given[place + 1]).read_text()))
        return super().parse_args(given, namespace)

    def words(self, config: dict[str, Any]) -> list[str]:
        found = []
        for name, value in config.items():
            if value is not False:
                found.append(f"--{name}")
            if not isinstance(value, bool):
                found.append(json.dumps(value) if isinstance(value, dict) else str(value))
        return found


class ServeSubcommand:
    """The one command that there is."""

    name = "serve"

    def subparser_init(self, subparsers: Any) -> FlexibleArgumentParser:
        parser: FlexibleArgumentParser = subparsers.add_parser(self.name)
        parser.add_argument("model_tag", nargs="?")
        for name in WORDS:
            parser.add_argument(f"--{name}")
        for name in NUMBERS:
            parser.add_argument(f"--{name}", type=int)
        for name in SWITCHES:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"])
        parser.add_argument("--gpu-memory-utilization", type=float)
        parser.add_argument("--speculative-config", type=json.loads)
        return parser

    def validate(self, args: argparse.Namespace) -> None:
        if args.enable_auto_tool_choice and not args.tool_call_parser:
            raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")

    def cmd(self, args: argparse.Namespace) -> int:
        """Serve until told to stop."""
        args.model = args.model_tag or args.model
        if not Path(args.model, "config.json").is_file():
            print(f"{args.model} has no config.json", file=sys.stderr)
            return 1
        print("STAND-IN: this is not vLLM, and answers with the words it is asked", flush=True)
        with Server(args) as server:
            signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
            server.serve_forever(0.1)
        return 0


def cmd_init() -> list[ServeSubcommand]:
    return [ServeSubcommand()]


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.uds, Answers)
        self.args = args
        key = os.environ.get("VLLM_API_KEY")
        self.key = f"Bearer {key}" if key else None


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        args = self.server.args
        if self.path == "/health":
            self.answer(200, {})
        elif self.path == "/openapi.json":
            body: dict[str, Any] = {"properties": {"messages": {}, "max_tokens": {}, "seed": {}}}
            self.answer(200, {"components": {"schemas": {"ChatCompletionRequest": body}}})
        elif self.allowed():
            model = {
                "id": args.served_model_name,
                "object": "model",
                "root": args.model,
                "max_model_len": args.max_model_len,
            }
            self.answer(200, {"object": "list", "data": [model]})  # fmt: skip

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.allowed():
            return
        most = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        words = [f"{word} " for word in str(asked["messages"][-1]["content"]).split()[:most]]
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        same = {"id": "chatcmpl-1", "created": 1, "model": self.server.args.served_model_name}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choices = [{"index": 0, "message": message, "finish_reason": "length"}]
            self.answer(200, {**same, "object": "chat.completion", "choices": choices, "usage": usage})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in self.events({**same, "object": "chat.completion.chunk"}, words, usage):
            data = b"data: %s\n\n" % event
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        with contextlib.suppress(OSError):  # a gateway may leave once it has read the last event
            self.wfile.write(b"0\r\n\r\n")

    def events(self, same: dict[str, Any], words: list[str], usage: dict[str, int]) -> Iterator[bytes]:
        """Of a stream: a word each, the end, and what it took."""
        for word in words:
            choices = [{"index": 0, "delta": {"content": word}, "finish_reason": None}]
            yield json.dumps({**same, "choices": choices}).encode()
        last = [{"index": 0, "delta": {}, "finish_reason": "length"}]
        yield json.dumps({**same, "choices": last}).encode()
        yield json.dumps({**same, "choices": [], "usage": usage}).encode()
        yield b"[DONE]"

    def allowed(self) -> bool:
        """Whether the key was given, if it has one; a 401 is sent if not."""
        if self.server.key is None or hmac.compare_digest(
            self.headers.get("authorization", ""), self.server.key
        ):
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        return "the gateway"

    def log_message(self, *words: object) -> None:
        pass
