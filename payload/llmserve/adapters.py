"""LoRA adapters: small matrices beside a model's weights, switched for each request, or added to the weights.

That one works is never taken on trust. Servers are known to load adapters that then change nothing: their layers have
other names in this model, or go unread because it computes with other weights (MLA). So each adapter's weights must all find
their place, and must change the logits of a fixed prompt; and without it the model must say what it said before.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmcore.config import ConfigError
from llmcore.manifest import write_manifest
from llmserve.language_model import LanguageModel
from llmserve.settings import Adapter, LocalModel

try:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
except ImportError as error:
    raise ConfigError(
        f"adapters need peft and accelerate, and one of them is not installed here ({error.name}): "
        "install llmkeep-payload[adapters], or take the adapters out"
    ) from None

PROMPT_TOKENS = 64  # so many that a model's experts are all asked
WEIGHTS = "adapter_model.safetensors"


def logits(model: Any) -> torch.Tensor:
    """For a fixed prompt from all over the vocabulary, shape (1, PROMPT_TOKENS, vocabulary)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.linspace(0, vocabulary - 1, PROMPT_TOKENS, device=model.device).long().unsqueeze(0)
    with torch.inference_mode():
        said: torch.Tensor = model(prompt).logits
    return said


def place(model: Any, name: str, adapter: Adapter) -> Any:
    """Put an adapter beside the weights of `model`, be it a model or peft's around one; returns peft's.

    Raises ConfigError for what is no LoRA adapter, or none for this model.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter.path))
        with safe_open(adapter.path / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{adapter.path} is no adapter ({type(error).__name__}): it takes adapter_config.json and {WEIGHTS}, "
            "as peft's save_pretrained writes them"
        ) from None
    if config.peft_type != "LORA":
        raise ConfigError(f"{adapter.path} is an adapter of type '{config.peft_type}': only LORA is served")
    try:
        with warnings.catch_warnings(action="ignore"):  # what they are about is refused below
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter.path), name)
            else:
                model = PeftModel.from_pretrained(model, str(adapter.path), name, config=config)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the adapter {adapter.path} does not fit this model ({first_line(error)}): "
            f"it was trained for '{config.base_model_name_or_path}'; take an adapter for this one"
        ) from None
    placed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if odd := sorted(saved ^ placed):
        raise ConfigError(
            f"of the weights of the adapter {adapter.path}, {len(saved - placed)} have no place in this model and "
            f"{len(placed - saved)} are missing, such as {odd[0]}: it was trained for '{config.base_model_name_or_path}'"
        )
    return model


def first_line(error: Exception) -> str:
    """The first mistake: of what torch lists below a heading, or all that peft says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:300]


def refuse_without_effect(adapter: Adapter, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise ConfigError if the logits of the fixed prompt are the same with and without the adapter, or no numbers."""
    if torch.equal(before, after):
        raise ConfigError(
            f"the adapter {adapter.path} does nothing here: the logits of a prompt are the same with and without it. "
            "Its matrices are zero, or too small for the model's dtype: train it, or take it out"
        )
    if not torch.isfinite(after).all():
        raise ConfigError(
            f"with the adapter {adapter.path} the model's logits are no numbers: train it again"
        )


class Switchable:
    """A model with adapters beside its weights, one of them or none in effect. Not for several threads at once."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        """Place them in `model`, whose `generate` then follows `chosen`; raises ConfigError."""
        before = logits(model)
        self.model: Any = model
        self.labels = {name: f"adapter{number}" for number, name in enumerate(adapters)}  # peft bears no dot
        for name, adapter in adapters.items():
            self.model = place(self.model, self.labels[name], adapter)
        self.model.eval()
        for name, adapter in adapters.items():
            with self.chosen(name):
                refuse_without_effect(adapter, before, logits(model))
        with self.chosen(""):
            if not torch.equal(before, logits(model)):
                raise ConfigError(
                    f"{', '.join(adapters)}: one of them changes the model also where it is not asked for, by its biases "
                    "or by a start from the model's own weights: serve it with 'merged'"
                )

    @contextmanager
    def chosen(self, name: str) -> Iterator[None]:
        """With this adapter in effect; "" is the model alone."""
        if name:
            self.model.set_adapter(self.labels[name], inference_mode=True)
            yield
        else:
            with self.model.disable_adapter():
                yield


def merged(model: Any, adapter: Adapter) -> Any:
    """`model` with the adapter added to its weights; raises ConfigError."""
    before = logits(model)
    whole = place(model, "merged", adapter).merge_and_unload().eval()
    refuse_without_effect(adapter, before, logits(whole))
    return whole


def save_merged(settings: LocalModel, revision: str, folder: Path) -> Path:
    """Write the model with its adapter merged into `folder`, which is made; returns its manifest, beside it."""
    manifest = folder.parent / f"{folder.name}.sha256"
    for path in folder, manifest:
        if path.exists():
            raise ConfigError(f"{path} is there already: name a directory that is not")
    language = LanguageModel(settings, revision)
    language.model.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)
    write_manifest(folder, manifest)
    return manifest
