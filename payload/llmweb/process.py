"""The process of `llm-web serve`: the parts of the gateway's code that it needs, its listener, and its end."""

import asyncio
from contextlib import suppress

from llmcore import logs
from llmcore.notify import notify
from llmserve.access.api_keys import KeyTable
from llmserve.access.estate_keys import estate_keys
from llmserve.access.identity import Authenticator
from llmserve.access.oidc import Issuer
from llmserve.asgi import App, Receive, Scope, Send
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.gateway.middleware import AccessLog, BodyDrain, ErrorEnvelope, RequestContext
from llmserve.gateway.process import listening, open_policy, server
from llmserve.metrics import Metrics
from llmserve.signals import StopSignals
from llmweb.app import ROOT, Site
from llmweb.chat import BELOW, COLLECTIONS, Chat
from llmweb.gateways import Gateways
from llmweb.login import Logins
from llmweb.monitors import open_monitors
from llmweb.sessions import Sessions
from llmweb.settings import WebConfig


async def run_web(config: WebConfig, pepper: bytes) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError, KeyFileError."""
    logs.guard(asyncio.get_running_loop())
    metrics = Metrics()  # what the gateway's classes count; nothing exports it
    audit = AuditClient(config.audit.socket, metrics)
    issuer = Issuer(config.oidc) if config.oidc else None
    site = Site(
        config,
        Authenticator(
            KeyTable(config.keys_file, pepper),
            config.certificate_header,
            issuer,
        ),
        open_policy(config.policy, metrics, None),
        Recorder(audit, pepper),
        open_monitors(config.monitors, config.tls),
        Sessions(estate_keys(pepper)),
    )
    chat = Chat(
        config,
        site.authenticator,
        site.policy,
        site.recorder,
        site.monitors,
        site.sessions,
        site.templates,
        gateways=Gateways(config.gateways),
        in_flight=InFlightRequests(metrics),
        logins=Logins(config.login, issuer) if config.login and issuer else None,
    )
    pages = of_both(site, chat, metrics) if config.gateways else site
    app: App = RequestContext(AccessLog(pages, metrics, site.recorder.close), metrics)
    serving = server(app)
    stop = StopSignals()
    async with asyncio.TaskGroup() as tasks:
        background = [
            tasks.create_task(audit.keep_connected()),
            tasks.create_task(site.policy.watch(config.policy.probe_ms / 1000)),
            tasks.create_task(site.authenticator.watch()),
            tasks.create_task(every_second(site, audit)),
        ]
        listener = tasks.create_task(serving.serve(sockets=[listening(config.listen)]))
        notify("READY=1")
        await stop.requested.wait()
        notify("STOPPING=1")
        serving.should_exit = True
        await listener
        site.recorder.flush()
        await audit.settled()
        for task in background:
            task.cancel()
    site.authenticator.close()
    site.policy.engine.close()
    if config.listen.socket:
        with suppress(FileNotFoundError):
            config.listen.socket.unlink()


def of_both(operator: Site, chat: Chat, metrics: Metrics) -> App:
    """Operator page and chat page; requests from the latter's script are answered as by the gateway."""
    asked = BodyDrain(ErrorEnvelope(chat.pass_on, metrics), f"{BELOW}{COLLECTIONS}")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(ROOT):
            await operator(scope, receive, send)
        elif path.startswith(f"{BELOW}/v1/"):
            await asked(scope, receive, send)
        else:
            await chat(scope, receive, send)

    return app


async def every_second(site: Site, audit: AuditClient) -> None:
    """Fail requests that wait too long for the audit record, and write counted refusals."""
    while True:
        await asyncio.sleep(1)
        audit.end_overdue()
        site.recorder.tick()
