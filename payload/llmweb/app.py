"""The operator page as an ASGI application: sign-in, the policy's decision, the audit record, then the page.

A client is known by its session, which an API key was exchanged for; by the certificate that the edge has verified; or by an
Authorization header.
"""

import logging
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from llmserve.access.identity import Authenticator, Identity, of_record
from llmserve.access.policy import Policy, denied
from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange, Receive, Scope, Send
from llmserve.audit.recorder import Recorder
from llmweb.monitors import Monitors
from llmweb.pages import PAGES, sections
from llmweb.sections import Look
from llmweb.sessions import Sessions
from llmweb.settings import WebConfig
from llmweb.wording import LANGUAGES, TAGS, THEMSELVES, Language, preferred, refusal

log = logging.getLogger("llmweb.app")
ROOT = "/operator/"
ACTION = f"GET {ROOT}*"  # as the policy names it
SIGN_IN, SIGN_OUT = f"{ROOT}sign-in", f"{ROOT}sign-out"
FORM_BYTES, FORM_FIELDS = 4096, 4
# The prefix makes browsers refuse it without Secure, and from any other host.
SESSION, LANGUAGE = "__Host-llmkeep-session", "__Host-llmkeep-language"
STATIC = Path(__file__).parent / "static"
ASSETS = {f"{ROOT}{path.name}": path for path in STATIC.iterdir()}
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclass(slots=True)
class Site:
    """What one process serves with."""

    config: WebConfig
    authenticator: Authenticator
    policy: Policy
    recorder: Recorder
    monitors: Monitors
    sessions: Sessions = field(default_factory=Sessions)
    templates: Environment = field(
        default_factory=lambda: Environment(
            loader=PackageLoader("llmweb"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["llm"]
        request = Request(scope, receive)
        try:
            response = await self.answer(request, exchange)
        except ApiError as error:
            exchange.code = error.code
            response = self.refusal(request, exchange, error)
        except Exception:
            exchange.code = "internal_error"
            fields = {"http.request.id": exchange.request_id.decode()}
            log.exception("a page failed", extra={"fields": fields})
            failed = ApiError(500, "internal_error", "This page failed: tell the operator the request id.")
            response = self.refusal(request, exchange, failed)
        response.headers.update(HEADERS)
        if scope["path"] not in ASSETS:
            response.headers["cache-control"] = "no-store"
        await response(scope, receive, send)

    async def answer(self, request: Request, exchange: Exchange) -> Response:
        """Raises ApiError."""
        path: str = request.scope["path"]  # unlike the URL, without the client's Host
        method = request.method
        page = path.removeprefix(ROOT)
        if path in ASSETS and method == "GET":
            exchange.public = True
            return FileResponse(ASSETS[path])
        if path == SIGN_IN and method == "GET":
            exchange.public, exchange.route = True, SIGN_IN
            return self.form(request)
        if path == SIGN_IN and method == "POST":
            exchange.route = SIGN_IN
            return await self.sign_in(request, exchange)
        if path == SIGN_OUT and method == "POST":
            exchange.public, exchange.route = True, SIGN_OUT
            return self.sign_out(request)
        if not path.startswith(ROOT) or page not in PAGES:
            raise ApiError(404, "unknown_path", "there is no such page")
        exchange.route = path
        if method != "GET":
            raise ApiError(405, "method_not_allowed", f"{path} does not support {method[:20]}: use GET")
        return await self.page(page, request, exchange)

    async def page(self, page: str, request: Request, exchange: Exchange) -> Response:
        """One page, for those who may see it."""
        identity = self.identity(request)
        if identity is None:
            exchange.public = True
            return RedirectResponse(SIGN_IN, 303)
        await self.admit(exchange, identity, ACTION)
        look = Look(self.monitors, language_of(request))
        parts = await sections(page, look, self.config)
        return self.rendered(request, "page.html", page=page, sections=parts, look=look, identity=identity)

    def identity(self, request: Request) -> Identity | None:
        """By session, certificate or header; None if there is nothing to go by. Raises ApiError."""
        key = self.sessions.key_of(cookie(request, SESSION))
        if key is not None:
            record = self.authenticator.keys.readable().get(key)
            if record is not None and self.authenticator.keys.ended(key) is None:
                return of_record(record)
            self.sessions.close(cookie(request, SESSION))
        try:
            return self.authenticator.identify(request.scope["headers"])
        except ApiError as error:
            if error.code == "missing_key":
                return None
            raise

    async def admit(self, exchange: Exchange, identity: Identity, action: str) -> None:
        """Policy and record; raises ApiError."""
        exchange.identity, exchange.action = identity, action
        decision = exchange.decision = await self.policy.decide(identity, ACTION)
        if not decision.allow:
            raise denied(decision)
        await self.recorder.intent(exchange)

    async def sign_in(self, request: Request, exchange: Exchange) -> Response:
        """Exchange a key for a session. Raises ApiError where a page would be refused, too."""
        same_site(request)
        exchange.action = f"POST {SIGN_IN}"
        key = (await form_of(request)).get("key", [""])[0].strip()
        if not key:
            return self.form(request, ApiError(401, "missing_key", "send the API key"), exchange)
        try:
            record = self.authenticator.keys.holder(key)
        except ApiError as error:
            if error.status != 401:
                raise
            return self.form(request, error, exchange)
        await self.admit(exchange, self.authenticator.used(record), f"POST {SIGN_IN}")
        self.sessions.close(cookie(request, SESSION))
        response = RedirectResponse(ROOT, 303)
        identifier = self.sessions.open(record.id)
        response.set_cookie(SESSION, identifier, path="/", secure=True, httponly=True, samesite="strict")
        return response

    def sign_out(self, request: Request) -> Response:
        same_site(request)
        self.sessions.close(cookie(request, SESSION))
        response = RedirectResponse(SIGN_IN, 303)
        response.delete_cookie(SESSION, path="/", secure=True, httponly=True, samesite="strict")
        return response

    def form(
        self, request: Request, error: ApiError | None = None, exchange: Exchange | None = None
    ) -> Response:
        """The sign-in form, after an error with what is wrong."""
        wrong = refusal(language_of(request), error.code, error.message) if error else ""
        if error and exchange:
            exchange.code = error.code
        return self.rendered(request, "sign-in.html", error.status if error else 200, page="", wrong=wrong)

    def refusal(self, request: Request, exchange: Exchange, error: ApiError) -> Response:
        words = refusal(language_of(request), error.code, error.message)
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

    def rendered(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A template, in the client's language, which a link may have changed."""
        language = language_of(request)
        look = values.pop("look", None) or Look(self.monitors, language)
        body = self.templates.get_template(template).render(
            look=look,
            say=look.say,
            tag=TAGS[language],
            languages=[(each, TAGS[each], THEMSELVES[each]) for each in LANGUAGES if each != language],
            root=ROOT,
            pages=list(PAGES),
            **{"identity": None, **values},
        )
        response = HTMLResponse(body, status, {"vary": "accept-language, cookie"})
        if request.query_params.get("language") == language:
            response.set_cookie(LANGUAGE, language, path="/", secure=True, httponly=True, samesite="strict")
        return response


def cookie(request: Request, name: str) -> str:
    """A cookie's value; "" if there is none."""
    try:
        jar = SimpleCookie(request.headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[name].value if name in jar else ""


def language_of(request: Request) -> Language:
    """By the link that was followed, the last one that was, or what the browser prefers."""
    for asked in (request.query_params.get("language"), cookie(request, LANGUAGE)):
        for known in LANGUAGES:
            if asked == known:
                return known
    return preferred(request.headers.get("accept-language", ""))


def same_site(request: Request) -> None:
    """Refuse forms that other sites send; raises ApiError 403."""
    site = request.headers.get("sec-fetch-site")
    origin = f"https://{request.headers.get('host', '')}"
    if site != "same-origin" and (site is not None or request.headers.get("origin") != origin):
        raise ApiError(
            403, "cross_site", "the form was sent by another site: open this page, and sign in here"
        )


async def form_of(request: Request) -> dict[str, list[str]]:
    """The fields of a form; raises ApiError 413 for one that is too long, 400 for what is no form."""
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > FORM_BYTES:
                raise ApiError(
                    413, "body_too_large", f"the form has more than {FORM_BYTES} bytes: send the key only"
                )
        return parse_qs(body.decode("latin-1"), max_num_fields=FORM_FIELDS)
    except ClientDisconnect:
        raise ApiError(400, "invalid_form", "the form broke off: send it again") from None
    except ValueError:
        raise ApiError(
            400, "invalid_form", f"the form has more than {FORM_FIELDS} fields: send the key only"
        ) from None
