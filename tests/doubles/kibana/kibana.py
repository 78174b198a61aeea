#!/usr/bin/python3
"""A stand-in for Kibana, which no registry has: `kibana --config FILE`; named kibana-keystore, the tool of its keystore.

It refuses settings that Kibana does not know, listens by the certificate and the protocols in its settings, and speaks two
APIs: status, and dashboards, which it keeps, validates and gives back with defaults of its own. It is available while the real
Elasticsearch knows its service account's token, by which it registers privileges. Each request is judged by Elasticsearch, too.
It shows nothing, and has no login form and no sessions.
"""

import datetime
import http.client
import json
import os
import re
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent.parent
KEYSTORE = Path(os.environ.get("KBN_PATH_CONF", ".")) / "kibana.keystore"
DASHBOARD = re.compile(r"/api/dashboards/([A-Za-z0-9_-]+)")
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
}
LOCK = threading.Lock()


def log(message: str) -> None:
    """A line as Kibana's layout `json` has it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = {"ecs": {"version": "9.0.0"}, "@timestamp": now, "message": message}
    print(json.dumps(line | {"log": {"level": "INFO", "logger": "stand-in"}}), flush=True)


def keystore(words: list[str]) -> int:
    """create, or: add SETTING --stdin --force."""
    if words == ["create"]:
        KEYSTORE.write_text("{}")
        KEYSTORE.chmod(0o600)
    elif words[0] == "add" and words[2:] == ["--stdin", "--force"]:
        kept = json.loads(KEYSTORE.read_text())
        KEYSTORE.write_text(json.dumps(kept | {words[1]: sys.stdin.read().strip()}))
    else:
        print(f"the stand-in knows no {words}", file=sys.stderr)
        return 1
    return 0


def fault(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "body") -> str:
    """What of the VALUE the SCHEMA refuses; empty if nothing. The words of JSON Schema that dashboards' has."""
    if "$ref" in schema:
        return fault(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    if "anyOf" in schema:
        found = [fault(value, each, root, where) for each in schema["anyOf"]]
        return "" if "" in found else " or ".join(found)
    if "const" in schema and value != schema["const"]:
        return f"{where} is {value!r}, not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, not one of {schema['enum']}"
    if "type" in schema and (
        not isinstance(value, TYPES[schema["type"]])
        or isinstance(value, bool) != (schema["type"] == "boolean")
    ):
        return f"{where} is no {schema['type']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", []):
            if name not in value:
                return f"{where} has no {name}"
        for name, each in value.items():
            if name not in known:
                return f"{where} has {name}, which is not known"
            if said := fault(each, known[name], root, f"{where}.{name}"):
                return said
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} entries"
        for number, each in enumerate(value):
            if said := fault(each, schema["items"], root, f"{where}[{number}]"):
                return said
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get(
        "maximum", value
    ):
        return f"{where} is {value}, out of range"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return f"{where} is empty"
    return ""


class Elasticsearch:
    """The real one, by the settings of Kibana."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.url = urlsplit(settings["elasticsearch.hosts"][0])
        self.context = ssl.create_default_context(
            cafile=settings["elasticsearch.ssl.certificateAuthorities"][0]
        )
        self.context.load_cert_chain(
            settings["elasticsearch.ssl.certificate"], settings["elasticsearch.ssl.key"]
        )
        self.own = f"Bearer {settings['elasticsearch.serviceAccountToken']}"

    def ask(self, method: str, path: str, authorization: str, body: Any = None) -> tuple[int, Any]:
        link = http.client.HTTPSConnection(
            self.url.hostname or "", self.url.port, timeout=10, context=self.context
        )
        try:
            given = {"Authorization": authorization, "Content-Type": "application/json"}
            link.request(method, path, None if body is None else json.dumps(body), given)
            answer = link.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            link.close()

    def knows_kibana(self) -> bool:
        """Is the token one of the service account, and are Kibana's privileges registered? They are, where they are not."""
        try:
            status, who = self.ask("GET", "/_security/_authenticate", self.own)
            if status != 200 or who["username"] != "elastic/kibana":
                return False
            # As Kibana's own: who may change may read, since privileges are judged by their actions.
            read = ["login:", "saved_object:dashboard/get"]
            names = {"space_all": [*read, "saved_object:dashboard/update"], "space_read": read}
            wanted = {
                name: {"application": "kibana-.kibana", "name": name, "actions": actions, "metadata": {}}
                for name, actions in names.items()
            }
            status, found = self.ask("GET", "/_security/privilege/kibana-.kibana", self.own)
            if status == 200 and found.get("kibana-.kibana", {}).keys() >= wanted.keys():
                return True
            return self.ask("PUT", "/_security/privilege", self.own, {"kibana-.kibana": wanted})[0] == 200
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def may(self, authorization: str, privilege: str) -> int:
        """200, or the status by which the request is refused."""
        asked = {"application": "kibana-.kibana", "privileges": [privilege], "resources": ["space:default"]}
        status, answer = self.ask(
            "POST", "/_security/user/_has_privileges", authorization, {"application": [asked]}
        )
        return status if status != 200 else 200 if answer["has_all_requested"] else 403


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    settings: dict[str, Any]
    elasticsearch: Elasticsearch
    schema: dict[str, Any]

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        headers = "server.securityResponseHeaders."
        self.send_header("Strict-Transport-Security", self.settings[f"{headers}strictTransportSecurity"])
        self.send_header("Referrer-Policy", self.settings[f"{headers}referrerPolicy"])
        if self.settings[f"{headers}disableEmbedding"]:
            self.send_header("X-Frame-Options", "SAMEORIGIN")
        self.end_headers()
        self.wfile.write(content)

    def permitted(self, privilege: str) -> bool:
        authorization = self.headers.get("Authorization", "")
        status = self.elasticsearch.may(authorization, privilege) if authorization else 401
        if status != 200:
            self.answer(status, {"statusCode": status, "error": http.client.responses[status]})
        return status == 200

    def kept(self) -> dict[str, Any]:
        path = Path(self.settings["path.data"]) / "dashboards.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def do_GET(self) -> None:
        if self.path == "/api/status":
            level = "available" if self.elasticsearch.knows_kibana() else "critical"
            self.answer(200 if level == "available" else 503, {"status": {"overall": {"level": level}}})
        elif self.permitted("space_read"):
            found = DASHBOARD.fullmatch(self.path)
            kept = self.kept()
            if found and found[1] in kept:
                self.answer(200, {"id": found[1], "data": kept[found[1]], "meta": {"managed": False}})
            else:
                self.answer(404, {"statusCode": 404, "error": "Not Found"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = DASHBOARD.fullmatch(self.path)
        if not self.permitted("space_all"):
            return
        if not found or "kbn-xsrf" not in self.headers:
            self.answer(400, {"message": "no such path, or the request has no header kbn-xsrf"})
            return
        dashboard = json.loads(body)
        if said := fault(dashboard, self.schema, self.schema):
            self.answer(400, {"statusCode": 400, "error": "Bad Request", "message": said})
            return
        for number, panel in enumerate(dashboard["panels"]):
            panel.setdefault("id", f"panel-{number}")
        with LOCK:
            path = Path(self.settings["path.data"]) / "dashboards.json"
            path.write_text(
                json.dumps(self.kept() | {found[1]: {"options": {"use_margins": True}} | dashboard})
            )
        self.answer(200, {"id": found[1], "data": dashboard, "meta": {"managed": False}})

    def log_message(self, *_: object) -> None:
        log(f"{self.command} {self.path}")


def serve(config: Path) -> int:
    settings = json.loads(re.sub(r"^#.*$", "", config.read_text(), flags=re.MULTILINE))
    settings |= json.loads(KEYSTORE.read_text())
    known = re.findall(r"^ +- (\S+)$", (HERE / "settings-9.5.yml").read_text(), re.MULTILINE)
    if unknown := settings.keys() - set(known):
        print(f"FATAL Error: Unknown configuration key(s): {sorted(unknown)}", file=sys.stderr)
        return 64
    Handler.settings = settings
    Handler.elasticsearch = Elasticsearch(settings)
    Handler.schema = json.loads((HERE / "dashboards-9.5.schema.json").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    spoken = settings["server.ssl.supportedProtocols"]
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if "TLSv1.2" in spoken else ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(settings["server.ssl.certificate"], settings["server.ssl.key"])
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer((settings["server.host"], settings["server.port"]), Handler)
    # A handshake may take as long as its client likes: not in the thread that accepts.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    log("http server running")
    server.serve_forever()
    return 0


def main() -> int:
    if Path(sys.argv[0]).name == "kibana-keystore":
        return keystore(sys.argv[1:])
    return serve(Path(sys.argv[sys.argv.index("--config") + 1]))


if __name__ == "__main__":
    sys.exit(main())
