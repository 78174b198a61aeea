"""Record the fields of vLLM's requests, read from parts of the wheel that the lock names: no other test needs vLLM.

.venv/bin/python tests/helpers/vllm_fields.py > payload/tests/serve/api/vllm-fields.json
"""

import ast
import io
import json
import zipfile

import httpx2

from llmkeep.bundle import lock, remote_wheels

BODIES = {
    "ChatCompletionRequest": "vllm/entrypoints/openai/chat_completion/protocol.py",
    "CompletionRequest": "vllm/entrypoints/openai/completion/protocol.py",
}


def fields(source: bytes, body: str) -> list[str]:
    """The fields of a request's class."""
    (found,) = (
        each for each in ast.parse(source).body if isinstance(each, ast.ClassDef) and each.name == body
    )
    named = [
        each.target.id
        for each in found.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]
    return sorted(name for name in named if not name.startswith("_"))


def main() -> None:
    locked = dict(lock.load(profiles=["gpu"]).environment("vllm"))
    (key,) = (each for each in locked if each.startswith("vllm=="))
    (package,) = (each for each in remote_wheels.packages([key], []) if each["name"] == "vllm")
    (chosen,) = (each for each in package["wheels"] if each["url"].endswith(locked[key].file))
    with httpx2.Client(timeout=60, follow_redirects=True) as client:
        remote = remote_wheels.RemoteFile(client, chosen["url"], chosen["size"])
        with zipfile.ZipFile(io.BufferedReader(remote, 1 << 16)) as wheel:
            bodies = {body: fields(wheel.read(path), body) for body, path in BODIES.items()}
    rows = {"version": locked[key].version} | bodies
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items()]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
