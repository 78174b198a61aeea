"""The configuration files of gateway and engine."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmcore.config import Section
from llmcore.model_config import Quantization
from llmserve.fields import DROPPED, PASSED

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(gt=0, le=1)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]  # sent in a response header

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MOST_CONTEXT = 2**24  # tokens; more than any model has, and a server that reports more is misconfigured
# The largest body follows the models' contexts, by what a token takes at most as a rule: one of Chinese is 1.5 characters, which
# JSON in ASCII escapes as six bytes each. The upper bound is what the event loop validates within 50 ms
# (bench/serving/slow_body.py): that much for 131,072 tokens, or half for 262,144.
BODY_BYTES_A_TOKEN = 12
LEAST_BODY_BYTES, MOST_BODY_BYTES = 1024 * 1024, 12 * 131072
MOST_UPLOAD_BYTES = 64 * 1024 * 1024


def listed(value: object) -> object:
    """A single value stands for a list of one."""
    return [value] if isinstance(value, str | Path) else value


type Several[T] = Annotated[tuple[T, ...], BeforeValidator(listed)]

Algorithm = Literal[  # asymmetric ones only: verifying a token must not require a key that can sign one
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
        if (self.socket is None) == (self.port is None):
            raise ValueError("set either 'socket' or 'port' (and 'host')")
        return self


class ClientTls(Section):
    """The gateway's client certificate for a server, the server's CA and its revocation lists: PEM files, reread when
    they change.

    `crl`: lists of all CAs of the server's chain. With a list missing or expired, no server is connected to.
    """

    ca: Path
    certificate: Path
    key: Path
    crl: Path | None = None


class Remote(Section):
    """Servers of OpenAI's API that serve the same model under the same name as here, on UNIX sockets or at URLs.

    `fields`: the API's optional fields that they support; None: those that their own /openapi.json describes, as
    vLLM's does. `template_arguments`: names that clients may set in chat_template_kwargs. `revision` and `context`
    (in tokens): required where the servers do not report them. `dimensions`: length of the vectors of an embedding
    model. `slots`: concurrent requests per server. `key_credential`: the systemd credential that holds their API
    key. `cache`: cache their greedy answers. A cached answer is replayed as text, so everything else in it
    (reasoning) is lost; hence off by default.
    """

    socket: Several[Path] = ()
    url: Several[Annotated[str, Field(pattern=r"^https?://[^/?#@]+$")]] = ()
    tls: ClientTls | None = None
    key_credential: str | None = None
    fields: tuple[str, ...] | None = None
    template_arguments: tuple[str, ...] = ()
    revision: Annotated[str, Field(min_length=1)] | None = None
    context: Annotated[int, Field(gt=0, le=MOST_CONTEXT)] | None = None
    dimensions: Positive | None = None
    cache: bool = False
    slots: Positive = 64

    @model_validator(mode="after")
    def nothing_in_clear(self) -> "Remote":
        """Prompts leave this host over mutual TLS only."""
        for url in self.url:
            parts = urlsplit(url)
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise ValueError(f"{url} would send prompts in clear text: use https, a socket, or 127.0.0.1")
            if parts.scheme == "https" and self.tls is None:
                raise ValueError(f"{url} needs 'tls': ca, certificate and key")
        return self

    @field_validator("fields")
    @classmethod
    def fields_of_the_api(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """A request can carry no other fields."""
        if unknown := sorted({*(names or ())} - PASSED.keys() - DROPPED.keys()):
            raise ValueError(f"{', '.join(unknown)}: an engine can declare {', '.join(sorted(PASSED))}")
        return names


HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")]  # in Redis' keys


class OfferedEngine(Section):
    """An engine of another host, offered by that host's role `engine_access`. `host`: the full name in its certificate. `name`,
    `socket`: of the engine on that host. `gpus`: whether that host runs `llm-gpu watch`, whose quarantine applies here, too.
    """

    host: HostName
    port: Annotated[int, Field(gt=0, le=65535)]
    name: ModelName
    socket: Path
    gpus: bool = False


class Engine(Section):
    """A model's instances: llmkeep engines on UNIX sockets, or servers of OpenAI's API, and those that other hosts offer, of
    the same kind. `tls`: for the other hosts.
    """

    socket: Several[Path] = ()
    remote: Remote | None = None
    offered: tuple[OfferedEngine, ...] = ()
    tls: ClientTls | None = None

    @model_validator(mode="after")
    def instances_of_one_kind(self) -> "Engine":
        """All instances of a model must answer alike, so they are of one kind."""
        if self.socket and self.remote:
            raise ValueError("set either 'socket' (one or a list) or 'remote'")
        if not (self.socket or self.offered or (self.remote and (self.remote.socket or self.remote.url))):
            raise ValueError(
                "there is no instance: set 'socket', 'offered', or 'remote' with 'socket' or 'url'"
            )
        if bool(self.offered) != (self.tls is not None):
            raise ValueError("'tls' (ca, certificate and key) belongs to 'offered', and only to it")
        return self


class Redis(Section):
    """The answer cache and shared quotas. `password_credential` names a systemd credential; without it no password is
    sent. `tls`: for the Redis of another host, whose URL begins with `rediss://`. `host`: whose keys this gateway writes;
    `others`: the other hosts that share this Redis, whose counters it reads.
    """

    url: Annotated[str, Field(pattern=r"^(unix:///|rediss?://[^/?#@]+$)")]
    tls: ClientTls | None = None
    user: str | None = None
    password_credential: str | None = None
    host: HostName = "local"
    others: tuple[HostName, ...] = ()
    deadline_ms: Positive = 5
    ttl_seconds: Positive = 3600

    @model_validator(mode="after")
    def nothing_in_clear(self) -> "Redis":
        """Prompts leave this host over mutual TLS only."""
        parts = urlsplit(self.url)
        if parts.scheme == "redis" and parts.hostname not in LOOPBACK:
            raise ValueError(
                f"{self.url} would send prompts in clear text: use rediss://, a socket, or 127.0.0.1"
            )
        if (parts.scheme == "rediss") != (self.tls is not None):
            raise ValueError(
                f"{self.url}: 'tls' (ca, certificate and key) belongs to rediss://, and only to it"
            )
        return self


class PolicySource(Section):
    """The policy engine and its policy. `server` queries OPA at `socket`; `embedded` evaluates the bundle in process.

    `key`: the policy's public key, PEM. `seen`: file that remembers the highest revision seen. `break_glass`: a
    signed file. Every `probe_ms` the gateway checks that the engine decides, and by which revision.
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
        needed = "socket" if self.engine == "server" else "bundle"
        if getattr(self, needed) is None:
            raise ValueError(f"engine '{self.engine}' needs '{needed}'")
        return self


class AuditWriter(Section):
    """The host's audit writer."""

    socket: Path


class Limits(Section):
    """Limits per request, and of all requests together. `body_bytes`, `waiting_tokens`: None follows the models' contexts."""

    body_bytes: Annotated[int, Field(gt=0, le=MOST_BODY_BYTES)] | None = None
    waiting: Annotated[int, Field(ge=0)] = 64
    waiting_tokens: Positive | None = None
    # Of each engine's slots and tokens, at most: what else is left serves other subjects, and other tenants, at once.
    subject_share: Part = 0.75
    tenant_share: Part = 0.9
    queue_seconds: Seconds = 30.0
    answer_seconds: Seconds = 300.0  # from the request to the last token
    drain_seconds: Share = 25.0

    def largest_body(self, contexts: Collection[int]) -> int:
        """Bytes of the largest body: as configured, or by the models' contexts in tokens. The maximum while one is unknown
        (0)."""
        derived = BODY_BYTES_A_TOKEN * max(contexts) if all(contexts) else MOST_BODY_BYTES
        return self.body_bytes or min(MOST_BODY_BYTES, max(LEAST_BODY_BYTES, derived))


class Oidc(Section):
    """The identity provider whose tokens are accepted; its public keys are in a file. Claim names may contain dots. The policy
    gives roles to groups.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    jwks_file: Path
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("ES256", "RS256")
    leeway_seconds: Annotated[int, Field(ge=0, le=300)] = 30
    max_age_seconds: Positive = 24 * 3600
    subject_claim: str = "sub"
    tenant_claim: str
    groups_claim: str


class Identities(Section):
    """Means of identification besides API keys.

    `certificate_header`: the header in which the edge passes on the client certificate that it has verified (PEM,
    URL-encoded).
    """

    certificate_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = None
    oidc: Oidc | None = None


class FeedbackJournal(Section):
    """Where ratings, and the exchanges of tenants that consent, are kept. `days`: how long an answer may be rated. `guarded`:
    candidates of experiments answer only while `llm-serve experiment guard` watches them on this host. `hold`: a file that exists
    while subjects may delete nothing.
    """

    folder: Path
    hold: Path | None = None
    days: Positive = 30
    guarded: bool = False


class Documents(Section):
    """The organization's documents in Elasticsearch, which gateways search. `model`: of `engines`, for embeddings.

    `key_credential`: the systemd credential that holds ID:SECRET of an Elasticsearch API key. `index`: an alias.
    `least_similarity`: the minimum cosine of the nearest passage for the documents to answer a question; None: the value that the
    model's release states for the language, or 0. `intake`: the socket of `llm-serve documents intake`; without it, documents
    cannot be uploaded. `upload_bytes`: of one file.
    """

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@]+$")]
    tls: ClientTls | None = None
    key_credential: str | None = None
    index: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")] = "llmkeep-documents"
    model: ModelName
    deadline_ms: Positive = 2000
    least_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    intake: Path | None = None
    upload_bytes: Annotated[int, Field(gt=0, le=MOST_UPLOAD_BYTES)] = MOST_UPLOAD_BYTES

    @model_validator(mode="after")
    def nothing_in_clear(self) -> "Documents":
        """Questions and documents leave this host over mutual TLS only."""
        parts = urlsplit(self.url)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError(f"{self.url} would send questions in clear text: use https, or 127.0.0.1")
        if (parts.scheme == "https") != (self.tls is not None):
            raise ValueError(f"{self.url}: 'tls' (ca, certificate and key) belongs to https, and only to it")
        return self


class GatewayConfig(Section):
    """`llm-serve gateway --config`. The first model answers requests that name none. `host`: this host's full name, with which
    gateways of several hosts agree on the instance that has a conversation's prefix.
    """

    host: HostName = "local"
    listen: Listener
    metrics: Listener
    engines: Annotated[dict[ModelName, Engine], Field(min_length=1)]
    keys_file: Path
    policy: PolicySource | None = None
    audit: AuditWriter | None = None
    identity: Identities = Identities()
    redis: Redis | None = None
    quarantine: Path | None = None  # the file of `llm-gpu watch`, on hosts with GPUs
    feedback: FeedbackJournal | None = None  # without it no answer can be rated
    documents: Documents | None = None  # without it there are no collections
    limits: Limits = Limits()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def documents_have_their_model(self) -> "GatewayConfig":
        """Questions are embedded by an engine of this gateway."""
        if self.documents and self.documents.model not in self.engines:
            raise ValueError(
                f"documents.model is '{self.documents.model}', which is not in 'engines': add it"
            )
        return self

    @model_validator(mode="after")
    def certificates_come_from_the_edge(self) -> "GatewayConfig":
        """Any process that reaches a TCP port could forge the header; access to a UNIX socket is restricted by its
        file mode.
        """
        if self.identity.certificate_header and self.listen.socket is None:
            raise ValueError(
                "'identity.certificate_header' is trusted only on a UNIX socket: set 'listen.socket'"
            )
        return self


class EchoModel(Section):
    """The test engine, which repeats the words of the prompt."""

    driver: Literal["echo"]
    context: Positive = 4096
    slots: Positive = 256
    tokens: Annotated[int, Field(ge=0)] = 0  # in all slots together; 0: unlimited
    token_seconds: Share = 0.0


class Adapter(Section):
    """A LoRA adapter as saved by peft: a directory of safetensors, with its manifest."""

    path: Path
    manifest: Path


class LocalModel(Section):
    """A model that runs in the engine's own process.

    `temperature` and `top_p` apply where a request sets none; without them the model's generation_config.json
    applies, then OpenAI's default of 1.0. `merged`: an adapter that is added to the weights. `adapters`: adapters
    kept beside the weights, by the model name that clients request.
    """

    path: Path
    manifest: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Quantization = "none"  # by bitsandbytes; `dtype` is then the compute dtype
    merged: Adapter | None = None
    adapters: dict[ModelName, Adapter] = Field(default_factory=dict)
    context: Positive = 2048
    threads: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def merged_before_quantized(self) -> "LocalModel":
        """Weights in 4 or 8 bits lack the precision to absorb an adapter's changes."""
        if self.merged and self.quantization != "none":
            raise ValueError(
                f"'merged' cannot be combined with quantization '{self.quantization}': run `llm-serve merge`, and quantize the "
                f"model that it writes"
            )
        return self


class EmbedModel(Section):
    """An encoder that computes embeddings. `context`: longest text in tokens; the model's own limit applies as well."""

    driver: Literal["embed"]
    path: Path
    manifest: Path
    dtype: Literal["bfloat16", "float32"] = "float32"
    context: Positive = 512
    threads: Positive | None = None


class NaiveModel(LocalModel):
    """The `generate` method of transformers, one request at a time, on the CPU or on the first visible GPU."""

    driver: Literal["naive"]
    device: Literal["cpu", "cuda"] = "cpu"


class ContinuousModel(LocalModel):
    """Continuous batching in transformers: up to `slots` concurrent requests, `batch_tokens` per step.

    The cache holds `cache_tokens` in pages of `page_tokens`; greedy and sampled requests have one cache each. With
    `share_prefixes`, response times reveal whether another request's prompt began alike: enable it only where every
    client may know that.
    """

    driver: Literal["continuous"]
    slots: Positive = 16
    cache_tokens: Positive = 8192
    page_tokens: Annotated[int, Field(ge=4)] = 32
    batch_tokens: Positive = 512
    share_prefixes: bool = False

    @model_validator(mode="after")
    def room_for_one(self) -> "ContinuousModel":
        """A request that can never fit into the cache would stop the engine."""
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
                f"all requests of a batch use the same weights, so {', '.join(self.adapters)} would not be applied: "
                "give each an engine of its own with 'merged', or use driver 'naive'"
            )
        return self


class VllmModel(Section):
    """vLLM, which replaces `llm-serve engine` once the weights are verified, as in pods. On hosts role vllm runs it.

    `context`: tokens of prompt and answer. `slots`, `batch_tokens`: concurrent requests and tokens of a step, where vLLM's own
    choice is unsuitable. `tensor_parallel` times `pipeline_parallel` GPUs share the model. It takes no other option of vLLM's.
    """

    driver: Literal["vllm"]
    path: Path
    manifest: Path
    program: Path = Path("/opt/vllm/bin/vllm")
    context: Positive
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    quantization: Literal["awq", "fp8", "gptq"] | None = None
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=0.98)] = 0.9
    slots: Positive | None = None
    batch_tokens: Positive | None = None


class EngineConfig(Section):
    """`llm-serve engine --config`. `name`: the model's name, if it differs from that of the process, as with several
    instances.
    """

    name: ModelName | None = None
    socket: Path
    socket_mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")] = "0660"
    model: Annotated[
        EchoModel | NaiveModel | ContinuousModel | EmbedModel | VllmModel, Field(discriminator="driver")
    ]
    # Seconds without a step while work is pending; prefill of the longest prompt must fit in it.
    stall_seconds: Seconds = 60.0
    drain_seconds: Share = 25.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
