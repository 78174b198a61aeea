"""The table of cases of roles/filebeat/files/processors.yml, and the documents that the real Filebeat makes of them."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from plugin_modules import ROOT

CANARY = "canary-5f1c"
GATEWAY = "llm-gateway@1.service"
ANSWERED = {
    "@timestamp": "2026-11-27T17:59:59.123+00:00",
    "log.level": "info",
    "log.logger": "llmserve.gateway",
    "message": "answered",
    "http.request.id": "r-1",
    "http.response.status_code": 200,
    "event.duration": 12345,
    "user.id": "ada",
    "organization.id": "tenant",
    "llm.model": "smollm2",
    "llmkeep.decision.rule": "model_of_tenant",
    "gen_ai.usage.input_tokens": 5,
    "gen_ai.usage.output_tokens": 8,
}
REFUSED = {
    "log.level": "warning",
    "log.logger": "llmserve.gateway",
    "message": "answered",
    "http.request.id": "r-2",
    "http.response.status_code": 403,
    "event.duration": 4321,
    "error.code": "forbidden",
    "llmkeep.decision.rule": "default_deny",
    "user.id": "eve",
}
# As its layout `json` writes: objects in objects.
KIBANA = {
    "ecs": {"version": "9.0.0"},
    "@timestamp": "2026-11-27T17:59:59.123+00:00",
    "message": "http server running",
    "log": {"level": "INFO", "logger": "http.server.Kibana"},
    "process": {"pid": 5},
    "http": {"request": {"body": {"content": CANARY}}},
}
EDGE = {
    "client": "10.77.0.2",
    "method": "POST",
    "path": "/generate",
    "status": 200,
    "seconds": 0.5,
    "request_id": "r-1",
    "bytes": 321,
    "tls": "TLSv1.3",
    "group": "X25519MLKEM768",
}
SUDO = " ; TTY=pts/0 ; PWD=/root ; USER=root ; COMMAND=/usr/bin/id"
# As the kernel words a system call, around what it did.
AUDITED = "arch=c000003e syscall=257"
CALLER = (
    "a0=ffffffffffffff9c a1=7f7fffc59ee0 a2=941 a3=1b6 items=1 ppid=8 pid=9 auid=1000 uid=0 gid=0 euid=0 suid=0 fsuid=0"
    " egid=0 sgid=0 fsgid=0 tty=pts0 ses=2"
)
PROGRAMS = {"sshd-session": "/usr/lib/openssh/sshd-session", "sudo": "/usr/bin/sudo"}
LOGGER = "/usr/bin/logger"
# Who wrote the line of a case: user id and program, None where the journal lacks it. The others are root's, by PROGRAMS.
WRITERS: dict[str, tuple[int, str | None]] = {
    "sshd, by a program in its unit": (0, LOGGER),
    "sshd, a login by a user that became its program": (1000, PROGRAMS["sshd-session"]),
    "sshd, a failure by a user in its unit": (1000, None),
    "sudo": (1000, PROGRAMS["sudo"]),
    "sudo, by another program": (1000, LOGGER),
    "sudo, by another program of root's": (0, LOGGER),
    "sudo, by a program that the journal lacks": (1000, None),
    "sudo, a session by another program": (1000, LOGGER),
}
SECONDS = 60  # the whole table takes two

# What is in the journal: message, identifier, unit, transport; and fields of the document. None: there is no such field.
CASES: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "gateway": (
        json.dumps(ANSWERED),
        "python",
        GATEWAY,
        "stdout",
        {
            "@timestamp": "2026-11-27T17:59:59.123Z",
            "data_stream.dataset": "llmkeep.service",
            "http.request.id": "r-1",
            "http.response.status_code": 200,
            "event.duration": 12345,
            "user.id": "ada",
            "organization.id": "tenant",
            "log.level": "info",
            "message": "answered",
            "gen_ai.usage.output_tokens": 8,
            "service.name": GATEWAY,
        },
    ),
    "gateway, a refusal": (
        json.dumps(REFUSED),
        "python",
        GATEWAY,
        "stdout",
        {
            "http.response.status_code": 403,
            "error.code": "forbidden",
            "llmkeep.decision.rule": "default_deny",
            "organization": None,
        },
    ),
    "Kibana": (
        json.dumps(KIBANA),
        "kibana",
        "kibana.service",
        "stdout",
        {
            "@timestamp": "2026-11-27T17:59:59.123Z",
            "data_stream.dataset": "llmkeep.service",
            "message": "http server running",
            "log.level": "INFO",
            "log.logger": "http.server.Kibana",
            "http": None,
        },
    ),
    "an undeclared field stays on the host": (
        json.dumps(
            ANSWERED | {"prompt": CANARY, "http.request.body": CANARY, "gen_ai.prompt": {"text": CANARY}}
        ),
        "python",
        GATEWAY,
        "stdout",
        {"message": "answered", "http.request.id": "r-1", "http.request.body": None, "prompt": None},
    ),
    "an entry of a megabyte is cut": (
        "w" * 1_000_000,
        "odd",
        "one-entry.service",
        "journal",
        {"message": "w" * 65_536, "data_stream.dataset": "llmkeep.system"},
    ),
    "a line that claims another stream, host or index": (
        json.dumps(
            {
                "message": "x",
                "@metadata": {"_index": "other", "pipeline": "other"},
                "data_stream": {"dataset": "other"},
                "data_stream.dataset": "other",
                "host.name": "other",
            }
        ),
        "python",
        GATEWAY,
        "stdout",
        {
            "data_stream.dataset": "llmkeep.service",
            "host.name": None,
            "@metadata._index": None,
            "@metadata.pipeline": None,
        },
    ),
    "half a line of JSON": (
        f'{{"prompt": "{CANARY}',
        "python",
        GATEWAY,
        "stdout",
        {
            "data_stream.dataset": "llmkeep.system",
            "message": "a line that begins as JSON and does not decode; the journal of the host has it",
            "event.reason": "undecodable_line",
            "service.name": GATEWAY,
        },
    ),
    "a traceback": (
        "Traceback (most recent call last):",
        "python",
        GATEWAY,
        "stdout",
        {"data_stream.dataset": "llmkeep.system", "message": "Traceback (most recent call last):"},
    ),
    "JSON of a program that is not ours": (
        '{"http.request.id": "r-1"}',
        "other",
        "other.service",
        "stdout",
        {"data_stream.dataset": "llmkeep.system", "http": None},
    ),
    "edge": (
        json.dumps(EDGE),
        "llmkeep_edge",
        "nginx.service",
        "syslog",
        {
            "data_stream.dataset": "llmkeep.edge",
            "http.request.id": "r-1",
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "url.path": "/generate",
            "source.ip": "10.77.0.2",
            "nginx.seconds": 0.5,
            "message": None,
        },
    ),
    "edge, by another process": (
        json.dumps(EDGE),
        "llmkeep_edge",
        "user@1000.service",
        "syslog",
        {"data_stream.dataset": "llmkeep.system", "http": None, "source": None},
    ),
    "sshd, a key is accepted": (
        "Accepted publickey for root from 10.77.0.2 port 34508 ssh2: ED25519 SHA256:x",
        "sshd-session",
        "ssh.service",
        "syslog",
        {
            "data_stream.dataset": "llmkeep.auth",
            "event.action": "ssh_login",
            "event.outcome": "success",
            "user.name": "root",
            "source.ip": "10.77.0.2",
            "source.port": 34508,
            "llmkeep.auth.method": "publickey",
        },
    ),
    "sshd, an unknown user": (
        "Failed password for invalid user bob from 10.77.0.9 port 40000 ssh2",
        "sshd-session",
        "ssh.service",
        "syslog",
        {
            "event.outcome": "failure",
            "user.name": "bob",
            "source.ip": "10.77.0.9",
            "llmkeep.auth.method": "password",
        },
    ),
    "sshd, a key is refused": (
        "Failed publickey for eve from fd00::9 port 40000 ssh2: RSA SHA256:x",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"event.outcome": "failure", "user.name": "eve", "source.ip": "fd00::9", "source.port": 40000},
    ),
    "sshd, an unknown user named as two addresses": (
        "Failed password for invalid user x from 6.6.6.6 port 1 ssh2 from 10.77.0.9 port 40000 ssh2",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"event.outcome": "failure", "user": None, "source": None},
    ),
    "sshd, an unknown user named as no address": (
        "Failed none for invalid user x from nowhere port 1 from 10.77.0.9 port 40000 ssh2",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"data_stream.dataset": "llmkeep.auth", "event.outcome": "failure", "user": None, "source": None},
    ),
    "sshd, by another process": (
        "Accepted publickey for root from 6.6.6.6 port 1 ssh2: ED25519 SHA256:x",
        "sshd-session",
        "session-3.scope",
        "syslog",
        {"data_stream.dataset": "llmkeep.system", "event.action": None, "user": None, "source": None},
    ),
    "sshd, by a program in its unit": (
        "Accepted publickey for root from 6.6.6.6 port 1 ssh2: ED25519 SHA256:x",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"event.action": None, "user": None, "source": None},
    ),
    "sshd, a login by a user that became its program": (
        "Accepted publickey for root from 6.6.6.6 port 2 ssh2: ED25519 SHA256:x",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"event.action": None, "user": None, "source": None},
    ),
    "sshd, a failure by a user in its unit": (
        "Failed password for eve from 6.6.6.6 port 1 ssh2",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"event.action": None, "event.outcome": None, "user": None, "source": None},
    ),
    "sshd, something else": (
        "Received disconnect from 10.77.0.2 port 34508:11: disconnected by user",
        "sshd-session",
        "ssh.service",
        "syslog",
        {"data_stream.dataset": "llmkeep.auth", "event.action": None, "user": None},
    ),
    "sudo": (
        f"   ada : {SUDO.removeprefix(' ; ')}",
        "sudo",
        "",
        "syslog",
        {
            "data_stream.dataset": "llmkeep.auth",
            "event.action": "sudo",
            "event.outcome": "success",
            "user.name": "ada",
            "user.effective.name": "root",
            "process.working_directory": "/root",
            "process.executable": "/usr/bin/id",
            "message": None,
        },
    ),
    "sudo, with arguments and an environment": (
        f"   ada : TTY=pts/0 ; PWD=/ ; USER=root ; ENV=TOKEN={CANARY} ; COMMAND=/usr/bin/curl --user {CANARY} x",
        "sudo",
        "",
        "syslog",
        {
            "event.outcome": "success",
            "user.name": "ada",
            "user.effective.name": "root",
            "process.executable": "/usr/bin/curl",
        },
    ),
    "sudo, the end of a command": (
        f"   ada : {SUDO.removeprefix(' ; ')} {CANARY} ; EXIT=0",
        "sudo",
        "",
        "syslog",
        {
            "event.action": "sudo_exit",
            "event.outcome": "success",
            "user.name": "ada",
            "process.executable": "/usr/bin/id",
            "message": None,
        },
    ),
    "sudo, the end of a command by a signal": (
        f"   ada : {SUDO.removeprefix(' ; ')} ; SIGNAL=TERM ; EXIT=143",
        "sudo",
        "",
        "syslog",
        {"event.action": "sudo_exit", "event.outcome": "failure", "process.executable": "/usr/bin/id"},
    ),
    "sudo, more of a long line": (
        f"   ada : (command continued) {CANARY}",
        "sudo",
        "",
        "syslog",
        {"data_stream.dataset": "llmkeep.auth", "event.action": "sudo", "event.outcome": None, "user": None},
    ),
    "sudo, in another form": (
        f"   ada : a reason of its own ; TTY=pts/0 ; COMMAND=/usr/bin/curl --user {CANARY}",
        "sudo",
        "",
        "syslog",
        {"data_stream.dataset": "llmkeep.auth", "event.action": "sudo", "message": None},
    ),
    "sudo, a session": (
        "pam_unix(sudo:session): session opened for user root(uid=0) by ada(uid=1000)",
        "sudo",
        "",
        "syslog",
        {
            "data_stream.dataset": "llmkeep.auth",
            "event.action": None,
            "message": "pam_unix(sudo:session): session opened for user root(uid=0) by ada(uid=1000)",
        },
    ),
    "sudo, refused": (
        f"   eve : command not allowed{SUDO} {CANARY}",
        "sudo",
        "",
        "syslog",
        {
            "event.outcome": "failure",
            "event.reason": "command not allowed",
            "user.name": "eve",
            "process.executable": "/usr/bin/id",
        },
    ),
    "sudo, by another program": (
        f"   ada : {SUDO.removeprefix(' ; ')} {CANARY}",
        "sudo",
        "",
        "syslog",
        {
            "data_stream.dataset": "llmkeep.system",
            "event.action": "sudo_claimed",
            "event.outcome": None,
            "user": None,
            "process.executable": LOGGER,
            "message": None,
        },
    ),
    "sudo, by another program of root's": (
        f"   bob : {SUDO.removeprefix(' ; ')}",
        "sudo",
        "",
        "syslog",
        {"event.action": "sudo_claimed", "user": None},
    ),
    "sudo, by a program that the journal lacks": (
        f"   bob : command not allowed{SUDO} {CANARY}",
        "sudo",
        "",
        "syslog",
        {"event.action": "sudo_claimed", "event.outcome": None, "user": None, "message": None},
    ),
    "sudo, a session by another program": (
        "pam_unix(sudo:session): session opened for user root(uid=0) by bob(uid=1001)",
        "sudo",
        "",
        "syslog",
        {"data_stream.dataset": "llmkeep.system", "event.action": None},
    ),
    "redis": (
        "1234:M 27 Nov 2026 18:00:00.123 * Ready to accept connections tcp",
        "redis-server",
        "redis-server.service",
        "stdout",
        {"event.provider": "redis", "message": "Ready to accept connections tcp", "process.pid": 1234},
    ),
    "kernel": (
        "oom-kill:constraint=CONSTRAINT_MEMCG",
        "kernel",
        "",
        "kernel",
        {"event.provider": "kernel", "data_stream.dataset": "llmkeep.system"},
    ),
    "audit, a system call by a rule": (
        f'SYSCALL {AUDITED} success=yes exit=3 {CALLER} comm="vipw" exe="/usr/sbin/vipw" subj=unconfined key="identity"',
        "audit",
        "",
        "audit",
        {
            "data_stream.dataset": "llmkeep.system",
            "event.provider": "audit",
            "event.code": "SYSCALL",
            "event.outcome": "success",
            "rule.name": "identity",
            "user.audit.id": "1000",
            "user.id": "0",
        },
    ),
    "audit, a system call that failed": (
        f'SYSCALL {AUDITED} success=no exit=-13 {CALLER} comm="cat" exe="/usr/bin/cat" subj=unconfined key="access"',
        "audit",
        "",
        "audit",
        {"event.outcome": "failure", "rule.name": "access"},
    ),
    "audit, a system call by no rule": (
        f'SYSCALL {AUDITED} success=yes exit=3 {CALLER} comm="cat" exe="/usr/bin/cat" subj=unconfined key=(null)',
        "audit",
        "",
        "audit",
        {"event.code": "SYSCALL", "event.outcome": None, "rule": None, "user": None},
    ),
    "audit, a file that is named as a key": (
        'PATH item=0 name="/tmp/key" inode=9 dev=62:00 mode=0100644 ouid=0 nametype=NORMAL key="identity"',
        "audit",
        "",
        "audit",
        {"event.code": "PATH", "rule": None},
    ),
    "audit, a command's arguments": (
        f'EXECVE argc=2 a0="curl" a1="{CANARY}"',
        "audit",
        "",
        "audit",
        {"event.provider": "audit", "event.code": "EXECVE", "message": None},
    ),
    "audit, a line of another transport": (
        f'SYSCALL {AUDITED} success=yes exit=3 {CALLER} comm="x" exe="/x" subj=unconfined key="identity"',
        "audit",
        "one-entry.service",
        "syslog",
        {"event.provider": None, "rule": None, "user": None},
    ),
}


def entry(case: str) -> dict[str, Any]:
    """The journal's entry of a case as Filebeat's input gives it to the processors."""
    message, identifier, unit, transport, _ = CASES[case]
    uid, executable = WRITERS.get(case, (0, PROGRAMS.get(identifier, LOGGER)))
    return {
        "@timestamp": "2026-11-27T18:00:00.000Z",
        "message": message,
        "syslog": {"identifier": identifier},
        "systemd": {"transport": transport} | ({"unit": unit} if unit else {}),
        "journald": {
            "pid": 5,
            "uid": uid,
            "process": {"name": "x"} | ({"executable": executable} if executable else {}),
            "custom": {"cursor": "s=1"},
        },
        "process": {"pid": 5, "command_line": f"x --token {CANARY}"},
        # What a process says by the journal's own protocol: CONTAINER_NAME, MESSAGE_ID.
        "container": {"name": CANARY},
        "message_id": CANARY,
        "user": {"id": "0"},
        "host": {"hostname": "short"},
        "event": {"kind": "event"},
    }


@contextmanager
def shipping(
    filebeat: Path, folder: Path, output: dict[str, Any], *more: dict[str, Any]
) -> Iterator[subprocess.Popen[str]]:
    """Filebeat's own program, which reads the table from a file in FOLDER and ends with the test; MORE: further processors."""
    read = folder / "in.ndjson"
    read.write_text("".join(json.dumps(entry(case)) + "\n" for case in CASES))
    config = folder / "filebeat.yml"
    processors = yaml.safe_load((ROOT / "roles/filebeat/files/processors.yml").read_text())
    config.write_text(
        yaml.safe_dump(
            {
                "filebeat.inputs": [
                    {
                        "type": "filestream",
                        "id": "cases",
                        "paths": [str(read)],
                        "parsers": [{"ndjson": {"target": "", "overwrite_keys": True}}],
                    }
                ],
                "processors": [*processors, *more],
                "logging": {"to_files": False, "to_stderr": True, "level": "error", "metrics.enabled": False},
                **output,
            }
        )
    )
    config.chmod(0o600)
    with (folder / "stderr").open("w") as errors:
        running = subprocess.Popen(
            [filebeat, "-e", "-c", config, "--path.home", folder / "home" / next(iter(output))],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    timer = threading.Timer(SECONDS, running.kill)
    timer.start()
    try:
        yield running
    finally:
        timer.cancel()
        running.kill()
        running.wait()


def documents(filebeat: Path, folder: Path, *more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The document of each case as Filebeat ships it to Elasticsearch."""
    with shipping(filebeat, folder, {"output.console": {"codec.json": {"pretty": False}}}, *more) as running:
        assert running.stdout
        lines = [line for _, line in zip(CASES, running.stdout, strict=False)]
    said = (folder / "stderr").read_text()
    assert len(lines) == len(CASES), f"{len(lines)} documents within {SECONDS} s: {said}"
    return dict(zip(CASES, map(json.loads, lines), strict=True))
