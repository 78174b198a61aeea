"""The configuration of `llm-web`."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from llmcore.config import Section
from llmserve.settings import LOOPBACK, AuditWriter, ClientTls, Listener, Oidc, PolicySource, Positive

Url = Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[A-Za-z0-9._-]+)*$")]


class Monitor(Section):
    """A host that runs Prometheus and Alertmanager, by the base addresses of their APIs."""

    prometheus: Url
    alertmanager: Url

    @field_validator("prometheus", "alertmanager")
    @classmethod
    def nothing_in_clear(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError(f"{url} would send the estate's failures in clear text: use https, or 127.0.0.1")
        return url


class Objective(Section):
    """An entry of slo.yml, whose keys docs/operate/metrics.md describes."""

    name: str
    title: str
    objective: Annotated[float, Field(gt=0, lt=1)]
    all: str
    good: str | None = None
    bad: str | None = None
    by: tuple[str, ...] = ()
    runbook: str = ""


Https = Annotated[str, Field(pattern=r"^https://[^/?#@\s]+(/[A-Za-z0-9._~-]+)*/?$")]


class Login(Section):
    """Sign-in at the identity provider, as its public client `client`. `redirect`: https://EDGE/page/signed-in, as registered
    there. `ca`: authorities of the token endpoint's certificate, PEM. `address`: its IP address, if no resolver knows its name.
    """

    authorize: Https
    token: Https
    client: Annotated[str, Field(min_length=1)]
    redirect: Annotated[str, Field(pattern=r"^https://[^/?#@\s]+/page/signed-in$")]
    ca: Path
    address: Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+$")] | None = None
    scope: str = "openid"


class WebConfig(Section):
    """`llm-web serve --config`. `keys_file`, `policy` and `audit` are the gateway's.

    `certificate_header`: as in the gateway's `identity`. `monitors` are queried in this order, the next one if one does not
    answer; without them there is no operator page. `days`: the window of the objectives. `feedback`: the gateway's journal of
    ratings. `verdicts`: a folder with the output of `llmkeep experiment show --json` for each experiment, as NAME.json.
    `gateways`: the sockets that the chat page uses; without them there is no chat page. `body_bytes`: most of a request to them.
    `oidc`: as in the gateway's `identity`; with `login` the chat page has sign-in at the identity provider.
    """

    listen: Listener
    keys_file: Path
    policy: PolicySource
    audit: AuditWriter
    certificate_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = None
    monitors: tuple[Monitor, ...] = ()
    gateways: tuple[Path, ...] = ()
    oidc: Oidc | None = None
    login: Login | None = None
    tls: ClientTls | None = None
    objectives: tuple[Objective, ...] = ()
    days: Positive = 30
    feedback: Path | None = None
    verdicts: Path | None = None
    body_bytes: Positive = 12 * 131072  # the default of role edge
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def trusted_ways(self) -> "WebConfig":
        """Any process that reaches a TCP port could forge the certificate header."""
        if not self.monitors and not self.gateways:
            raise ValueError("there is no page to serve: set 'monitors' for operators, 'gateways' for chat")
        if self.certificate_header and self.listen.socket is None:
            raise ValueError("'certificate_header' is trusted only on a UNIX socket: set 'listen.socket'")
        if self.login and not (self.oidc and self.gateways):
            raise ValueError("'login' needs 'oidc', by which its tokens are verified, and 'gateways'")
        urls = [url for each in self.monitors for url in (each.prometheus, each.alertmanager)]
        if self.tls is None and any(url.startswith("https:") for url in urls):
            raise ValueError("monitors at https addresses need 'tls': ca, certificate and key")
        return self
