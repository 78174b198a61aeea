"""What an engine refuses to run, told without loading anything: `llm-serve check engine` says it before a file is in place."""

from importlib.util import find_spec
from pathlib import Path

from llmcore import model_config
from llmcore.config import ConfigError
from llmcore.model_config import Quantization
from llmserve.engine import memory_fit
from llmserve.settings import EngineConfig, LocalModel


def refuse(config: EngineConfig) -> None:
    """Raise ConfigError for a model that this driver cannot run, or not as this one is installed here."""
    model = config.model
    if not isinstance(model, LocalModel):
        return
    refuse_without_bitsandbytes(model.quantization)
    if not (model.path / "config.json").is_file():
        return
    if model.driver == "continuous":
        refuse_latent_attention(model.path)
    if model.adapters:
        refuse_adapters_beside_latents(model.path)


def refuse_without_bitsandbytes(quantization: Quantization) -> None:
    """Raise ConfigError where a quantization is asked for and what makes it is not there."""
    lacking = [name for name in ("bitsandbytes", "accelerate") if not find_spec(name)]
    if quantization != "none" and lacking:
        raise ConfigError(
            f"quantization '{quantization}' needs bitsandbytes and accelerate, and here is no {' and no '.join(lacking)}: "
            "install llmkeep-payload[quantization], or set 'none'"
        )


def refuse_latent_attention(path: Path) -> None:
    """Raise ConfigError for a model whose cache holds latents (DeepSeek's MLA): the paged cache has no place for them."""
    if family := latent_family(path):
        raise ConfigError(
            f"{path} is a '{family}' model, whose compressed cache (MLA) transformers' continuous "
            "batching does not serve: run it with vLLM on a GPU, or with driver 'naive' where it is small"
        )


def refuse_adapters_beside_latents(path: Path) -> None:
    """Raise ConfigError for a model with MLA: an adapter beside its weights would be left out."""
    if family := latent_family(path):
        raise ConfigError(
            f"a '{family}' model computes with a product of its weights in most servers (MLA), and "
            "an adapter beside them is then left out: give it an engine of its own with 'merged', or merge it by "
            "`llm-serve merge`"
        )


def latent_family(path: Path) -> str | None:
    """The model's type if its cache holds latents."""
    config = model_config.read(path)
    latent = "kv_lora_rank" in config or config.get("model_type") in memory_fit.LATENT
    return str(config.get("model_type")) if latent else None
