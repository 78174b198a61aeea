"""The pages below /operator/ as an ASGI application: sign-in, the policy's decision, the audit record, then the page.

A client is known by its session, which has the credential that it signed in with; by the certificate that the edge has
verified; or by an Authorization header.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from llmserve.access.decision import Decision
from llmserve.access.identity import Authenticator, Identity
from llmserve.access.policy import Policy, denied
from llmserve.api.errors import ApiError, unauthenticated
from llmserve.asgi import Exchange, Receive, Scope, Send
from llmserve.audit.recorder import Recorder
from llmweb.monitors import Monitors
from llmweb.pages import PAGES, sections
from llmweb.reviews import FORM_BYTES as REVIEW_BYTES
from llmweb.reviews import FORM_FIELDS as REVIEW_FIELDS
from llmweb.reviews import PAGE as REVIEWS
from llmweb.reviews import Reviews, sent
from llmweb.sections import Look
from llmweb.sessions import Session, Sessions
from llmweb.settings import WebConfig
from llmweb.wording import LANGUAGES, TAGS, THEMSELVES, Language, preferred, refusal, said

log = logging.getLogger("llmweb.app")
ROOT = "/operator/"
ACTION = f"GET {ROOT}*"  # as the policy names it; pages of others than operators have actions of their own
ACTIONS = {name: f"GET {ROOT}{name}" for name in (REVIEWS, "experiments")}
FORM_BYTES, FORM_FIELDS = 4096, 4
# The prefix makes browsers refuse it without Secure, and from any other host.
SESSION, LANGUAGE = "__Host-llmkeep-session", "__Host-llmkeep-language"
STATIC = Path(__file__).parent / "static"
ASSETS = {path.name: path for path in STATIC.iterdir() if path.is_file()}
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclass(slots=True)
class Site:
    """The state of one process, and the operator page.

    `root`: where its pages are. `home`: the first of them.
    """

    root: ClassVar = ROOT
    home: ClassVar = ROOT
    assets: ClassVar = {f"{ROOT}{name}": path for name, path in ASSETS.items()}
    headers: ClassVar = HEADERS
    config: WebConfig
    authenticator: Authenticator
    policy: Policy
    recorder: Recorder
    monitors: Monitors
    sessions: Sessions
    reviews: Reviews = field(init=False)
    templates: Environment = field(
        default_factory=lambda: Environment(
            loader=PackageLoader("llmweb"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
    )

    def __post_init__(self) -> None:
        self.reviews = Reviews(self.config.feedback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["llm"]
        request = Request(scope, receive)
        try:
            response = await self.answer(request, exchange)
        except ApiError as error:
            if error.code == "cross_site" and request.method == "GET":
                exchange.public = True
                query = request.url.query
                response = self.arrival(request, f"{request.scope['path']}{'?' if query else ''}{query}")
            else:
                exchange.code = error.code
                response = self.refusal(request, exchange, error)
        except Exception:
            exchange.code = "internal_error"
            fields = {"http.request.id": exchange.request_id.decode()}
            log.exception("a page failed", extra={"fields": fields})
            failed = ApiError(500, "internal_error", "This page failed: tell the operator the request id.")
            response = self.refusal(request, exchange, failed)
        response.headers.update(self.headers)
        if scope["path"] not in self.assets and "set-cookie" not in response.headers:
            response.raw_headers += self.renewal(request)
        # A release changes files under the same names, which belong together.
        response.headers["cache-control"] = "no-cache" if scope["path"] in self.assets else "no-store"
        await response(scope, receive, send)

    async def answer(self, request: Request, exchange: Exchange) -> Response:
        """Raises ApiError."""
        path: str = request.scope["path"]  # unlike the URL, without the client's Host
        method = request.method
        if path in self.assets and method == "GET":
            exchange.public = True
            return FileResponse(self.assets[path])
        if path == self.sign_in_path and method in {"GET", "POST"}:
            exchange.route = path
            exchange.public = method == "GET"
            return self.form(request) if exchange.public else await self.sign_in(request, exchange)
        if path == f"{self.root}sign-out" and method == "POST":
            exchange.public, exchange.route = True, path
            return self.sign_out(request)
        return await self.further(request, exchange)

    @property
    def sign_in_path(self) -> str:
        return f"{self.root}sign-in"

    async def further(self, request: Request, exchange: Exchange) -> Response:
        """Handle paths other than files and the sign-in. Raises ApiError."""
        path: str = request.scope["path"]
        page = path.removeprefix(ROOT)
        if not self.config.monitors or not path.startswith(ROOT) or page not in (*PAGES, REVIEWS):
            raise ApiError(404, "unknown_path", "there is no such page")
        exchange.route = path
        if page == REVIEWS and request.method == "POST":
            return await self.review(request, exchange)
        if request.method != "GET":
            raise ApiError(
                405, "method_not_allowed", f"{path} does not support {request.method[:20]}: use GET"
            )
        return await self.page(page, request, exchange)

    async def page(self, page: str, request: Request, exchange: Exchange) -> Response:
        """One page, for those who may see it."""
        identity = self.identity(request)
        if identity is None:
            exchange.public = True
            return RedirectResponse(self.sign_in_path, 303)
        shown = await self.permitted(identity)
        if not page and shown and page not in shown:
            return RedirectResponse(ROOT + shown[0], 303)
        action = ACTIONS.get(page, ACTION)
        decision = await self.decide(exchange, identity, action, action)
        look = Look(self.monitors, language_of(request), decision.experiments)
        values: dict[str, Any] = {"page": page, "look": look, "identity": identity, "pages": shown}
        if page == REVIEWS:
            asked = request.query_params.get("answer")
            template, more, seen = await self.reviews.page(look, decision.reviews, asked)
            await self.recorder.intent(exchange, about=seen)
            return self.rendered(request, template, **values, **more)
        await self.recorder.intent(exchange)
        parts = await sections(page, look, self.config)
        return self.rendered(request, "page.html", sections=parts, **values)

    async def review(self, request: Request, exchange: Exchange) -> Response:
        """Keep an expert's review of an answer; if it is invalid, show the form again with the error."""
        same_site(request)
        identity = self.identity(request)
        if identity is None:
            exchange.public = True
            return RedirectResponse(self.sign_in_path, 303)
        action = f"POST {ROOT}{REVIEWS}"
        decision = await self.decide(exchange, identity, action, action)
        given = sent(await form_of(request, REVIEW_BYTES, REVIEW_FIELDS))
        item = await self.reviews.item(decision.reviews, given.answer)
        await self.recorder.intent(exchange, about=given.recorded)
        try:
            await self.reviews.keep(item, identity, given)
        except ApiError as error:
            if error.status not in {400, 409}:
                raise
            exchange.code = error.code
            look = Look(self.monitors, language_of(request))
            wrong = refusal(look.language, error.code, error.message)
            values = {**self.reviews.form(look, item, given, wrong), "pages": await self.permitted(identity)}
            return self.rendered(
                request, "review.html", error.status, page=REVIEWS, look=look, identity=identity, **values
            )
        return RedirectResponse(f"{ROOT}{REVIEWS}", 303)

    async def landing(self, identity: Identity) -> tuple[str, str]:
        """The page after the sign-in, and the action that must be permitted for it."""
        [first, *_] = await self.permitted(identity) or [""]
        return ROOT + first, ACTIONS.get(first, ACTION)

    async def permitted(self, identity: Identity) -> list[str]:
        """Pages that the policy shows to the caller."""
        decisions = {
            action: await self.policy.decide(identity, action) for action in (ACTION, *ACTIONS.values())
        }
        return [page for page in (*PAGES, REVIEWS) if decisions[ACTIONS.get(page, ACTION)].allow]

    def identity(self, request: Request) -> Identity | None:
        """The identity from session, certificate or header; None without any of them. Raises ApiError."""
        if current := self.session(request):
            return current[1]
        try:
            return self.authenticator.identify(request.scope["headers"])
        except ApiError as error:
            if error.code == "missing_key":
                return None
            raise

    @property
    def provider(self) -> str:
        """The address where the sign-in at an identity provider begins; "" if there is none."""
        return ""

    def session(self, request: Request) -> tuple[Session, Identity] | None:
        """The request's session and its holder, unless either has ended; raises ApiError if that cannot be determined."""
        session = self.sessions.find(cookie(request, SESSION))
        try:
            return (session, self.holder(session, request)) if session else None
        except ApiError as error:
            if error.status != 401:
                raise
            return None

    def holder(self, session: Session, request: Request) -> Identity:
        """The holder of the session, determined as in the gateways; raises ApiError if key, token or certificate have ended."""
        credential = self.credential(session, request).items()
        identity = self.authenticator.identify(
            [(name.lower().encode(), value.encode("latin-1")) for name, value in credential]
        )
        if session.certificate not in {"", identity.id}:
            raise unauthenticated("no_session", "the session belongs to another certificate: sign in again")
        return identity

    def credential(self, session: Session, request: Request) -> dict[str, str]:
        """The header with which page and gateways authenticate a session's requests."""
        if session.certificate:
            header = str(self.config.certificate_header)
            return {header: request.headers.get(header, "")}
        return {"authorization": f"Bearer {session.credential}"}

    def renewal(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The header that notes the use of the request's session, if it is time to."""
        renewed = self.sessions.renewed(cookie(request, SESSION))
        return [session_cookie(renewed)] if renewed else []

    async def decide(self, exchange: Exchange, identity: Identity, action: str, asked: str) -> Decision:
        """The policy's decision on `asked` if it allows it; raises ApiError. `action`: the recorded name."""
        exchange.identity, exchange.action = identity, action
        decision = exchange.decision = await self.policy.decide(identity, asked)
        if not decision.allow:
            raise denied(decision)
        return decision

    async def sign_in(self, request: Request, exchange: Exchange) -> Response:
        """Exchange a key for a session. Raises ApiError if a page would be refused as well."""
        same_site(request)
        exchange.action = f"POST {self.sign_in_path}"
        key = (await form_of(request)).get("key", [""])[0].strip()
        if not key:
            return self.form(request, ApiError(401, "missing_key", "send the API key"), exchange)
        try:
            record = self.authenticator.keys.holder(key)
        except ApiError as error:
            if error.status != 401:
                raise
            return self.form(request, error, exchange)
        return await self.opened(request, exchange, self.authenticator.used(record), key)

    async def opened(
        self, request: Request, exchange: Exchange, identity: Identity, credential: str
    ) -> Response:
        """Open a session for a caller who may have one. `credential`: "" for a certificate. Raises ApiError."""
        home, asked = await self.landing(identity)
        await self.decide(exchange, identity, f"{request.method} {exchange.route}", asked)
        opened = self.sessions.open(credential, "" if credential else identity.id)
        await self.recorder.intent(exchange)
        self.sessions.close(cookie(request, SESSION))
        response = RedirectResponse(home, 303)
        response.raw_headers.append(session_cookie(opened))
        return response

    def sign_out(self, request: Request) -> Response:
        same_site(request)
        self.sessions.close(cookie(request, SESSION))
        response = RedirectResponse(self.sign_in_path, 303)
        response.delete_cookie(SESSION, path="/", secure=True, httponly=True, samesite="strict")
        return response

    def form(
        self, request: Request, error: ApiError | None = None, exchange: Exchange | None = None
    ) -> Response:
        """The sign-in form, after an error with what is wrong."""
        wrong = self.why(language_of(request), error) if error else ""
        if error and exchange:
            exchange.code = error.code
        return self.rendered(request, "sign-in.html", error.status if error else 200, page="", wrong=wrong)

    def arrival(self, request: Request, address: str) -> Response:
        """A page that leads to `address`, for a browser that comes from another site.

        Only the next request, which this page triggers, has the session's cookie and may use a client certificate. An image or a
        frame on another site triggers none.
        """
        return self.rendered(request, "arrival.html", page="", address=address)

    def refusal(self, request: Request, exchange: Exchange, error: ApiError) -> Response:
        words = self.why(language_of(request), error)
        response = self.rendered(
            request,
            "refused.html",
            error.status,
            page="",
            words=words,
            request_id=exchange.request_id.decode(),
        )
        for name, value in error.headers:
            # A browser that is told of "Bearer" can do nothing with it.
            if name != b"www-authenticate":
                response.headers[name.decode()] = value.decode()
        return response

    def why(self, language: Language, error: ApiError) -> str:
        """A refusal, in the client's language."""
        return refusal(language, error.code, error.message)

    def say(self, language: Language, name: str, **values: object) -> str:
        """The text of that name."""
        return said(language, name, **values)

    def rendered(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A template, in the client's language, which a link may have changed."""
        language = language_of(request)
        look = values.pop("look", None) or Look(self.monitors, language)
        body = self.templates.get_template(template).render(
            look=look,
            say=partial(self.say, language),
            tag=TAGS[language],
            languages=[(each, TAGS[each], THEMSELVES[each]) for each in LANGUAGES if each != language],
            root=self.root,
            home=self.home,
            **{"identity": None, "pages": [], "kept": "", "provider": self.provider, **values},
        )
        response = HTMLResponse(body, status, {"vary": "accept-language, cookie"})
        if request.query_params.get("language") == language:
            response.set_cookie(LANGUAGE, language, path="/", secure=True, httponly=True, samesite="strict")
        return response


def session_cookie(value: str) -> tuple[bytes, bytes]:
    """The header that gives a browser its session."""
    return b"set-cookie", f"{SESSION}={value}; HttpOnly; Path=/; SameSite=strict; Secure".encode()


def cookie(request: Request, name: str) -> str:
    """A cookie's value; "" if there is none."""
    try:
        jar = SimpleCookie(request.headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[name].value if name in jar else ""


def language_of(request: Request) -> Language:
    """The language by the link that was followed now or last, or by the browser's preference."""
    for asked in (request.query_params.get("language"), cookie(request, LANGUAGE)):
        for known in LANGUAGES:
            if asked == known:
                return known
    return preferred(request.headers.get("accept-language", ""))


def same_site(request: Request) -> None:
    """Reject forms sent by other sites; raises ApiError 403."""
    site = request.headers.get("sec-fetch-site")
    origin = f"https://{request.headers.get('host', '')}"
    if site != "same-origin" and (site is not None or request.headers.get("origin") != origin):
        raise ApiError(
            403, "cross_site", "the form was sent by another site: open this page, and sign in here"
        )


async def body_of(request: Request, most: int) -> bytes:
    """The body; raises ApiError 413 if it has more than `most` bytes, 400 if it was cut off."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise ApiError(413, "body_too_large", f"the form has more than {most} bytes: send less")
    except ClientDisconnect:
        raise ApiError(400, "invalid_form", "the form was cut off: send it again") from None
    return bytes(body)


async def form_of(
    request: Request, most_bytes: int = FORM_BYTES, most_fields: int = FORM_FIELDS
) -> dict[str, list[str]]:
    """The fields of a form; raises ApiError 413 if it is too long, 400 if it is not a form."""
    body = await body_of(request, most_bytes)
    try:
        return parse_qs(body.decode("latin-1"), max_num_fields=most_fields)
    except ValueError:
        raise ApiError(
            400, "invalid_form", f"the form has more than {most_fields} fields: send only those of the page"
        ) from None
