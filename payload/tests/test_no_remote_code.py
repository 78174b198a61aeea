"""No code comes with a model: every call that loads one says so, since a default may change."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("llmcore", "payload/llmserve", "payload/llmtrain")
PROGRAMS = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_model_is_loaded_without_its_code(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        of = call.func.value
        if (
            call.func.attr in {"from_pretrained", "from_config"}
            and isinstance(of, ast.Name)
            and of.id.startswith("Auto")
        ):
            given = {each.arg: each.value for each in call.keywords}
            unpacked = None in given and path.name == "annotate.py"  # from a dict that has it
            value = given.get("trust_remote_code")
            assert unpacked or (isinstance(value, ast.Constant) and value.value is False), (
                f"line {call.lineno}"
            )


PICKLED = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_received_or_read_is_unpickled(path: Path) -> None:
    """Ranks exchange JSON (llmtrain/run/collectives.py), files are safetensors."""
    for each in ast.walk(ast.parse(path.read_text())):
        if isinstance(each, ast.Attribute):
            of = each.value.id if isinstance(each.value, ast.Name) else ""
            assert each.attr not in PICKLED, f"line {each.lineno}"
            assert (of, each.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}, (
                f"line {each.lineno}"
            )
