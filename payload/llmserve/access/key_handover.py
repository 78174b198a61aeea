"""The document that `llm-serve keys import` reads: a record with the key or the certificate itself in place of its proof.

`keys add` and `keys rotate` print it with --json; playbooks/identities.yml makes it on the control node.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmserve.access.api_keys import NAME, KeyFileError, Record, key_hash
from llmserve.access.client_certificates import read_certificate

Id = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
Name = Annotated[str, Field(pattern=f"^(?:{NAME.pattern})$")]
SECRET = {"key", "certificate"}  # fields whose values are in no message
PROOFS = "an api_key needs a key; a certificate needs a certificate or its fingerprint"


class Handover(BaseModel):
    """The fields of the document; `replaced_expires` is the end of the key `replaces`. `state` and `last_used` are ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: Id
    kind: Literal["api_key", "certificate"] = "api_key"
    subject: Name
    tenant: Name
    roles: Annotated[tuple[Name, ...], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: None = None
    replaces: Id | None = None
    replaced_expires: AwareDatetime | None = None
    key: Annotated[str, Field(pattern="^llmk_[0-9a-f]{12}_[0-9a-f]{48}$")] | None = None
    certificate: str | None = None
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    state: object = None
    last_used: object = None

    @model_validator(mode="after")
    def is_consistent(self) -> "Handover":
        """The fields fit each other."""
        proofs = [name for name in ("key", "certificate", "fingerprint") if getattr(self, name) is not None]
        if len(proofs) != 1 or (proofs == ["key"]) != (self.kind == "api_key"):
            raise ValueError(
                f"kind {self.kind} comes with {' and '.join(proofs) or 'none of them'}: {PROOFS}"
            )
        if self.key and self.key.split("_")[1] != self.id:
            raise ValueError(f"the id of the key differs from {self.id}")
        for name, ends in ("expires", self.expires), ("replaced_expires", self.replaced_expires):
            if ends and ends < self.created:
                raise ValueError(
                    f"{name} is {ends.isoformat()}, and created {self.created.isoformat()} is later"
                )
        if (self.replaces is None) != (self.replaced_expires is None):
            raise ValueError(
                f"replaces is {self.replaces!r}, and replaced_expires {self.replaced_expires}: both or none"
            )
        if self.replaces == self.id:
            raise ValueError(f"{self.id} replaces itself")
        return self

    def record(self, pepper: Callable[[], bytes]) -> Record:
        """The record for this host: a key hashed with its pepper, a certificate by its SHA-256. Raises KeyFileError."""
        fields = self.model_dump(exclude={"key", "certificate", "replaced_expires", "state", "last_used"})
        if self.key is not None:
            fields["hash"] = key_hash(pepper(), self.key)
        if self.certificate is not None:
            try:
                certificate = read_certificate(self.certificate.encode())
            except ValueError:
                raise KeyFileError(
                    "the field certificate contains no certificate: specify a PEM file"
                ) from None
            fields["fingerprint"] = certificate.fingerprint
            fields["expires"] = min(self.expires or certificate.not_after, certificate.not_after)
        return Record.model_validate(fields)


def read_handover(content: bytes) -> Handover:
    """Raises KeyFileError, which names the field and its value, but never contains a key."""
    try:
        return Handover.model_validate_json(content)
    except ValidationError as error:
        reasons = "; ".join(map(reason, error.errors(include_url=False, include_context=False)))
    raise KeyFileError(
        f"standard input is not the output of 'llm-serve keys add --json' ({reasons}): pass it unchanged"
    )


def reason(error: Any) -> str:
    """One error of the document, without the values of secrets and of unknown fields."""
    place = error["loc"]
    message = str(error["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    field = ".".join(map(str, place))
    if place[0] in SECRET or place[0] not in Handover.model_fields or error["type"] == "missing":
        return f"{field}: {message}"
    return f"{field} is {error['input']!r:.80}: {message}"
