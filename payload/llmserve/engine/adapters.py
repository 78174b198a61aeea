"""LoRA adapters in an engine: switched per request, or merged into the weights.

Each must take effect (llmcore.adapters), and without it the model must answer exactly as before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmcore.adapters import logits, place, refuse_without_effect
from llmcore.config import ConfigError
from llmcore.manifest import write_manifest
from llmserve.engine.language_model import LanguageModel
from llmserve.settings import Adapter, LocalModel


class Switchable:
    """A model with adapters beside its weights, at most one of which is active. Not thread-safe."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        """Attach the adapters to `model`, whose `generate` then uses the `chosen` one; raises ConfigError."""
        before = logits(model)
        self.model: Any = model
        self.labels = {
            name: f"adapter{number}" for number, name in enumerate(adapters)
        }  # peft allows no dots in names
        for name, adapter in adapters.items():
            self.model = place(self.model, self.labels[name], adapter.path)
        self.model.eval()
        for name, adapter in adapters.items():
            with self.chosen(name):
                refuse_without_effect(adapter.path, before, logits(model))
        with self.chosen(""):
            if not torch.equal(before, logits(model)):
                raise ConfigError(
                    f"{', '.join(adapters)}: one of them changes the model even while it is inactive, by its biases "
                    "or an initialization from the model's own weights: serve it with 'merged'"
                )

    @contextmanager
    def chosen(self, name: str) -> Iterator[None]:
        """Activate this adapter within the block; "" is the base model."""
        if name:
            self.model.set_adapter(self.labels[name], inference_mode=True)
            yield
        else:
            with self.model.disable_adapter():
                yield


def save_merged(settings: LocalModel, revision: str, folder: Path) -> Path:
    """Write the model with its adapter merged into `folder`, which must not exist; returns the path of its manifest
    beside it.
    """
    manifest = folder.parent / f"{folder.name}.sha256"
    for path in folder, manifest:
        if path.exists():
            raise ConfigError(f"{path} already exists: specify a new directory")
    language = LanguageModel(settings, revision)
    language.model.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)
    write_manifest(folder, manifest)
    return manifest
