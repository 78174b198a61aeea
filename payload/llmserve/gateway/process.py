"""The gateway's process: listeners, background tasks, readiness, graceful shutdown."""

import asyncio
import gc
import hmac
import logging
import socket
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn

from llmcore import logs
from llmcore.config import ConfigError
from llmcore.notify import notify
from llmserve.access.api_keys import KeyTable
from llmserve.access.break_glass import BreakGlass
from llmserve.access.estate_keys import Ring, derived, estate_keys
from llmserve.access.identity import Authenticator
from llmserve.access.oidc import Issuer
from llmserve.access.opa import OpaEmbedded, OpaServer, PolicyEngine
from llmserve.access.policy import Policy
from llmserve.access.quotas import Quotas
from llmserve.api.errors import ApiError
from llmserve.asgi import App, Receive, Scope, Send, respond
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.cache.exact import ExactCache
from llmserve.cache.single_flight import SharedAnswers
from llmserve.credentials import credential
from llmserve.documents.intake_client import IntakeClient
from llmserve.documents.retrieval import Retrieval
from llmserve.feedback.halts import Halts
from llmserve.feedback.handover import DEADLINE_MS, Handover
from llmserve.feedback.journal import Journal
from llmserve.feedback.own import OwnRecords
from llmserve.feedback.ratings import Ratings
from llmserve.feedback.response_ids import ResponseIds
from llmserve.gateway.http_protocol import BoundedHttp
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.gateway.routes import build_app
from llmserve.gateway.state import State
from llmserve.metrics import EngineGauges, Metrics
from llmserve.redis_client import RedisClient
from llmserve.settings import GatewayConfig, Listener, PolicySource
from llmserve.signals import StopSignals
from llmserve.sockets import bind_tcp, bind_unix
from llmserve.upstream.admission import Queue
from llmserve.upstream.instances import Instances, open_instances
from llmserve.upstream.quarantine import Quarantine

log = logging.getLogger("llmserve.gateway")
# Longer than the edge keeps idle connections, so that it never reuses one that is closing.
KEEP_ALIVE_SECONDS = 75
DRAIN_LOOK_SECONDS = 0.02
# A second or more: time for requests accepted before the socket was removed to pass their checks.
ARRIVED_LOOKS = 50
ENGINE_LOOK_SECONDS = 0.01
ENGINE_WAIT_SECONDS = 3.0  # how long READY waits for engines; a dead one must not block the start


class Server(uvicorn.Server):
    """uvicorn without signal handling, since this process has two servers and one drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_gateway`."""
        yield


def server(app: App) -> Server:
    return Server(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=3,
        )
    )


def listening(listener: Listener) -> socket.socket:
    if listener.socket is not None:
        return bind_unix(listener.socket, int(listener.socket_mode, 8))
    return bind_tcp(listener.host, listener.port or 0)


def metrics_app(metrics: Metrics) -> App:
    """GET /metrics; it has a listener of its own, and therefore needs no API key."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) != ("GET", "/metrics"):
            error = ApiError(404, "unknown_path", "there is only GET /metrics here")
            await respond(send, error.status, error.body())
            return
        body, content_type = metrics.render()
        await respond(send, 200, body, content_type=content_type.encode())

    return app


def open_redis(config: GatewayConfig, deadline_ms: int | None = None) -> RedisClient | None:
    """A client of the configured Redis, or None; raises ConfigError if its password is missing. `deadline_ms`: overrides the
    configured one.
    """
    if config.redis is None:
        log.warning(
            "no Redis is configured: answers are not cached, and this process counts quotas on its own"
        )
        return None
    password = None
    if config.redis.password_credential:
        secret = credential(config.redis.password_credential)
        if secret is None:
            raise ConfigError(
                f"redis.password_credential is '{config.redis.password_credential}', but there is no such "
                "credential: run this in the unit that loads it (LoadCredentialEncrypted=)"
            )
        password = secret.decode()
    settings = config.redis.model_copy(update={"deadline_ms": deadline_ms} if deadline_ms else None)
    return RedisClient(settings, password)


def open_policy_engine(source: PolicySource, metrics: Metrics) -> PolicyEngine:
    """The configured policy engine."""
    if source.engine == "server" and source.socket:
        policy_engine: PolicyEngine = OpaServer(source.socket, source.deadline_ms)
    elif source.bundle:
        policy_engine = OpaEmbedded(source.bundle, source.key.read_bytes())
    else:
        raise ConfigError(
            f"policy.engine is '{source.engine}' but its source is missing: set 'socket' for a server, else 'bundle'"
        )
    metrics.policy_engine.labels(source.engine).set(1)
    log.info("policy", extra={"fields": {"engine": source.engine}})
    return policy_engine


def open_policy(source: PolicySource | None, metrics: Metrics, policy_engine: PolicyEngine | None) -> Policy:
    """The configured policy. `policy_engine` replaces its engine, or a missing policy; raises ConfigError if there is
    neither.
    """
    if source is None:
        if policy_engine is None:
            raise ConfigError(
                "key 'policy' is missing: without a policy every request would be denied; set it"
            )
        return Policy(policy_engine, metrics, None, None)
    key = source.key.read_bytes()
    glass = BreakGlass(source.break_glass, key) if source.break_glass else None
    return Policy(policy_engine or open_policy_engine(source, metrics), metrics, source.seen, glass)


def build(config: GatewayConfig, pepper: bytes, policy_engine: PolicyEngine | None) -> State:
    """The state of a gateway, with nothing connected yet; raises ConfigError if policy or audit is missing."""
    if config.audit is None:
        raise ConfigError(
            "key 'audit' is missing, and requests that cannot be recorded are not answered: set it"
        )
    metrics = Metrics()
    limits = config.limits
    issuer = Issuer(config.identity.oidc) if config.identity.oidc else None
    keys = KeyTable(config.keys_file, pepper)
    shared_keys = estate_keys(pepper)
    room = Queue(limits.waiting, limits.waiting_tokens, limits.subject_share, limits.tenant_share)
    redis = open_redis(config)
    audit = AuditClient(config.audit.socket, metrics)
    salt_key, *_ = derived(shared_keys, "cache salt")
    cache_secret = hmac.digest(pepper, b"llmkeep cache", "sha256")
    ratings = open_ratings(config, shared_keys, metrics)
    return State(
        instances={
            name: open_instances(name, engine, config.host, replace(room), credential, salt_key)
            for name, engine in config.engines.items()
        },
        authenticator=Authenticator(keys, config.identity.certificate_header, issuer),
        limits=limits,
        metrics=metrics,
        in_flight=InFlightRequests(metrics),
        redis=redis,
        cache=ExactCache(redis, config.redis.ttl_seconds, cache_secret, metrics)
        if redis and config.redis
        else None,
        cache_secret=cache_secret,
        shared=SharedAnswers(metrics),
        policy=open_policy(config.policy, metrics, policy_engine),
        quotas=Quotas(redis, metrics),
        audit=audit,
        recorder=Recorder(audit, pepper),
        ratings=ratings,
        halts=Halts(config.feedback.folder if config.feedback and config.feedback.guarded else None, metrics),
        own=OwnRecords(config.feedback.folder, config.feedback.hold)
        if config.feedback
        else OwnRecords(None, None),
        handover=open_handover(config, ratings, shared_keys),
        documents=open_documents(config),
        intake=IntakeClient(config.documents.intake)
        if config.documents and config.documents.intake
        else None,
    )


def open_documents(config: GatewayConfig) -> Retrieval | None:
    """The client of the documents' index, or None; raises ConfigError if its key is missing."""
    documents = config.documents
    if documents is None:
        return None
    key = credential(documents.key_credential) if documents.key_credential else None
    if documents.key_credential and key is None:
        raise ConfigError(
            f"documents.key_credential is '{documents.key_credential}', but there is no such credential: run this in the "
            "unit that loads it (LoadCredentialEncrypted=)"
        )
    return Retrieval(documents, key.decode() if key else None)


def open_ratings(config: GatewayConfig, keys: Ring, metrics: Metrics) -> Ratings:
    """Ratings, without a journal if none is configured; raises ConfigError if its folder is missing."""
    feedback, redis = config.feedback, config.redis
    host, others = (redis.host, redis.others) if redis else (config.host, ())
    if feedback is None:
        return Ratings(ResponseIds(keys, host=host), None, metrics)
    if not feedback.folder.is_dir():
        raise ConfigError(
            f"feedback.folder is {feedback.folder}, which is not a folder: mount its volume, or create it"
        )
    return Ratings(ResponseIds(keys, feedback.days, host, others), Journal(feedback.folder, metrics), metrics)


def open_handover(config: GatewayConfig, ratings: Ratings, keys: Ring) -> Handover | None:
    """The handover of ratings between hosts; None if this host has no journal or does not share its Redis."""
    if config.feedback is None or ratings.journal is None or not (config.redis and config.redis.others):
        return None
    redis = open_redis(config, DEADLINE_MS)
    return Handover(ratings.ids, ratings.journal, redis, keys, config.feedback.hold) if redis else None


def export_gauges(state: State) -> None:
    """Register the metrics that are read at each scrape."""
    state.metrics.tasks.set_function(lambda: len(asyncio.all_tasks()))
    state.metrics.registry.register(EngineGauges(lambda: [each.state() for each in state.instances.values()]))
    for name in state.instances:
        state.metrics.of(name)


def keys_changed(state: State) -> None:
    """Count the known keys, and end requests whose key is no longer valid."""
    keys, issuer = state.authenticator.keys, state.authenticator.issuer
    state.metrics.keys.set(-1 if keys.records is None else len(keys.records))
    if issuer:
        state.metrics.issuer_keys.set(-1 if issuer.keys is None else len(issuer.keys))
    state.in_flight.end_revoked(state.authenticator)


def start_background(
    tasks: asyncio.TaskGroup, state: State, probe_seconds: float, quarantine: Path | None
) -> list[asyncio.Task[None]]:
    """Start connections and watches, which run until cancelled; each policy change adds a task to the returned list."""
    engines = [engine for each in state.instances.values() for engine in each.engines]
    background = [tasks.create_task(engine.keep_connected()) for engine in engines]
    background.append(tasks.create_task(state.authenticator.watch(lambda: keys_changed(state))))
    background.append(tasks.create_task(state.audit.keep_connected()))
    background.append(tasks.create_task(state.policy.watch(probe_seconds)))
    background.append(tasks.create_task(end_late_requests(state)))
    background.append(tasks.create_task(state.halts.watch()))
    if state.handover:
        background.append(tasks.create_task(state.handover.watch()))
    sick = Quarantine(quarantine, list(state.instances.values()), state.audit.note, state.metrics.admission)
    if quarantine or any(each.engine.gpus for each in sick.offered()):
        background.append(tasks.create_task(sick.watch()))

    def policy_changed() -> None:
        background.append(tasks.create_task(state.in_flight.end_denied(state.policy)))

    state.policy.changed = policy_changed
    return background


async def run_gateway(
    config: GatewayConfig, pepper: bytes, policy_engine: PolicyEngine | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once.

    Raises ConfigError if the configuration lacks policy or audit. `policy_engine` replaces the policy on a developer's machine.
    """
    logs.guard(asyncio.get_running_loop())
    state = build(config, pepper, policy_engine)
    export_gauges(state)
    keys_changed(state)
    sockets = [listening(config.listen), listening(config.metrics)]
    servers = [server(build_app(state)), server(metrics_app(state.metrics))]
    stop = StopSignals()
    async with asyncio.TaskGroup() as tasks:
        probe_seconds = config.policy.probe_ms / 1000 if config.policy else 1.0
        background = start_background(tasks, state, probe_seconds, config.quarantine)
        # Until then requests wait in the sockets: answered now, they would find no engine.
        await engines_present(state.instances)
        serving = [
            tasks.create_task(each.serve(sockets=[bound]))
            for each, bound in zip(servers, sockets, strict=True)
        ]
        await get_ready(state, sockets)
        await stop.requested.wait()
        await shut_down(config, state, stop, servers)
        await asyncio.gather(*serving)
        for copy in state.copies:
            copy.cancel()
        await asyncio.gather(*state.copies, return_exceptions=True)
        state.recorder.flush()
        await state.audit.settled()
        await state.ratings.settled()
        for task in background:
            task.cancel()
    await close(state)


async def get_ready(state: State, sockets: list[socket.socket]) -> None:
    """Wait for policy and audit writer, then notify systemd."""
    await until_it_may_answer(state)
    addresses = [describe(bound) for bound in sockets]
    log.info("ready", extra={"fields": {"listen": addresses[0], "metrics": addresses[1]}})
    gc.collect()
    gc.freeze()  # these objects are permanent; scanning them in each collection would stall every answer
    notify("READY=1")


async def shut_down(config: GatewayConfig, state: State, stop: StopSignals, servers: list[Server]) -> None:
    """Stop listening, drain, and make the servers exit."""
    notify("STOPPING=1")
    if config.listen.socket:
        await leave(config.listen.socket, stop)
    await drain(state, stop, servers[0].server_state.tasks, config.limits.drain_seconds)
    for each in servers:
        each.should_exit = True
        each.force_exit = stop.now.is_set()


async def close(state: State) -> None:
    """Close what `build` opened."""
    state.authenticator.close()
    if state.redis:
        await state.redis.close()
    state.policy.engine.close()


async def leave(path: Path, stop: StopSignals) -> None:
    """Remove the socket: new connections fail before anything is sent, so that the edge uses another gateway.

    Connections that were already accepted are still served.
    """
    path.unlink(missing_ok=True)
    # Several short sleeps: a process that gets no CPU for a second would have read nothing.
    for _ in range(ARRIVED_LOOKS):
        if not stop.now.is_set():
            await asyncio.sleep(DRAIN_LOOK_SECONDS)


async def drain(state: State, stop: StopSignals, requests: Sized, seconds: float) -> None:
    """Admit nothing more, wait for requests in flight for `seconds`, then end the rest with an error.

    `requests`: everything being handled. A request that still waits for its audit record is not in flight yet, but
    was admitted.
    """
    state.draining = True
    log.info("draining", extra={"fields": {"in_flight": len(state.in_flight.active), "seconds": seconds}})
    end = time.monotonic() + seconds
    while requests and not stop.now.is_set() and time.monotonic() < end:
        await asyncio.sleep(DRAIN_LOOK_SECONDS)
    state.in_flight.end_all()
    await asyncio.sleep(0)


async def end_late_requests(state: State) -> None:
    """Every second: end what exceeds its deadline, waits too long for the audit record, or has lost its identity."""
    while True:
        await asyncio.sleep(1)
        state.audit.end_overdue()
        state.recorder.tick()
        state.in_flight.end_overdue()
        state.in_flight.end_revoked(state.authenticator)


async def engines_present(instances: dict[str, Instances]) -> None:
    """Wait until each model has an engine, but only briefly: READY should mean that requests will be answered."""
    try:
        async with asyncio.timeout(ENGINE_WAIT_SECONDS):
            while not all(each.up for each in instances.values()):
                await asyncio.sleep(ENGINE_LOOK_SECONDS)
    except TimeoutError:
        absent = {
            f"{engine.model} at {engine.socket}": engine.trouble
            for each in instances.values()
            for engine in each.engines
            if engine.hello is None
        }
        log.warning("starting without some engines", extra={"fields": {"absent": absent}})


async def until_it_may_answer(state: State) -> None:
    """Wait briefly for a policy and the audit writer: without them every request is rejected."""
    try:
        async with asyncio.timeout(ENGINE_WAIT_SECONDS):
            while not (state.policy.ready and state.audit.up):
                await asyncio.sleep(0.02)
    except TimeoutError:
        fields = {"policy": state.policy.trouble or "decides", "audit": "up" if state.audit.up else "away"}
        log.warning("starting although requests cannot be answered yet", extra={"fields": fields})


def describe(bound: socket.socket) -> str:
    """The listening address, for logs."""
    name = bound.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)
