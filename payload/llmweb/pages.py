"""The queries of each page, and how their answers are shown."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from llmweb import experiments
from llmweb.experiments import BEGINS
from llmweb.monitors import Reading, Series
from llmweb.sections import (
    Cell,
    Look,
    Section,
    State,
    Table,
    Words,
    by,
    celsius,
    gibibytes,
    number,
    per_minute,
    per_second,
    percent,
    safe_link,
    seconds,
    span_of,
    watts,
    whole,
)
from llmweb.settings import Objective, WebConfig

LOOK_SECONDS = 3600  # of the audit record; AuditHeadOld fires beyond
RENEWAL_SECONDS = 20 * 86400  # of certificates; CertificateNotRenewed fires below


READINGS_SECONDS = 900  # HostReadingsOld fires beyond
OLD = f"time() - node_textfile_mtime_seconds >= {READINGS_SECONDS}"
# Hosts export what failed or drifted and nothing else, so that none is good only where the readings are there and recent.
NONE = f"(count(node_textfile_mtime_seconds) * 0 unless count({OLD}))"
FAILED = f"count(llmkeep_unit_failed) or {NONE}"
DRIFTED = f"count(llmkeep_drifted_file) or {NONE}"
FAILED_OF_EACH = (
    "count by (instance) (llmkeep_unit_failed) "
    f"or (count by (instance) (time() - node_textfile_mtime_seconds < {READINGS_SECONDS}) * 0)"
)


async def objectives(look: Look, config: WebConfig) -> Section:
    """The service level objectives, and the error budget that is left."""
    title = look.say("objectives")
    if not config.objectives:
        return Words(title, look.say("no_objectives"))
    shares = await asyncio.gather(*(look.now(bad_share(each, config.days)) for each in config.objectives))
    if all(reading.found is None for reading in shares):
        return await look.missing(title, shares[0], "up")
    rows: list[list[Cell]] = []
    for objective, reading in zip(config.objectives, shares, strict=True):
        promise = Cell(percent(objective.objective))
        found: list[Series | None] = [*reading.found] if reading.found else [None]
        for series in found:
            of_which = (
                " ".join(series.labels[label] for label in objective.by if label in series.labels)
                if series
                else ""
            )
            name = Cell(f"{objective.name} {of_which}".strip() + f" · {objective.title}")
            if series is None:
                rows.append([name, promise, *[look.cell(None, percent)] * 2])
                continue
            left = 1 - series.value / (1 - objective.objective)
            state: State = "good" if left > 0.25 else "warn" if left > 0 else "bad"
            budget = Cell(percent(left) if left > 0 else look.say("spent"), state)
            rows.append([name, promise, Cell(percent(1 - series.value)), budget])
    columns = [
        look.say("objective"),
        look.say("promise", days=config.days),
        look.say("kept"),
        look.say("budget"),
    ]
    return look.table(title, columns, rows, *shares)


def bad_share(objective: Objective, days: int) -> str:
    def total(selector: str) -> str:
        grown = f"increase({selector}[{days}d])"
        return f"sum by ({', '.join(objective.by)}) ({grown})"

    counted = total(objective.bad or objective.good or objective.all)
    share = f"{counted} / {total(objective.all)}"
    return share if objective.bad else f"1 - {share}"


async def alerts(look: Look, _: WebConfig) -> Section:
    """Alerts from Prometheus' rules with their state in Alertmanager. The heartbeat always fires; the page says so if it does
    not."""
    title = look.say("firing")
    firing = await look.monitors.rules_firing()
    look.seen(firing)
    if firing.found is None:
        return await look.missing(title, Reading(firing.at, None), "up")
    delivered = await look.monitors.delivered(firing.monitor)
    wrong = [each for each in firing.found if each["labels"].get("severity") != "none"]
    beats = any(each["labels"].get("alertname") == "Watchdog" for each in firing.found)
    notes = [] if beats else [look.say("no_heartbeat")]
    if delivered.found is None:
        notes.append(look.say("alertmanager_away"))
    if not wrong:
        return Words(title, look.say("none_firing"), "unknown" if notes else "good", " ".join(notes))
    states = {frozenset(each["labels"].items()): each["state"] for each in delivered.found or ()}
    known = delivered.found is not None and not delivered.left_out
    rows = [alert_row(look, each, states, known) for each in wrong]
    names = ("alert", "severity", "summary", "since", "delivery", "runbook")
    return look.table(title, [look.say(name) for name in names], rows, firing, notes=notes)


def alert_row(
    look: Look, alert: dict[str, Any], states: dict[frozenset[tuple[str, str]], str], known: bool
) -> list[Cell]:
    """`known`: whether `states` contains everything in Alertmanager."""
    labels, notes = alert["labels"], alert["notes"]
    severity = labels.get("severity", "")
    urgent: State = "bad" if severity == "page" else "warn"
    state = states.get(frozenset(labels.items()))
    if state is None:
        delivery = Cell(look.say("undelivered"), "bad") if known else Cell(look.say("unknown"), "unknown")
    else:
        delivery = Cell(look.say("suppressed" if state == "suppressed" else "at_alertmanager"))
    runbook = notes.get("runbook_url", "")
    heading = runbook.rpartition("#")[2] or runbook
    link = safe_link(runbook)
    return [
        Cell(labels.get("alertname", "–")),
        Cell(look.say(severity) if severity in {"page", "ticket"} else severity, urgent),
        Cell(notes.get("summary", "")),
        Cell(alert["since"][:19].replace("T", " ") + " UTC"),
        delivery,
        Cell(heading if link else runbook, "", link),
    ]


async def hosts_up(look: Look, _: WebConfig) -> Section:
    """Hosts with the targets that Prometheus scrapes on them."""
    title = look.say("hosts")
    up = await look.now("sort(up)")  # what is left out is up
    if not up.found:
        return await look.missing(title, up, "up")
    found: dict[str, dict[str, list[bool]]] = {}
    for each in up.found:
        jobs = found.setdefault(each.labels.get("instance", "–"), {})
        jobs.setdefault(each.labels.get("job", "–"), []).append(each.value == 1)
    rows = []
    for host, jobs in sorted(found.items()):
        every = [one for answers in jobs.values() for one in answers]
        down = ", ".join(sorted(job for job, answers in jobs.items() if not all(answers)))
        state: State = "good" if all(every) else "bad" if not any(every) else "warn"
        text = (
            look.say("up")
            if all(every)
            else look.say("down")
            if not any(every)
            else look.say("partly", up=sum(every), all=len(every))
        )
        rows.append([Cell(host), Cell(text, state), Cell(", ".join(sorted(jobs))), Cell(down or "–")])
    columns = [look.say("host"), look.say("state"), look.say("source"), look.say("silent")]
    return look.table(title, columns, rows, up)


async def estate(look: Look, _: WebConfig) -> Section:
    """Bundle, audit record and checks. A reading that no host exports is shown as missing."""
    now = time.time()

    def ago(at: float) -> str:
        return look.say("ago", age=span_of(now - at)) if at else look.say("never")

    def ever(at: float) -> State:
        return "" if at else "bad"

    def recent(at: float) -> State:
        return "good" if now - at < LOOK_SECONDS else "bad"

    def none_is_good(value: float) -> State:
        return "good" if value == 0 else "bad"

    def renewed(left: float) -> State:
        return "good" if left > RENEWAL_SECONDS else "bad"

    asked: list[tuple[str, str, Callable[[float], str], Callable[[float], State]]] = [
        ("bundle_serial", "max(llmkeep_bundle_serial)", whole, lambda _: ""),
        ("site_serial", "max(llmkeep_site_serial)", whole, lambda _: ""),
        ("verify", "min(llmkeep_verify_seconds)", ago, ever),
        ("verify_failed", total("llmkeep_verify_failed"), whole, none_is_good),
        ("drift", DRIFTED, whole, none_is_good),
        ("audit_look", "min(llmkeep_audit_look_seconds)", ago, recent),
        ("audit_altered", total("llmkeep_audit_altered"), whole, none_is_good),
        ("backup", "min(llmkeep_backup_seconds)", ago, ever),
        ("failed_units", FAILED, whole, none_is_good),
        ("certificates", "min(llmkeep_certificate_expiry_seconds) - time()", span_of, renewed),
    ]
    answers = await asyncio.gather(*(look.now(expression) for _, expression, _, _ in asked))
    title = look.say("estate")
    if all(each.found is None for each in answers):
        return await look.missing(title, answers[0], "up")
    rows = [
        [Cell(look.say(name)), look.cell(first(answer), shown, state)]
        for (name, _, shown, state), answer in zip(asked, answers, strict=True)
    ]
    return Table(title, [look.say("name"), look.say("value")], rows)


def total(metric: str) -> str:
    """The sum of a counter over hosts; no host can lower it, or turn it into NaN."""
    return f"sum(abs({metric}) < 1e9)"


def first(reading: Reading[Series]) -> Series | None:
    return reading.found[0] if reading.found else None


async def bad_events(look: Look, _: WebConfig) -> Section:
    expression = "slo:bad:ratio_rate1h"
    return await look.plot("bad_share", expression, expression, ("objective", "model"), percent, hours=24)


async def host_loads(look: Look, _: WebConfig) -> Section:
    """The use of each host's processors, memory and disks."""
    expressions = (
        PROCESSORS,
        MEMORY,
        "max by (instance) (1 - node_filesystem_avail_bytes / node_filesystem_size_bytes)",
        FAILED_OF_EACH,
    )
    answers = await asyncio.gather(*map(look.now, expressions))
    title = f"{look.say('processor')}, {look.say('memory')}"
    hosts = sorted({name for answer in answers for (name,) in by(answer, "instance")})
    if not hosts:
        return await look.missing(title, answers[0], "node_cpu_seconds_total")
    processor, memory, disk, failed = (by(answer, "instance") for answer in answers)
    rows = [
        [
            Cell(host),
            look.cell(processor.get((host,)), percent),
            look.cell(memory.get((host,)), percent, lambda share: "bad" if share > 0.95 else ""),
            look.cell(disk.get((host,)), percent, lambda share: "bad" if share > 0.95 else ""),
            look.cell(failed.get((host,)), whole, lambda count: "bad" if count else "good"),
        ]
        for host in hosts
    ]
    names = ("host", "processor", "memory", "fullest_disk", "failed_units")
    return look.table(title, [look.say(name) for name in names], rows, *answers)


PROCESSORS = '1 - avg by (instance) (rate(node_cpu_seconds_total{mode="idle"}[5m]))'
MEMORY = "max by (instance) (1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes)"


async def processors(look: Look, _: WebConfig) -> Section:
    return await look.plot("processor_plot", PROCESSORS, "node_cpu_seconds_total", ("instance",), percent)


async def memories(look: Look, _: WebConfig) -> Section:
    return await look.plot("memory_plot", MEMORY, "node_memory_MemAvailable_bytes", ("instance",), percent)


REQUESTS = "sum by (model) (rate(llm_e2e_seconds_count[5m]))"
FAST = f'sum by (model) (rate({BEGINS}_bucket{{le="0.5"}}[1h])) / sum by (model) (rate({BEGINS}_count[1h]))'


async def models(look: Look, _: WebConfig) -> Section:
    """Each model's engines as the gateways see them, and its answers."""
    expressions = (
        "sort(min by (model, instance) (llm_engine_up))",
        "max by (model) (llm_engine_stalled)",
        "sum by (model) (llm_requests_running)",
        "sum by (model) (llm_requests_waiting)",
        REQUESTS,
        'sum by (model) (rate(llm_tokens_total{kind="completion"}[5m]))',
        FAST,
    )
    up, *answers = await asyncio.gather(*map(look.now, expressions))
    title = look.say("models")
    if not up.found:
        return await look.missing(title, up, "llm_engine_up")
    stalled, running, waiting, requests, tokens, fast = (by(answer, "model") for answer in answers)
    rows = []
    for each in sorted(
        up.found, key=lambda one: (one.labels.get("model", ""), one.labels.get("instance", ""))
    ):
        model = (each.labels.get("model", "–"),)
        stuck = model in stalled and stalled[model].value == 1
        rows.append(
            [
                Cell(model[0]),
                Cell(each.labels.get("instance", "–")),
                look.cell(each, whole, lambda count, stuck=stuck: "bad" if not count or stuck else "good"),  # type: ignore[misc]
                look.cell(running.get(model), whole),
                look.cell(waiting.get(model), whole),
                look.cell(requests.get(model), number),
                look.cell(tokens.get(model), number),
                look.cell(fast.get(model), percent, lambda share: "good" if share >= 0.99 else "warn"),
            ]
        )
    names = ("model", "host", "instances", "running", "waiting", "requests_s", "tokens_s", "fast_tokens")
    return look.table(title, [look.say(name) for name in names], rows, up, *answers)


async def first_tokens(look: Look, _: WebConfig) -> Section:
    expression = f"histogram_quantile(0.99, sum by (model, le) (rate({BEGINS}_bucket[15m])))"
    return await look.plot("first_token_plot", expression, f"{BEGINS}_count", ("model",), seconds)


async def requests_over_time(look: Look, _: WebConfig) -> Section:
    return await look.plot("requests_plot", REQUESTS, "llm_e2e_seconds_count", ("model",), number)


async def waiting_over_time(look: Look, _: WebConfig) -> Section:
    expression = "sum by (model) (llm_requests_waiting)"
    return await look.plot("waiting_plot", expression, "llm_requests_waiting", ("model",), number)


async def no_gpus(look: Look) -> bool:
    """Whether Prometheus has no GPU at all; a GPU that fell silent in the last week counts as missing instead."""
    return (await look.now("last_over_time(llm_gpu_present[7d])")).found == []


async def gpus(look: Look, _: WebConfig) -> Section:
    """Each GPU's readings, and what is wrong with it."""
    expressions = (
        "sort(llm_gpu_present)",
        "llm_gpu_busy_ratio",
        "llm_gpu_memory_used_bytes",
        "llm_gpu_temperature_celsius",
        "llm_gpu_power_watts",
        'sum by (instance, gpu) (llm_gpu_findings{gpu!=""})',
        "sum by (instance, gpu) (increase(llm_gpu_xids_total[1d]))",
        "sum by (instance, gpu, code) (increase(llm_gpu_xids_total[1d])) > 0",
    )
    present, *answers = await asyncio.gather(*map(look.now, expressions))
    title = look.say("gpus")
    if present.found == [] and await no_gpus(look):
        return Words(title, look.say("no_gpus"))
    if not present.found:
        return await look.missing(title, present, "llm_gpu_present")
    keys = ("instance", "gpu")
    busy, memory, temperature, power, findings, counted = (by(answer, *keys) for answer in answers[:-1])
    codes: dict[tuple[str, ...], list[str]] = {}
    for (host, gpu, code), series in by(answers[-1], *keys, "code").items():
        codes.setdefault((host, gpu), []).append(f"{code} × {max(1, round(series.value))}")
    rows = []
    for each in sorted(present.found, key=lambda one: [one.labels.get(key, "") for key in keys]):
        name = (each.labels.get("instance", "–"), each.labels.get("gpu", "–"))
        xids = (
            Cell(", ".join(sorted(codes[name])), "warn")
            if name in codes
            else look.cell(counted.get(name), lambda _: look.say("none"), lambda _: "good")
        )
        rows.append(
            [
                Cell(f"{name[0]} {name[1]}"),
                Cell(each.labels.get("name", "–")) if each.value else Cell(look.say("missing"), "bad"),
                look.cell(busy.get(name), percent),
                look.cell(memory.get(name), gibibytes),
                look.cell(temperature.get(name), celsius),
                look.cell(power.get(name), watts),
                look.cell(findings.get(name), whole, lambda count: "bad" if count else "good"),
                xids,
            ]
        )
    names = ("gpu", "name", "busy", "gpu_memory", "temperature", "power", "findings", "xids")
    return look.table(title, [look.say(name) for name in names], rows, present, *answers)


async def gpu_busy(look: Look, _: WebConfig) -> Section:
    return await look.plot(
        "busy_plot", "llm_gpu_busy_ratio", "llm_gpu_busy_ratio", ("instance", "gpu"), percent
    )


async def gpu_temperature(look: Look, _: WebConfig) -> Section:
    metric = "llm_gpu_temperature_celsius"
    return await look.plot("temperature_plot", metric, metric, ("instance", "gpu"), celsius)


async def runs(look: Look, _: WebConfig) -> Section:
    """Training jobs that exported their numbers in the last week."""
    title = look.say("runs")
    last = await look.now("last_over_time(llm_train_step[7d])")
    if last.found == []:
        return Words(title, look.say("no_runs"))
    if last.found is None:
        return await look.missing(title, last, "llm_train_step")
    names = (
        "llm_train_step",
        "llm_train_steps",
        "llm_train_loss",
        "llm_train_tokens_per_second",
        "llm_train_seconds_left",
    )
    keys = ("instance", "job_name", "exported_job", "job")
    live, of, loss, speed, left = (by(each, *keys) for each in await asyncio.gather(*map(look.now, names)))
    rows = []
    for name, each in sorted(by(last, *keys).items()):
        running = name in live
        step = whole(each.value) + (f" / {whole(of[name].value)}" if name in of else "")
        rows.append(
            [
                Cell(f"{name[0]} {name[2] or name[1] or name[3]}"),
                Cell(look.say("running") if running else look.say("over"), "good" if running else "unknown"),
                Cell(step),
                look.cell(loss.get(name), number),
                look.cell(speed.get(name), number),
                look.cell(left.get(name), span_of),
            ]
        )
    columns = ("job", "state", "step", "loss", "tokens_s", "left")
    return look.table(title, [look.say(name) for name in columns], rows, last)


async def losses(look: Look, _: WebConfig) -> Section:
    return await look.plot(
        "loss_plot", "llm_train_loss", "llm_train_loss", ("instance", "exported_job"), number, hours=24
    )


# The last 24 hours.


def lines(**expressions: str) -> str:
    """Several lines of one query, named by the label `line`."""
    return " or ".join(
        f'label_replace({each}, "line", "{name}", "", "")' for name, each in expressions.items()
    )


async def first_tokens_of_day(look: Look, _: WebConfig) -> Section:
    rates = f"sum by (le) (rate({BEGINS}_bucket[15m]))"
    quantiles = {
        name: f"histogram_quantile({share}, {rates})" for name, share in (("P50", 0.5), ("P99", 0.99))
    }
    return await look.plot(
        "quantiles_plot", lines(**quantiles), f"{BEGINS}_count", ("line",), seconds, hours=24
    )


async def tokens_of_day(look: Look, _: WebConfig) -> Section:
    expression = "sum by (kind) (rate(llm_tokens_total[5m]))"
    return await look.plot("tokens_plot", expression, "llm_tokens_total", ("kind",), per_second, hours=24)


async def waiting_of_day(look: Look, _: WebConfig) -> Section:
    expression = "sum by (model) (llm_requests_waiting)"
    return await look.plot("waiting_plot", expression, "llm_requests_waiting", ("model",), number, hours=24)


async def errors_of_day(look: Look, _: WebConfig) -> Section:
    """A counter of something that has not happened does not exist: if gateways are scraped, that means 0."""

    def requests(status: str) -> str:
        selector = f'route!~"/livez|/readyz|/health|/drainz",status=~"{status}"'
        return f"60 * sum(rate(llm_requests_total{{{selector}}}[5m])) or 0 * sum(llm_engine_up)"

    expression = lines(**{"5xx": requests("5.."), "429": requests("429")})
    return await look.plot("errors_plot", expression, "llm_engine_up", ("line",), per_minute, hours=24)


async def gpus_of_day(look: Look, _: WebConfig) -> Section:
    metric = "llm_gpu_busy_ratio"
    section = await look.plot(
        "gpus_plot", f"avg by (instance) ({metric})", metric, ("instance",), percent, hours=24
    )
    if isinstance(section, Words) and await no_gpus(look):
        return Words(section.title, look.say("no_gpus"))
    return section


Part = Callable[[Look, WebConfig], Awaitable[Section]]
# By the last part of their paths, which is their name in `wording`, too.
PAGES: dict[str, tuple[Part, ...]] = {
    "": (alerts, objectives, hosts_up, estate, bad_events),
    "day": (first_tokens_of_day, tokens_of_day, waiting_of_day, errors_of_day, gpus_of_day),
    "hosts": (hosts_up, host_loads, processors, memories),
    "models": (models, requests_over_time, first_tokens, waiting_over_time),
    "gpus": (gpus, gpu_busy, gpu_temperature),
    "training": (runs, losses),
    "alerts": (alerts,),
    "experiments": experiments.PARTS,
}


async def sections(page: str, look: Look, config: WebConfig) -> list[Section]:
    """The parts of a page, which are queried concurrently."""
    return list(await asyncio.gather(*(part(look, config) for part in PAGES[page])))
