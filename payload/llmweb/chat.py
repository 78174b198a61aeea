"""The chat page: sign-in as on the operator page, one HTML document, and requests passed on to a gateway.

The gateway checks, counts and records each request like those of any client, by the credential of the session. No questions or
answers are kept here.
"""

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, get_args
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError, unauthenticated, unavailable
from llmserve.asgi import Exchange, Receive, Scope, Send
from llmserve.feedback.ratings import Reason
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.gateway.uploads import pieces, size_of
from llmserve.http_client import BadAnswer, Lost
from llmserve.http_client import Response as Answer
from llmweb.app import ASSETS, HEADERS, SESSION, STATIC, Site, body_of, cookie, language_of, same_site
from llmweb.chat_wording import REFUSALS, SCRIPT, WORDS
from llmweb.gateways import Gateways
from llmweb.login import BEGUN_SECONDS, Logins, refused
from llmweb.sessions import Session
from llmweb.wording import LANGUAGES, Language

HOME, ROOT = "/", "/page/"
BELOW = "/page"  # what follows is a path of the gateway
PASSED_ON = frozenset(
    {("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/usage")}
    | {(method, "/v1/feedback") for method in ("GET", "POST", "DELETE")}
    | {("GET", "/v1/collections")}
)
# By which writers of collections list, add and remove documents.
COLLECTIONS = "/v1/collections"
DOCUMENTS = re.compile(r"/v1/collections/[A-Za-z0-9][A-Za-z0-9._-]{0,127}/documents")
BEGIN, SIGNED_IN, LOGIN = f"{ROOT}provider", f"{ROOT}signed-in", "__Host-llmkeep-login"
MOST_AT_ONCE = 8  # requests of a holder: their bodies are in memory
ANSWER_SECONDS = 24 * 3600.0  # the gateway's deadline comes first
# Of a gateway's answer; the others are those of its connection.
ANSWER_HEADERS = ("content-type", "cache-control", "retry-after", "x-llm-response-id", "x-llm-model")
Holder = tuple[str, str]  # tenant and subject
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)


def files() -> dict[str, Path]:
    """The files that a browser loads, by path."""
    found = [path for folder in ("chat", "vendor") for path in (STATIC / folder).iterdir()]
    return {f"{ROOT}{name}": path for name, path in (ASSETS | {path.name: path for path in found}).items()}


def csrf_token(session: Session) -> str:
    """The token that requests of a session carry besides the cookie: other sites, and scripts injected there, have neither."""
    return hashlib.sha256(b"llmkeep csrf token " + session.id.encode()).hexdigest()


@dataclass(slots=True)
class Chat(Site):
    """The chat page of one process, with the sessions of its operator page."""

    root: ClassVar = ROOT
    home: ClassVar = HOME
    assets: ClassVar = files()
    headers: ClassVar = HEADERS | {"content-security-policy": POLICY}
    gateways: Gateways = field(kw_only=True)
    logins: Logins | None = field(kw_only=True)
    in_flight: InFlightRequests = field(kw_only=True)
    at_once: Counter[Holder] = field(default_factory=Counter, kw_only=True)  # requests

    async def further(self, request: Request, exchange: Exchange) -> Response:
        """The page itself, and the sign-in at an identity provider. Raises ApiError."""
        if self.logins and request.scope["path"] in {BEGIN, SIGNED_IN} and request.method == "GET":
            exchange.route = request.scope["path"]
            return await self.at_provider(request, exchange, self.logins)
        if request.scope["path"] != HOME:
            raise ApiError(404, "unknown_path", "there is no such page")
        exchange.route = HOME
        if request.method != "GET":
            raise ApiError(
                405, "method_not_allowed", f"{HOME} does not support {request.method[:20]}: use GET"
            )
        current = self.session(request)
        if current is None:
            return await self.without_session(request, exchange)
        session, identity = current
        exchange.public = True  # it shows nothing but who is signed in
        language = language_of(request)
        script = {name: words[LANGUAGES.index(language)] for name, words in SCRIPT.items()}
        token = csrf_token(session)
        return self.rendered(
            request,
            "chat.html",
            page="",
            pages=[],
            identity=identity,
            token=token,
            script=script,
            bytes=self.config.body_bytes,
            reasons=get_args(Reason),
        )

    async def without_session(self, request: Request, exchange: Exchange) -> Response:
        """A session for callers with a certificate or header, else the sign-in. Raises ApiError."""
        identity = self.identity(request)
        if identity is None:
            exchange.public = True
            return RedirectResponse(self.sign_in_path, 303)
        credential = request.headers.get("authorization", "").partition(" ")[2].strip()
        return await self.arrived(request, exchange, identity, credential)

    async def landing(self, identity: Identity) -> tuple[str, str]:
        return HOME, "POST /v1/chat/completions"

    @property
    def provider(self) -> str:
        return BEGIN if self.logins else ""

    async def at_provider(self, request: Request, exchange: Exchange, logins: Logins) -> Response:
        """Send a browser to the identity provider, or handle its return. Raises ApiError."""
        if exchange.route == BEGIN:
            exchange.public = True
            kept, address = logins.begin()
            response: Response = RedirectResponse(address, 303)
            # Lax, as the provider sends the browser back here.
            response.set_cookie(
                LOGIN, kept, BEGUN_SECONDS, path="/", secure=True, httponly=True, samesite="lax"
            )
            return response
        exchange.action = f"GET {SIGNED_IN}"
        said = request.query_params
        try:
            if said.get("error"):
                raise refused(said["error"])
            token = await logins.finish(cookie(request, LOGIN), said.get("state", ""), said.get("code", ""))
            identity = self.authenticator.token(logins.issuer, token)
        except ApiError as error:
            return self.form(request, error, exchange)
        response = await self.arrived(request, exchange, identity, token)
        response.delete_cookie(LOGIN, path="/", secure=True, httponly=True, samesite="lax")
        return response

    async def arrived(
        self, request: Request, exchange: Exchange, identity: Identity, credential: str
    ) -> Response:
        """A session, and a page that leads to the first page. Raises ApiError.

        The browser may come from another site: it sends the session's cookie only after a page of this site.
        """
        opened = await self.opened(request, exchange, identity, credential)
        response = self.arrival(request, HOME)
        response.raw_headers += [each for each in opened.raw_headers if each[0] == b"set-cookie"]
        return response

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of the page's script on behalf of its session. Raises ApiError."""
        exchange: Exchange = scope["llm"]
        request = Request(scope, receive)
        method, path = scope["method"], scope["path"].removeprefix(BELOW)
        of_documents = method in {"GET", "POST", "DELETE"} and DOCUMENTS.fullmatch(path)
        known = of_documents or (method, path) in PASSED_ON
        if known:
            exchange.route = f"{BELOW}{COLLECTIONS}/*" if of_documents else scope["path"]
            exchange.action = f"{method} {exchange.route}"
        session, identity = self.asking(request, exchange)
        if not known:
            raise ApiError(404, "unknown_path", f"the page does not forward {method[:20]} {path[:80]!r}")
        with self.few(identity):
            if of_documents:
                await self.ask_of_documents(request, session, identity, send)
                return
            body = await body_of(request, self.config.body_bytes) if method == "POST" else None
            await self.ask(request, session, identity, path, body, send)

    async def ask_of_documents(
        self, request: Request, session: Session, identity: Identity, send: Send
    ) -> None:
        """Forward a request about documents; a file is streamed, and never held here as a whole. Raises ApiError."""
        path = request.scope["path"].removeprefix(BELOW)
        query = urlencode(request.query_params.multi_items())
        file = pieces(request) if request.method == "POST" else None
        await self.ask(request, session, identity, f"{path}?{query}" if query else path, None, send, file)

    @contextmanager
    def few(self, identity: Identity) -> Iterator[None]:
        """Run the block as a request of the holder; raises ApiError 429 if there are too many."""
        holder = identity.tenant, identity.subject
        if self.at_once[holder] >= MOST_AT_ONCE:
            raise ApiError(
                429,
                "too_many_at_once",
                f"{MOST_AT_ONCE} of your requests are being answered: wait for one of them, or stop it",
                headers=[(b"retry-after", b"5")],
            )
        self.at_once[holder] += 1
        try:
            yield
        finally:
            self.at_once[holder] -= 1
            if not self.at_once[holder]:
                del self.at_once[holder]

    async def ask(
        self,
        request: Request,
        session: Session,
        identity: Identity,
        path: str,
        body: bytes | None,
        send: Send,
        file: AsyncIterator[bytes] | None = None,
    ) -> None:
        """Send the request to a gateway, and forward its answer as it arrives. `file`: the body, if it is a file. Raises
        ApiError."""
        scope = request.scope
        exchange: Exchange = scope["llm"]
        method = scope["method"]
        headers = {
            **self.credential(session, request),
            "x-request-id": exchange.request_id.decode(),
            "traceparent": exchange.traceparent.decode(),
        }
        if file:
            headers |= {
                "content-type": "application/octet-stream",
                "content-length": str(size_of(request)),
            }
        if exchange.address:
            headers["x-forwarded-for"] = exchange.address
        if request.headers.get("cache-control") == "no-cache":
            headers["cache-control"] = "no-cache"  # another answer than before
        ends = exchange.started + ANSWER_SECONDS
        exchange.public = True  # from here on the gateway records it
        try:
            with self.in_flight.watched(scope["peer"], identity, method, ends, ANSWER_SECONDS):
                async with self.gateways.ask(method, path, body, headers, file) as answer:
                    await relay(answer, self.renewal(request), send)
        except (OSError, TimeoutError, Lost, BadAnswer):
            raise unavailable(
                "unavailable", "the gateway closed the connection: send it again in a few seconds", 5
            ) from None

    def asking(self, request: Request, exchange: Exchange) -> tuple[Session, Identity]:
        """The session of a request of the page's script, and its holder; raises ApiError 401 or 403."""
        session = self.sessions.find(cookie(request, SESSION))
        if session is None:
            raise unauthenticated("no_session", "the session is over: sign in again")
        identity = exchange.identity = self.holder(session, request)
        same_site(request)
        if not hmac.compare_digest(
            request.headers.get("x-csrf-token", "").encode(), csrf_token(session).encode()
        ):
            raise ApiError(
                403, "csrf", "the page's token is missing or belongs to another session: reload the page"
            )
        return session, identity

    def why(self, language: Language, error: ApiError) -> str:
        words = REFUSALS.get(error.code)
        return words[LANGUAGES.index(language)] if words else super(Chat, self).why(language, error)

    def say(self, language: Language, name: str, **values: object) -> str:
        words = WORDS.get(name)
        return (
            words[LANGUAGES.index(language)].format(**values)
            if words
            else super(Chat, self).say(language, name, **values)
        )


async def relay(answer: Answer, more: list[tuple[bytes, bytes]], send: Send) -> None:
    """Forward an answer piece by piece, with `more` headers."""
    headers = more + [
        (name.encode(), value.encode("latin-1"))
        for name, value in answer.headers.items()
        if name in ANSWER_HEADERS
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for piece in answer.body():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
