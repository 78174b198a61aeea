"""Break-glass: a signed file that lets one person work while the policy engine is down. It never overrides a denial."""

import logging
import time
from pathlib import Path
from typing import Any

import jwt

from llmcore.files import Stamp, stamp
from llmserve.access.decision import Decision, Rate
from llmserve.access.identity import Identity

log = logging.getLogger("llmserve.break_glass")
AUDIENCE = "llmkeep-break-glass"
LONGEST_SECONDS = 4 * 3600
RATE = Rate("break_glass", 60, 20_000, 200_000)
MAX_TOKENS = 1024


class BreakGlass:
    """The file, reread when it changes. One that is expired or not signed by the policy's key is ignored."""

    def __init__(self, path: Path, public_key: bytes) -> None:
        """`public_key`: the policy's, PEM."""
        self.path = path
        self.public_key = public_key
        self.claims: dict[str, Any] | None = None
        self.file_stamp: Stamp | None = None

    def active(self) -> bool:
        """Whether there is a valid file now."""
        self.reload()
        return self.claims is not None and self.claims["exp"] > time.time()

    def grant(self, identity: Identity, action: str) -> Decision | None:
        """A decision for this subject of this tenant and this action if the file names all three; logged as an error."""
        if not self.active() or self.claims is None:
            return None
        if (identity.tenant, identity.subject) != (self.claims["tenant"], self.claims["sub"]):
            return None
        if action not in self.claims["actions"]:
            return None
        reason = str(self.claims["reason"])[:200]
        fields = {
            "user.id": identity.subject,
            "organization.id": identity.tenant,
            "event.action": action,
            "event.reason": reason,
        }
        log.error("BREAK-GLASS: the policy engine is down, a signed file allows this request",
                  extra={"fields": fields})  # fmt: skip
        return Decision(
            allow=True,
            reason=f"break-glass: {reason}",
            rule="break_glass",
            revision=0,
            models=frozenset(models) if (models := self.claims.get("models")) else None,
            max_tokens=MAX_TOKENS,
            rate=RATE,
            log_prompt=True,
        )

    def reload(self) -> None:
        """Read the file again if it has changed."""
        now = stamp(self.path)
        if now == self.file_stamp:
            return
        self.file_stamp, self.claims = now, None
        if now is None:
            return
        try:
            claims = jwt.decode(
                self.path.read_text(encoding="ascii").strip(),
                self.public_key,
                algorithms=["ES256"],
                audience=AUDIENCE,
                options={"require": ["aud", "sub", "tenant", "iat", "exp"]},
            )
            if claims["exp"] - claims["iat"] > LONGEST_SECONDS:
                raise jwt.InvalidTokenError(f"it is valid for more than {LONGEST_SECONDS // 3600} h")
            if not isinstance(claims.get("actions"), list) or not claims.get("reason"):
                raise jwt.InvalidTokenError("it lacks actions or a reason")
            if not isinstance(claims.get("models", []), list):
                raise jwt.InvalidTokenError("its models are not a list")
        except (jwt.InvalidTokenError, OSError, ValueError) as error:
            log.error(f"{self.path} is not a valid break-glass file ({error}): ignored")
        else:
            self.claims = claims
            log.error("BREAK-GLASS is armed", extra={"fields": {"user.id": claims["sub"]}})
