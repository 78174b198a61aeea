"""Label Studio's own SDK and server, in the environment of `make peers PEER=label-studio`; reads JSON from stdin.

validate: what the SDK says of each task of a configuration, and of each annotation: null, or its complaint.
serve: a round trip of several projects through the real server on loopback; prints the JSON export of each.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from label_studio_sdk import LabelStudio
from label_studio_sdk.label_interface import LabelInterface

STUDIO = Path(sys.executable).with_name("label-studio")


def complaint(check: Callable[..., bool], *given: Any) -> str | None:
    """What a check of the SDK says, or None."""
    try:
        return None if check(*given) else "not valid"
    except Exception as error:  # of many kinds
        return f"{type(error).__name__}: {error}"


def validate(given: dict[str, Any]) -> list[str | None]:
    """What the SDK says of each."""
    interface = LabelInterface(given["configuration"])
    interface.validate()
    said = []
    for task in given["tasks"]:
        said.append(complaint(interface.validate_task, {"data": task["data"]}))
        for annotation in task["annotations"]:
            said.append(complaint(interface.validate_annotation, {"result": annotation["result"]}))
    return said


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Wait until the server answers."""
    ends = time.monotonic() + 300
    while time.monotonic() < ends and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()  # noqa: S310 - loopback
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise SystemExit("Label Studio did not start")


def round_trip(client: LabelStudio, given: dict[str, Any], others: dict[int, int]) -> Any:
    """Import the tasks of a JSON export into a new project, annotate them as it says, and export that.

    Annotator 1 of the export is the server's own user; `others` are users of the server.
    """
    project = client.projects.create(title="round trip", label_config=given["configuration"])
    client.projects.import_tasks(id=project.id, request=[{"data": task["data"]} for task in given["tasks"]])
    theirs = {
        task.data["llmkeep_id"]: task.id for task in client.tasks.list(project=project.id, fields="all")
    }
    for task in given["tasks"]:
        for each in task["annotations"]:
            who = each["completed_by"]
            if who not in others:
                others[who] = client.users.create(username=f"user{who}", email=f"user{who}@example.org").id
            client.annotations.create(
                id=theirs[task["data"]["llmkeep_id"]],
                result=each["result"],
                completed_by=others[who],
                was_cancelled=each["was_cancelled"],
            )
    return json.loads(b"".join(client.projects.exports.download_sync(project.id, export_type="JSON")))


def serve(projects: list[dict[str, Any]]) -> Any:
    """Round trips through a server of its own, which is ended by its process id."""
    with tempfile.TemporaryDirectory() as folder:
        token, port = secrets.token_hex(20), free_port()
        url = f"http://127.0.0.1:{port}"
        quiet = dict.fromkeys(("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK"), "false")
        quiet |= dict.fromkeys(("SENTRY_DSN", "FRONTEND_SENTRY_DSN"), "")
        settings = {
            "HOME": folder, "LABEL_STUDIO_BASE_DATA_DIR": folder, "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_USERNAME": "ada@example.org", "LABEL_STUDIO_PASSWORD": secrets.token_hex(16),
            "LABEL_STUDIO_USER_TOKEN": token,
        }  # fmt: skip
        command = [str(STUDIO), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen(
                command, env={**os.environ, **quiet, **settings}, stdout=log, stderr=log, cwd=folder
            )
            try:
                wait_for(url, server)
                client = LabelStudio(base_url=url, api_key=token)
                users = {1: client.users.whoami().id}
                return [round_trip(client, each, users) for each in projects]
            finally:
                server.terminate()
                server.wait(60)


commands: dict[str, Callable[[Any], Any]] = {"validate": validate, "serve": serve}
print(json.dumps(commands[sys.argv[1]](json.load(sys.stdin))))
