"""The configuration files of gateway and engine."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmcore.config import Section
from llmcore.model_config import Quantization
from llmserve.protocol import OPTIONAL

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]  # it stands in a header

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def listed(value: object) -> object:
    """One stands for a list of one."""
    return [value] if isinstance(value, str | Path) else value


type Several[T] = Annotated[tuple[T, ...], BeforeValidator(listed)]

Algorithm = Literal[  # asymmetric ones only: whoever can check a token must not be able to make one
    "ES256", "ES384", "ES512", "EdDSA", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"
]


class Listener(Section):
    """Where to listen: a UNIX socket, or host and port."""

    socket: Path | None = None
    socket_mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")] = "0660"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] | None = None

    @model_validator(mode="after")
    def one_of_both(self) -> "Listener":
        """A listener is a socket or a port."""
        if (self.socket is None) == (self.port is None):
            raise ValueError("set either 'socket' or 'port' (and 'host')")
        return self


class ClientTls(Section):
    """Who we are to a server, PEM files: its authority, our certificate and its key. Read again when they change."""

    ca: Path
    certificate: Path
    key: Path


class Remote(Section):
    """Servers of OpenAI's API, all with the same model under its name here, on sockets or at URLs.

    `fields`: what they honour of the API's optional fields. `revision` and `context` (in tokens) where they do not say it
    themselves; `dimensions` of the vectors of a model for embeddings; `slots`: requests that each takes at once;
    `key_credential`: the systemd credential with their key. `cache`: keep their greedy answers, which are then told anew
    as text; what else they say (reasoning) is lost, so it is off unless set.
    """

    socket: Several[Path] = ()
    url: Several[Annotated[str, Field(pattern=r"^https?://[^/?#@]+$")]] = ()
    tls: ClientTls | None = None
    key_credential: str | None = None
    fields: tuple[str, ...] = ()
    revision: Annotated[str, Field(min_length=1)] | None = None
    context: Positive | None = None
    dimensions: Positive | None = None
    cache: bool = False
    slots: Positive = 64

    @model_validator(mode="after")
    def nothing_in_clear(self) -> "Remote":
        """Prompts leave this host by mutual TLS only."""
        if not self.socket and not self.url:
            raise ValueError("set 'socket' or 'url'")
        for url in self.url:
            parts = urlsplit(url)
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise ValueError(f"{url} would carry prompts in clear: use https, a socket, or 127.0.0.1")
            if parts.scheme == "https" and self.tls is None:
                raise ValueError(f"{url} needs 'tls': ca, certificate and key")
        return self

    @field_validator("fields")
    @classmethod
    def fields_of_the_api(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Only what a request can carry."""
        if unknown := sorted(set(names) - OPTIONAL):
            raise ValueError(f"{', '.join(unknown)}: an engine can declare {', '.join(sorted(OPTIONAL))}")
        return names


class Engine(Section):
    """A model's instances: engines of ours on sockets, or servers of OpenAI's API."""

    socket: Several[Path] = ()
    remote: Remote | None = None

    @model_validator(mode="after")
    def one_kind(self) -> "Engine":
        """Instances of a model answer alike, so they are of one kind."""
        if bool(self.socket) == (self.remote is not None):
            raise ValueError("set either 'socket' (one or a list) or 'remote'")
        return self


class Redis(Section):
    """The cache. The password is the systemd credential of this name; without one, none is sent."""

    url: str
    user: str | None = None
    password_credential: str | None = None
    deadline_ms: Positive = 5
    ttl_seconds: Positive = 3600


class PolicySource(Section):
    """Who decides, and by which policy. `server` asks OPA at `socket`; `embedded` judges the bundle in process.

    `key` is the policy's public key, PEM; `seen` remembers the highest revision; `break_glass` is a signed file. Each `probe_ms`
    the engine is asked whether it decides, and by which revision.
    """

    engine: Literal["server", "embedded"]
    key: Path
    socket: Path | None = None
    bundle: Path | None = None
    deadline_ms: Positive = 50
    probe_ms: Positive = 1000
    seen: Path | None = None
    break_glass: Path | None = None

    @model_validator(mode="after")
    def engine_has_its_source(self) -> "PolicySource":
        """A server has a socket, the embedded engine a bundle."""
        needed = "socket" if self.engine == "server" else "bundle"
        if getattr(self, needed) is None:
            raise ValueError(f"engine '{self.engine}' needs '{needed}'")
        return self


class AuditWriter(Section):
    """The host's one writer of the audit record."""

    socket: Path


class Limits(Section):
    """What one request, and all of them together, may take."""

    body_bytes: Positive = 1024 * 1024
    max_tokens: Positive = 1024
    default_max_tokens: Positive = 256
    waiting: Annotated[int, Field(ge=0)] = 64
    waiting_tokens: Positive = 262144
    queue_seconds: Seconds = 30.0
    answer_seconds: Seconds = 300.0  # from the request to the last token
    drain_seconds: Share = 25.0

    @model_validator(mode="after")
    def default_within_maximum(self) -> "Limits":
        """The default is a request like another."""
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"default_max_tokens ({self.default_max_tokens}) is above max_tokens ({self.max_tokens})"
            )
        return self


class Oidc(Section):
    """The identity provider whose tokens count, with its public keys in a file. A claim's name may have dots."""

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    jwks_file: Path
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("ES256", "RS256")
    leeway_seconds: Annotated[int, Field(ge=0, le=300)] = 30
    max_age_seconds: Positive = 24 * 3600
    subject_claim: str = "sub"
    tenant_claim: str
    roles_claim: str


class Identities(Section):
    """What says who asks, besides an API key.

    `certificate_header`: where the edge hands over the client's certificate (PEM, URL-encoded) that it has verified.
    """

    certificate_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = None
    oidc: Oidc | None = None


class GatewayConfig(Section):
    """`llm-serve gateway --config`. The first engine answers where a request names no model."""

    listen: Listener
    metrics: Listener
    engines: Annotated[dict[ModelName, Engine], Field(min_length=1)]
    keys_file: Path
    policy: PolicySource | None = None
    audit: AuditWriter | None = None
    identity: Identities = Identities()
    redis: Redis | None = None
    limits: Limits = Limits()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def certificates_come_from_the_edge(self) -> "GatewayConfig":
        """Whoever reaches a port could write the header; a socket's file says who may."""
        if self.identity.certificate_header and self.listen.socket is None:
            raise ValueError(
                "'identity.certificate_header' is believed on a socket only: set 'listen.socket'"
            )
        return self


class EchoModel(Section):
    """The engine for tests: answers with the words of the question."""

    driver: Literal["echo"]
    context: Positive = 4096
    slots: Positive = 256
    tokens: Annotated[int, Field(ge=0)] = 0  # in all slots together; 0: no bound
    token_seconds: Share = 0.0


class Adapter(Section):
    """A LoRA adapter as peft saves it: a directory of safetensors, with its manifest."""

    path: Path
    manifest: Path


class LocalModel(Section):
    """A model that runs in the engine's own process.

    `temperature` and `top_p` hold where a request names none; without them the model's generation_config.json
    does, and OpenAI's 1.0 after that. `merged`: an adapter that is added to the weights. `adapters`: those beside the
    weights, by the name under which clients ask for each.
    """

    path: Path
    manifest: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Quantization = "none"  # by bitsandbytes; `dtype` is then what it computes in
    merged: Adapter | None = None
    adapters: dict[ModelName, Adapter] = Field(default_factory=dict)
    context: Positive = 2048
    threads: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def merged_before_quantized(self) -> "LocalModel":
        """Weights in 4 or 8 bits have no room for what an adapter changes."""
        if self.merged and self.quantization != "none":
            raise ValueError(
                f"'merged' and quantization '{self.quantization}' do not go together: "
                "serve what `llm-serve merge` writes, quantized"
            )
        return self


class EmbedModel(Section):
    """An encoder that makes embeddings. `context`: longest text in tokens; the model's own limit counts too."""

    driver: Literal["embed"]
    path: Path
    manifest: Path
    dtype: Literal["bfloat16", "float32"] = "float32"
    context: Positive = 512
    threads: Positive | None = None


class NaiveModel(LocalModel):
    """transformers' `generate`, one request at a time."""

    driver: Literal["naive"]


class ContinuousModel(LocalModel):
    """transformers' continuous batching: up to `slots` requests at once, `batch_tokens` in one step.

    The cache holds `cache_tokens` in pages of `page_tokens`; greedy and drawn answers have one each. `share_prefixes`
    shows in the time of an answer whether somebody else's prompt began alike: only where all who ask may know that.
    """

    driver: Literal["continuous"]
    slots: Positive = 16
    cache_tokens: Positive = 8192
    page_tokens: Annotated[int, Field(ge=4)] = 32
    batch_tokens: Positive = 512
    share_prefixes: bool = False

    @model_validator(mode="after")
    def room_for_one(self) -> "ContinuousModel":
        """A request that can never get into the cache would end the engine."""
        if self.cache_tokens < self.context:
            raise ValueError(
                f"cache_tokens ({self.cache_tokens}) is below context ({self.context}): raise it, or lower context"
            )
        if self.batch_tokens < self.slots:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) is below slots ({self.slots}): each needs a token in every step"
            )
        if self.adapters:
            raise ValueError(
                f"a batch has the same weights for all, so {', '.join(self.adapters)} would not be applied: "
                "give each an engine of its own with 'merged', or use driver 'naive'"
            )
        return self


class EngineConfig(Section):
    """`llm-serve engine --config`. `name`: the model's, where the process is called otherwise, as one of several is."""

    name: ModelName | None = None
    socket: Path
    socket_mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")] = "0660"
    model: Annotated[EchoModel | NaiveModel | ContinuousModel | EmbedModel, Field(discriminator="driver")]
    stall_seconds: Seconds = (
        60.0  # without a step while work is pending: the longest prompt must be read in it
    )
    drain_seconds: Share = 25.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
