"""The table of model classes is that of the payload's transformers."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def test_the_table_is_that_of_the_locked_transformers() -> None:
    specification = importlib.util.spec_from_file_location("classes", ROOT / "tests/transformers_classes.py")
    assert specification is not None
    assert specification.loader is not None
    classes = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(classes)
    assert classes.TABLE.read_text() == classes.render(), "run .venv/bin/python tests/transformers_classes.py"
