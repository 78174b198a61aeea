"""The gateway's process: listeners, links to the engines, watched keys, drain."""

import asyncio
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from llmcore import logs
from llmcore.config import ConfigError
from llmcore.notify import notify
from llmserve.access.api_keys import KeyTable
from llmserve.access.break_glass import BreakGlass
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

log = logging.getLogger("llmserve.gateway")
KEEP_ALIVE_SECONDS = 75  # longer than the edge keeps an idle connection, so that it never picks a dying one
DRAIN_LOOK_SECONDS = 0.02
ARRIVED_LOOKS = 50  # until a request that came before the socket went is past its checks: a second, or more
ENGINE_WAIT_SECONDS = 3.0  # how long READY waits for engines; a dead one must not keep the gateway down


class Server(uvicorn.Server):
    """uvicorn without its signal handling: this process has two servers and one drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_gateway`."""
        yield


def server(app: App) -> Server:
    """A server for `app` that logs nothing of its own."""
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


def credential(name: str) -> bytes | None:
    """The systemd credential of this name, or None without one."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, name) if folder else None
    return path.read_bytes() if path and path.exists() else None


def listening(listener: Listener) -> socket.socket:
    """The bound socket."""
    if listener.socket is not None:
        return bind_unix(listener.socket, int(listener.socket_mode, 8))
    return bind_tcp(listener.host, listener.port or 0)


def metrics_app(metrics: Metrics) -> App:
    """GET /metrics, on a listener of its own and therefore without a key."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) != ("GET", "/metrics"):
            error = ApiError(404, "unknown_path", "there is only GET /metrics here")
            await respond(send, error.status, error.body())
            return
        body, content_type = metrics.render()
        await respond(send, 200, body, content_type=content_type.encode())

    return app


def open_redis(config: GatewayConfig) -> RedisClient | None:
    """Redis, if the configuration names one; raises ConfigError without its password."""
    if config.redis is None:
        log.warning(
            "no Redis is configured: every answer comes from the model, and quotas are this process' own"
        )
        return None
    password = None
    if config.redis.password_credential:
        secret = credential(config.redis.password_credential)
        if secret is None:
            raise ConfigError(
                f"redis.password_credential is '{config.redis.password_credential}', but there is no such "
                "credential: start this as the unit that loads it (LoadCredentialEncrypted=)"
            )
        password = secret.decode()
    return RedisClient(config.redis, password)


def open_policy_engine(source: PolicySource) -> PolicyEngine:
    """The policy engine that the configuration names."""
    if source.engine == "server" and source.socket:
        policy_engine: PolicyEngine = OpaServer(source.socket, source.deadline_ms)
    elif source.bundle:
        policy_engine = OpaEmbedded(source.bundle, source.key.read_bytes())
    else:
        raise ConfigError(f"policy.engine is '{source.engine}' and its source is missing")
    log.info("policy", extra={"fields": {"engine": source.engine}})
    return policy_engine


def open_policy(config: GatewayConfig, metrics: Metrics, policy_engine: PolicyEngine | None) -> Policy:
    """The policy. `judge` is a developer's; raises ConfigError where there is neither."""
    source = config.policy
    if source is None:
        if policy_engine is None:
            raise ConfigError("key 'policy' is missing: without a policy nobody may do anything; set it")
        return Policy(policy_engine, metrics, None, None)
    key = source.key.read_bytes()
    glass = BreakGlass(source.break_glass, key) if source.break_glass else None
    return Policy(policy_engine or open_policy_engine(source), metrics, source.seen, glass)


def build(config: GatewayConfig, pepper: bytes, policy_engine: PolicyEngine | None) -> State:
    """What the handlers share, with nothing connected yet; raises ConfigError where policy or audit is missing."""
    if config.audit is None:
        raise ConfigError("key 'audit' is missing: what is not recorded is not answered; set it")
    metrics = Metrics()
    limits = config.limits
    issuer = Issuer(config.identity.oidc) if config.identity.oidc else None
    keys = KeyTable(config.keys_file, pepper)
    room = Queue(limits.waiting, limits.waiting_tokens)
    redis = open_redis(config)
    audit = AuditClient(config.audit.socket, metrics)
    return State(
        instances={
            name: open_instances(name, engine, room, credential) for name, engine in config.engines.items()
        },
        authenticator=Authenticator(keys, config.identity.certificate_header, issuer),
        limits=limits,
        metrics=metrics,
        in_flight=InFlightRequests(metrics),
        redis=redis,
        cache=ExactCache(redis, config.redis.ttl_seconds, metrics) if redis and config.redis else None,
        shared=SharedAnswers(metrics),
        policy=open_policy(config, metrics, policy_engine),
        quotas=Quotas(redis, metrics),
        audit=audit,
        recorder=Recorder(audit, pepper),
    )


def export_gauges(state: State) -> None:
    """Metrics that are read at each scrape."""
    state.metrics.tasks.set_function(lambda: len(asyncio.all_tasks()))
    state.metrics.registry.register(EngineGauges(lambda: [each.state() for each in state.instances.values()]))
    for name in state.instances:
        state.metrics.of(name)


def keys_changed(state: State) -> None:
    """Count the keys that are known now, and end what was asked with one that is revoked."""
    keys, issuer = state.authenticator.keys, state.authenticator.issuer
    state.metrics.keys.set(-1 if keys.records is None else len(keys.records))
    if issuer:
        state.metrics.issuer_keys.set(-1 if issuer.keys is None else len(issuer.keys))
    state.in_flight.end_revoked(state.authenticator)


def start_background(
    tasks: asyncio.TaskGroup, state: State, probe_seconds: float
) -> list[asyncio.Task[None]]:
    """Connections and watches, which run until they are cancelled; the list grows by a task for each changed policy."""
    engines = [engine for each in state.instances.values() for engine in each.engines]
    background = [tasks.create_task(engine.keep_connected()) for engine in engines]
    background.append(tasks.create_task(state.authenticator.watch(lambda: keys_changed(state))))
    background.append(tasks.create_task(state.audit.keep_connected()))
    background.append(tasks.create_task(state.policy.watch(probe_seconds)))
    background.append(tasks.create_task(end_late_requests(state)))

    def policy_changed() -> None:
        background.append(tasks.create_task(state.in_flight.end_denied(state.policy)))

    state.policy.changed = policy_changed
    return background


async def run_gateway(
    config: GatewayConfig, pepper: bytes, policy_engine: PolicyEngine | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Raises ConfigError where the configuration lacks policy or audit. `judge` stands in for the policy of a
    developer's machine.
    """
    logs.guard(asyncio.get_running_loop())
    state = build(config, pepper, policy_engine)
    export_gauges(state)
    keys_changed(state)
    sockets = [listening(config.listen), listening(config.metrics)]
    servers = [server(build_app(state)), server(metrics_app(state.metrics))]
    stop = StopSignals()
    async with asyncio.TaskGroup() as tasks:
        background = start_background(tasks, state, config.policy.probe_ms / 1000 if config.policy else 1.0)
        serving = [
            tasks.create_task(each.serve(sockets=[bound]))
            for each, bound in zip(servers, sockets, strict=True)
        ]
        await get_ready(state, sockets)
        await stop.requested.wait()
        await shut_down(config, state, stop, servers)
        await asyncio.gather(*serving)
        await state.audit.settled()
        for task in background:
            task.cancel()
    await close(state)


async def get_ready(state: State, sockets: list[socket.socket]) -> None:
    """Wait for engines, policy and audit writer, and tell systemd."""
    await engines_present(state.instances)
    await until_it_may_answer(state)
    addresses = [describe(bound) for bound in sockets]
    log.info("ready", extra={"fields": {"listen": addresses[0], "metrics": addresses[1]}})
    gc.collect()
    gc.freeze()  # what is there now stays: to look through all of it again would stop every answer for long
    notify("READY=1")


async def shut_down(config: GatewayConfig, state: State, stop: StopSignals, servers: list[Server]) -> None:
    """Stop listening, drain, and tell the servers to exit."""
    notify("STOPPING=1")
    if config.listen.socket:
        await leave(config.listen.socket, stop)
    await drain(state, stop, servers[0].server_state.tasks, config.limits.drain_seconds)
    for each in servers:
        each.should_exit = True
        each.force_exit = stop.now.is_set()


async def close(state: State) -> None:
    """Give back what `build` opened."""
    state.authenticator.close()
    if state.redis:
        await state.redis.close()
    state.policy.engine.close()


async def leave(path: Path, stop: StopSignals) -> None:
    """Take the socket away: who connects now fails before anything is sent, so that the edge asks another gateway.

    What has connected before is still admitted.
    """
    path.unlink(missing_ok=True)
    for _ in range(
        ARRIVED_LOOKS
    ):  # not one long sleep: a process that gets no CPU for a second has read nothing in it
        if not stop.now.is_set():
            await asyncio.sleep(DRAIN_LOOK_SECONDS)


async def drain(state: State, stop: StopSignals, requests: Sized, seconds: float) -> None:
    """Admit nothing more, wait for what is in flight, then end the rest with an error.

    `requests` are all that are being handled: one that waits for its record is not yet a flight, and was admitted.
    """
    state.draining = True
    log.info("draining", extra={"fields": {"in_flight": len(state.in_flight.active), "seconds": seconds}})
    end = time.monotonic() + seconds
    while requests and not stop.now.is_set() and time.monotonic() < end:
        await asyncio.sleep(DRAIN_LOOK_SECONDS)
    state.in_flight.end_all()
    await asyncio.sleep(0)


async def end_late_requests(state: State) -> None:
    """Once a second: deadlines, intents that do not reach the disk, and identities that have expired meanwhile."""
    while True:
        await asyncio.sleep(1)
        state.audit.end_overdue()
        state.in_flight.end_overdue()
        state.in_flight.end_revoked(state.authenticator)


async def engines_present(instances: dict[str, Instances]) -> None:
    """Wait for every engine, but not for long: READY should mean that answers come."""
    every = [engine for each in instances.values() for engine in each.engines]
    try:
        async with asyncio.timeout(ENGINE_WAIT_SECONDS):
            for engine in every:
                while engine.hello is None:
                    engine.changed.clear()
                    await engine.changed.wait()
    except TimeoutError:
        absent = {
            f"{engine.model} at {engine.socket}": engine.trouble for engine in every if engine.hello is None
        }
        log.warning("starting without some engines", extra={"fields": {"absent": absent}})


async def until_it_may_answer(state: State) -> None:
    """Wait for a policy and for the audit writer, but not for ever: without them every request is refused."""
    try:
        async with asyncio.timeout(ENGINE_WAIT_SECONDS):
            while not (state.policy.ready and state.audit.up):
                await asyncio.sleep(0.02)
    except TimeoutError:
        fields = {"policy": state.policy.trouble or "decides", "audit": "up" if state.audit.up else "away"}
        log.warning("starting although nothing can be answered yet", extra={"fields": fields})


def describe(bound: socket.socket) -> str:
    """The address for people."""
    name = bound.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)
