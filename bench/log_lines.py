"""Lines and journal entries as an estate has them, made up."""

import json
import random
from typing import Any

CHANCE = random.Random(17)  # noqa: S311 - no secret
TENANTS = [f"tenant-{number}" for number in range(20)]
SHIP = "llmkeep-audit-ship.service"


def hexadecimal(size: int) -> str:
    return CHANCE.randbytes(size).hex()


def gateway_line(number: int) -> str:
    """An answered request, as the gateway logs it."""
    return json.dumps(
        {
            "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.{number % 1000:03}+00:00",
            "log.level": "info",
            "log.logger": "llmserve.gateway",
            "message": "answered",
            "ecs.version": "8.11",
            "http.request.id": hexadecimal(16),
            "http.request.method": "POST",
            "http.response.status_code": CHANCE.choice([200] * 19 + [429]),
            "url.path": CHANCE.choice(["/generate", "/v1/chat/completions"]),
            "event.duration": CHANCE.randrange(10**8, 10**10),
            "trace.id": hexadecimal(16),
            "user.id": f"user-{CHANCE.randrange(500)}",
            "organization.id": CHANCE.choice(TENANTS),
            "gen_ai.request.model": "llama-70b",
            "gen_ai.usage.input_tokens": CHANCE.randrange(4000),
            "gen_ai.usage.output_tokens": CHANCE.randrange(1000),
            "llm.cache": "miss",
            "llm.finish_reason": "stop",
        }
    )


def edge_line(number: int) -> str:
    """nginx's, by roles/edge's log_format."""
    return json.dumps(
        {
            "client": f"10.1.{CHANCE.randrange(8)}.{CHANCE.randrange(250)}",
            "method": "POST",
            "path": "/generate",
            "protocol": "HTTP/2.0",
            "status": 200,
            "bytes": CHANCE.randrange(20000),
            "seconds": number % 9000 / 1000,
            "upstream": "unix:/run/llm-gateway/1.sock",
            "upstream_status": "200",
            "upstream_seconds": f"{number % 9000 / 1000}",
            "tls": "TLSv1.3",
            "group": "X25519MLKEM768",
            "limited": "--",
            "request_id": hexadecimal(16),
        }
    )


def auth_line(number: int) -> str:
    client = f"10.1.0.{number % 250} port {CHANCE.randrange(65536)}"
    return f"Accepted publickey for ops{number % 7} from {client} ssh2: ED25519 SHA256:{hexadecimal(16)}"


def system_line(number: int) -> str:
    return f"Started session-{number}.scope - unit {hexadecimal(4)} of user {number % 90}, took {CHANCE.randrange(9999)} ms."


def audit_line(number: int) -> str:
    """A line of the audit record, as audit_ship.py prints it; a request has two."""
    record = {
        "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.{number % 1000:03}Z",
        "event.action": "generate",
        "event.category": "web",
        "event.duration": CHANCE.randrange(10**8, 10**10),
        "event.kind": "event",
        "event.outcome": "success",
        "event.sequence": number,
        "event.type": "access",
        "gen_ai.request.model": "llama-70b",
        "gen_ai.usage.input_tokens": CHANCE.randrange(4000),
        "gen_ai.usage.output_tokens": CHANCE.randrange(1000),
        "http.request.id": hexadecimal(16),
        "http.response.status_code": 200,
        "llmkeep.audit.phase": "outcome",
        "llmkeep.audit.source": "llm1",
        "llmkeep.decision.id": hexadecimal(16),
        "llmkeep.decision.revision": "sha256:" + "5" * 64,
        "llmkeep.prompt.hmac": hexadecimal(32),
        "organization.id": CHANCE.choice(TENANTS),
        "source.ip": f"10.1.{CHANCE.randrange(8)}.{CHANCE.randrange(250)}",
        "transaction.id": hexadecimal(16),
        "url.path": "/generate",
        "user.id": f"user-{CHANCE.randrange(500)}",
        "llmkeep.audit.previous": hexadecimal(32),
        "llmkeep.audit.hash": hexadecimal(32),
    }
    return json.dumps(
        {
            "message": "a line of the audit record",
            "event.action": "audit_shipped",
            "event.sequence": number,
            "llmkeep.audit.leaf": hexadecimal(32),
            "llmkeep.audit.record": json.dumps(record, separators=(",", ":")),
        }
    )


# By stream, and kind where a stream has two: the line, identifier, unit.
KINDS = {
    "llmkeep.service": (gateway_line, "python", "llm-gateway@1.service"),
    "llmkeep.service/audit": (audit_line, "python3", SHIP),
    "llmkeep.edge": (edge_line, "llmkeep_edge", "nginx.service"),
    "llmkeep.auth": (auth_line, "sshd-session", "ssh.service"),
    "llmkeep.system": (system_line, "systemd", "init.scope"),
}


def entry(stream: str, number: int) -> dict[str, Any]:
    """The journal's entry of such a line, as Filebeat's journal input gives it to the processors."""
    make, identifier, unit = KINDS[stream]
    return {
        "@timestamp": f"2026-11-27T12:{number // 60 % 60:02}:{number % 60:02}.000Z",
        "message": make(number),
        "syslog": {"identifier": identifier, "priority": 6, "facility": 3},
        "systemd": {"transport": "stdout", "unit": unit, "slice": "system.slice"},
        "journald": {
            "pid": 1000 + number % 50,
            "process": {"name": identifier, "executable": "/usr/lib/openssh/sshd-session"},
        },
        "process": {"pid": 1000 + number % 50, "command_line": "x"},
        "host": {"hostname": "llm1"},
        "event": {"kind": "event"},
    }
