"""The unit that takes documents in, beside a gateway whose collections have writers."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from encoder import described, make_encoder
from search_server import SearchServer
from service import Process, Service, patched

COLLECTIONS: dict[str, dict[str, object]] = {
    "handbook": {"tenant": "research", "readers": ["developer"], "writers": ["developer"]},
    "rules": {"tenant": "research", "readers": ["developer"], "writers": ["trainer"]},
    "salaries": {"tenant": "research", "readers": ["trainer"], "writers": ["trainer"]},
    "plans": {"tenant": "sales", "readers": ["developer"], "writers": ["developer"]},
}
LIMIT = 400_000


def searching(folder: Path, index: SearchServer) -> dict[str, Any]:
    """Options of `running` for a gateway that searches documents, and passes uploads on; makes its model for embeddings."""
    (folder / "encoder").mkdir()
    make_encoder(folder / "encoder")
    documents = {
        "url": f"http://127.0.0.1:{index.port}",
        "model": "tiny",
        "intake": str(folder / "intake.sock"),
        "upload_bytes": LIMIT,
    }
    return {
        "models": {"tiny": described(folder / "encoder")},
        "collections": COLLECTIONS,
        "documents": documents,
    }


def intake(
    service: Service, number: int = 0, constants: dict[str, float] | None = None, **changes: object
) -> Process:
    """The unit, as its unit file starts it. `constants`: others of its module; `changes`: of its configuration."""
    config = {
        "socket": str(service.folder / "intake.sock"),
        "gateway_user": getpass.getuser(),
        "documents": service.documents,
        "engine": str(service.folder / "tiny.sock"),
        "audit": {"socket": str(service.folder / "audit.sock")},
    }
    file = service.folder / f"documents-{number}.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    sitecustomize = service.folder / f"patched-{number}"
    sitecustomize.mkdir()
    prefixed = {f"llmserve__documents__intake__{name}": value for name, value in (constants or {}).items()}
    environment = patched(sitecustomize, **prefixed)
    arguments = ["documents", "intake", "--config", str(file)]
    return Process(service.folder, f"intake-{number}", arguments, environment).await_ready()


@contextmanager
def instead(service: Service, number: int, changes: dict[str, Any], **constants: float) -> Iterator[Process]:
    """Another unit on the socket of the one that runs, within the block."""
    path = service.folder / "intake.sock"
    aside = path.with_suffix(".aside")
    path.rename(aside)
    process = intake(service, number, constants, **changes)
    try:
        yield process
    finally:
        process.stop()
        path.unlink(missing_ok=True)
        aside.rename(path)


@contextmanager
def taking_in(service: Service, **constants: float) -> Iterator[Process]:
    """Make the index, and run the unit within the block."""
    prepared = service.cli("documents", "prepare", "--config", str(service.folder / "gateway.yaml"))
    assert prepared.returncode == 0, prepared.stderr
    process = intake(service, constants=constants)
    try:
        yield process
    finally:
        process.stop()
