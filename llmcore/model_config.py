"""A model's `config.json`."""

import json
from pathlib import Path
from typing import Any, Literal

from llmcore.config import ConfigError

Quantization = Literal["none", "int8", "nf4"]  # of a model's weights, by bitsandbytes


def read(directory: Path) -> dict[str, Any]:
    """config.json of the model in `directory`; raises ConfigError."""
    file = directory / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is not a model configuration ({error}): specify a model directory"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object: specify a model directory")
    return content
