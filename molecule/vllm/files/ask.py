"""Ask the model through the edge, whole and as a stream, and vLLM itself on its socket: all three have to say the same."""

import http.client
import json
import socket
import ssl
import subprocess
from typing import Any

BODY = {
    "model": "deepseek",
    "messages": [{"role": "user", "content": "What is the capital of France, and of Japan?"}],
    "max_tokens": 6,
    "temperature": 0,
}


def ask(connection: http.client.HTTPConnection, key: str, **more: Any) -> str:
    """The body of the answer."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY | more), headers)
    answer = connection.getresponse()
    said = answer.read().decode()
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {said}")
    return said


def edge() -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    return http.client.HTTPSConnection("localhost", 443, context=context, timeout=120)


words = [
    "llm-serve",
    "keys",
    "add",
    "--subject",
    "scenario",
    "--tenant",
    "demo",
    "--role",
    "developer",
    "--expires",
    "1d",
]
made = subprocess.run(words, capture_output=True, text=True, check=True).stdout
(key,) = [word for word in made.split() if word.startswith("llmk_")]
whole = json.loads(ask(edge(), key))
text = whole["choices"][0]["message"]["content"]
events = [line[6:] for line in ask(edge(), key, stream=True).splitlines() if line.startswith("data: ")]
choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event)["choices"]]
streamed = "".join(choice["delta"].get("content") or "" for choice in choices)

sealed = "/etc/credstore.encrypted/vllm.key"
own = subprocess.run(
    ["systemd-creds", "decrypt", "--name=vllm.key", sealed, "-"], capture_output=True, text=True, check=True
).stdout
direct = http.client.HTTPConnection("vllm", timeout=120)
direct.sock = socket.socket(socket.AF_UNIX)
direct.sock.connect("/run/vllm/deepseek/api.sock")
itself = json.loads(ask(direct, own))["choices"][0]["message"]["content"]
if not text or not text == streamed == itself:
    raise SystemExit(f"through the edge {text!r}, as a stream {streamed!r}, vLLM itself {itself!r}")
print(
    f"{text!r} of {whole['usage']['completion_tokens']} tokens, through the edge, as a stream, and by vLLM itself"
)
