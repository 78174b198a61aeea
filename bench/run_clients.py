#!/usr/bin/python3.13
"""Runs real clients against the gateway in front of the engine `continuous` and of vLLM; writes docs/use/clients.md.

Each client runs its own quick start, in an environment of its own, with nothing but a URL, a key and the model's name. The
model is small, so first turns of tool loops require a call; the grammar determines its form.

Needs `make env`, `make bundle`, and `make peers PEER="clients guidellm"`; without the peer vLLM its table stays.
Exit code 0, or 1 if a step failed.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_peers
from stand import PYTHON, ROOT, Stand, free_port, skip

PAGE = ROOT / "docs/use/clients.md"
MODEL = ROOT / ".lab/bundle/models/smollm2-135m-instruct"
PROGRAMS = ROOT / "bench/clients"
STEPS = {
    "list_models": "list",
    "answer": "answer",
    "stream": "stream",
    "second_turn": "second turn",
    "tool_loop": "tool loop",
    "structured_output": "structured output",
    "responses": "Responses",
}
UPSTREAMS = ("continuous", "vllm")
# What they would otherwise fetch or send when they are imported or run.
OFFLINE = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
CLIENT_SECONDS = 1800
LIMITS = {"queue_seconds": CLIENT_SECONDS, "answer_seconds": CLIENT_SECONDS}
VLLM_TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@dataclass(frozen=True)
class Client:
    """`environment`: that of bench/ which runs it; none: Node.js."""

    name: str
    program: str
    environment: str | None
    notes: str

    def command(self) -> list[str]:
        """The program, run by its interpreter."""
        python = ROOT / f"bench/.venv-{self.environment}/bin/python"
        return [str(python) if self.environment else "node", str(PROGRAMS / self.program)]

    def installed(self) -> bool:
        """Whether `make peers` has installed it."""
        return Path(self.command()[0]).exists() if self.environment else (PROGRAMS / "node_modules").exists()


CLIENTS = [
    Client("openai-python", "openai_python.py", "clients", ""),
    Client("openai-node", "openai_node.mjs", None, "6 is the last major version for Node.js 20"),
    Client("LangChain", "langchain_agent.py", "clients", "`create_agent`; `check_embedding_ctx_length=False`"),
    Client("LiteLLM SDK", "litellm_sdk.py", "clients", "`LITELLM_LOCAL_MODEL_COST_MAP=True`, else its import asks GitHub"),
    Client("OpenAI Agents SDK", "agents_sdk.py", "clients", "`OPENAI_AGENTS_DISABLE_TRACING=1`, else it sends traces to OpenAI"),
    Client("pydantic-ai", "pydantic_agent.py", "clients", ""),
    Client("guidellm", "guidellm_run.py", "guidellm", "synthetic data need the model's tokenizer on the client"),
]  # fmt: skip
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "A response to be stored": ("responses", {"input": "Hi", "store": True}),
    "A stored response to continue": ("responses", {"input": "Hi", "previous_response_id": "resp_1"}),
    "A response in the background": ("responses", {"input": "Hi", "background": True}),
    "A provider's own tool": ("responses", {"input": "Hi", "tools": [{"type": "web_search"}]}),
    "A picture": ("chat/completions", {"messages": [{"role": "user", "content": [PICTURE]}]}),
    "A chat template of the client": ("chat/completions", {**CHAT, "chat_template": "{{ messages }}"}),
    "A priority": ("chat/completions", {**CHAT, "priority": 1}),
    "An unknown field": ("chat/completions", {**CHAT, "creativity": 1}),
}


def start(stand: Stand, upstream: str) -> int:
    """Start the upstream and a gateway in front of it; returns the gateway's port."""
    name, port = MODEL.name, free_port()
    if upstream == "vllm":
        vllm = engine_peers.start_vllm(stand, str(MODEL), "float32", name, *VLLM_TOOLS)
        url = f"http://127.0.0.1:{vllm.port}"
        engine: dict[str, Any] = {
            "remote": {"url": url, "revision": "bench", "context": engine_peers.CONTEXT}
        }
    else:
        manifest = stand.folder / "manifest"
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in MODEL.iterdir()}
        manifest.write_text("".join(f"{digest}  {file}\n" for file, digest in sorted(digests.items())))
        model = {"driver": "continuous", "path": str(MODEL), "manifest": str(manifest), "dtype": "float32"}
        stand.start_engine(name, **model)
        engine = {"socket": str(stand.folder / "engine.sock")}
    stand.gateway(
        f"gateway-{upstream}", [PYTHON, "-m", "llmserve"], port, engines={name: engine}, limits=LIMITS
    )
    return port


def row(client: Client, server: dict[str, str], folder: Path) -> dict[str, Any]:
    """Version and cells of a client."""
    environment = OFFLINE | {"HOME": str(folder), "PATH": os.environ["PATH"], "TOKENIZER": str(MODEL)}
    done = subprocess.run(
        client.command(),
        input=json.dumps(server),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
        timeout=CLIENT_SECONDS,
    )
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    if not outcome or any(cell != "yes" for cell in outcome["cells"].values()):
        print(done.stderr, file=sys.stderr)
    if not outcome:
        raise SystemExit(f"{client.name} exited with {done.returncode}: its last words are above")
    return outcome


def refusal(port: int, key: str, path: str, body: dict[str, Any]) -> str:
    """The gateway's refusal of a request."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=CLIENT_SECONDS)
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    link.request("POST", f"/v1/{path}", json.dumps({"model": MODEL.name, **body}), headers)
    error = json.loads(link.getresponse().read()).get(
        "error", {"code": "answered", "param": "", "message": ""}
    )
    link.close()
    return f"`{error['code']}`, `{error['param']}`:\n  {error['message']}"


def ask(upstream: str, clients: list[Client]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Rows by client, and the gateway's refusals."""
    rows: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-clients-") as name,
        Stand(Path(name), pinned=False) as stand,
    ):
        stand.start_writer()
        port = start(stand, upstream)
        server = {"url": f"http://127.0.0.1:{port}", "key": stand.key, "model": MODEL.name}
        for client in clients:
            rows[client.name] = row(client, server, stand.folder)
            print(f"{upstream}, {client.name}: {rows[client.name]['cells']}", file=sys.stderr)
        return rows, {label: refusal(port, stand.key, *request) for label, request in REFUSED.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| client | version | {' | '.join(STEPS.values())} | notes |", "|---" * (len(STEPS) + 3) + "|"]
    for client in CLIENTS:
        if client.name in rows:
            answered = rows[client.name]
            cells = [client.name, answered["version"], *(answered["cells"].get(step, "–") for step in STEPS)]
            lines.append(f"| {' | '.join([*cells, client.notes])} |")
    return "\n".join(lines)


def write(section: str, text: str) -> None:
    """Replace the part of the page between the section's comments."""
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    page, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}{text}\n{end}", PAGE.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} sections '{section}' instead of one: restore its two comments")
    PAGE.write_text(page)


def main() -> int:
    """Run the clients and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upstream", choices=UPSTREAMS, nargs="+", default=UPSTREAMS)
    names = [client.name for client in CLIENTS]
    parser.add_argument(
        "--client", choices=names, nargs="+", default=names, help="prints the table: a page has all clients"
    )
    options = parser.parse_args()
    clients = [client for client in CLIENTS if client.name in options.client]
    for absent in [client for client in clients if not client.installed()]:
        raise SystemExit(f'{absent.name} is not there: `make peers PEER="clients guidellm"` installs it')
    failures: list[str] = []
    for upstream in options.upstream:
        if upstream == "vllm" and not engine_peers.installed("vllm").exists():
            skip("vLLM is not there: `make peers PEER=vllm` installs it")
            continue
        rows, refusals = ask(upstream, clients)
        failures += [
            f"{upstream}, {name}, {step}: {cell}"
            for name, outcome in rows.items()
            for step, cell in outcome["cells"].items()
            if cell != "yes"
        ]
        failures += [
            f"{upstream}: {label} is answered"
            for label, text in refusals.items()
            if text.startswith("`answered`")
        ]
        if clients != CLIENTS:
            print(table(rows))
            continue
        write(upstream, table(rows))
        if upstream == "continuous":
            write("refused", "\n".join(f"- {label}: {text}" for label, text in refusals.items()))
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
