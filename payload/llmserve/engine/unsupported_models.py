"""Models that an engine rejects without loading them, so that `llm-serve check engine` detects them before
deployment.
"""

from importlib.util import find_spec
from pathlib import Path

from llmcore import model_config
from llmcore.config import ConfigError
from llmcore.model_config import Quantization
from llmserve.engine import memory_fit
from llmserve.settings import EngineConfig, LocalModel


def refuse(config: EngineConfig) -> None:
    """Raise ConfigError for a model that the driver cannot run, in general or with the installed packages."""
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
    """Raise ConfigError if a quantization is configured but its packages are missing."""
    lacking = [name for name in ("bitsandbytes", "accelerate") if not find_spec(name)]
    if quantization != "none" and lacking:
        raise ConfigError(
            f"quantization '{quantization}' needs bitsandbytes and accelerate, but {' and '.join(lacking)} cannot be imported: "
            "install llmkeep-payload[quantization], or set 'none'"
        )


def refuse_latent_attention(path: Path) -> None:
    """Raise ConfigError for a model with MLA (DeepSeek), whose compressed cache does not fit the paged cache."""
    if family := latent_family(path):
        raise ConfigError(
            f"{path} is a '{family}' model, whose compressed cache (MLA) transformers' continuous "
            "batching does not serve: run it with vLLM on a GPU, or with driver 'naive' where it is small"
        )


def refuse_adapters_beside_latents(path: Path) -> None:
    """Raise ConfigError for a model with MLA, where an adapter beside the weights would be ignored."""
    if family := latent_family(path):
        raise ConfigError(
            f"most servers compute a '{family}' model with a product of its weights (MLA), and would ignore "
            "an adapter beside them: give it an engine of its own with 'merged', or merge it with "
            "`llm-serve merge`"
        )


def latent_family(path: Path) -> str | None:
    """The model type if the model uses MLA, else None."""
    config = model_config.read(path)
    latent = "kv_lora_rank" in config or config.get("model_type") in memory_fit.LATENT
    return str(config.get("model_type")) if latent else None
