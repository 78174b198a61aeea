"""llm-gpu: health of this host's GPUs.

Exit codes: 0 done, or healthy; 1 the GPUs are not as expected, the watch failed, or a GPU does not take a setting; 2 wrong
usage or configuration; 3 an order or a setting was refused, and nothing was changed; 4 a file cannot be used.
"""

import argparse
import json
import os
import pwd
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llmcore import logs
from llmcore.config import ConfigError, load
from llmcore.privileges import become_owner
from llmgpu import cuda, declared, orders, quarantine
from llmgpu.declared import Difference, SettingError
from llmgpu.health import Finding, judge
from llmgpu.maintenance import Maintenance
from llmgpu.nvml import Nvml, NvmlError, Reading
from llmgpu.orders import OrderError
from llmgpu.quarantine import StateError
from llmgpu.settings import Expect, GpuConfig

CONFIG = Path("/etc/llmkeep/gpu.yaml")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="llm-gpu", description="Health of this host's GPUs.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
        return command

    watch = add("watch", "watch the GPUs, quarantine engines of sick ones, export metrics (the service)")
    watch.set_defaults(run=watch_command)
    check = add("check", "acceptance: compare the GPUs with what is expected; exit 1 if one differs")
    check.add_argument("--cuda", action="store_true", help="also use each GPU through CUDA")
    check.add_argument(
        "--json", action="store_true", help="print readings and findings as JSON, for evidence"
    )
    check.set_defaults(run=check_command)
    status = add("status", "print what is quarantined, by whom and why")
    status.set_defaults(run=status_command)
    for name, text in (
        ("drain", "take an engine of this host out of service"),
        ("undrain", "end a drain; only the operator who ordered it may do that"),
    ):
        command = add(name, text)
        command.add_argument("engine")
        command.set_defaults(run=order_command)
    repaired = add("repaired", "declare a GPU reset, repaired or inspected: its Xids are forgotten")
    repaired.add_argument("uuid", help="UUID as printed by `llm-gpu check`")
    repaired.set_defaults(run=order_command)
    settings = add("settings", "set ECC, MIG, persistence, power limit and compute mode as declared")
    settings.add_argument("--check", action="store_true", help="only print the differences; exit 0")
    settings.add_argument("--json", action="store_true", help="print the differences as JSON")
    settings.add_argument(
        "--watch-config",
        type=Path,
        default=CONFIG,
        help="configuration of the watch that drains, default: %(default)s",
    )
    settings.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        help="seconds to wait for running requests, default: %(default)s",
    )
    settings.add_argument(
        "--take-last", action="store_true", help="change MIG under the last instance of a model, too"
    )
    settings.set_defaults(run=settings_command)
    for name in ("drain", "undrain", "repaired"):
        commands.choices[name].add_argument("--reason", required=True, help="reason for the audit record")
    for name in ("drain", "undrain", "repaired", "settings"):
        command = commands.choices[name]
        command.add_argument("--operator", default=who(), help="default: the login's user, here %(default)s")
    return top


def who() -> str:
    """The operator: the user that sudo names, else the login user, else the owner of this process."""
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return os.getlogin()
    except OSError:
        return pwd.getpwuid(os.geteuid()).pw_name


def watch_command(options: argparse.Namespace) -> int:
    from prometheus_client import disable_created_metrics

    from llmgpu.watch import Watch

    logs.configure("INFO")
    disable_created_metrics()  # type: ignore[no-untyped-call] # a time for each counter would double the work of a scrape
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return 0 if Watch(load(options.config, GpuConfig)).run(stop.is_set) else 1


def check_command(options: argparse.Namespace) -> int:
    """Take one reading and judge it, together with the Xids recorded earlier."""
    config = load(options.config, GpuConfig)
    become_owner(config.state)
    histories = quarantine.load(config.state).histories
    nvml, trouble = Nvml(), ""
    reading: Reading | None = None
    try:
        nvml.open()
        reading = nvml.read()
    except NvmlError as error:
        trouble = str(error)
    finally:
        nvml.close()
    findings = judge(reading, trouble, config.expect, histories)
    if options.cuda:
        findings += cuda_findings(config.expect.count)
    if options.json:
        gpus = [asdict(gpu) for gpu in reading.gpus] if reading else []
        report = {
            "accepted": not any(each.drains for each in findings),
            "driver": reading.driver if reading else None,
            "expected": config.expect.model_dump(exclude_none=True),
            "cuda": options.cuda,
            "findings": [asdict(each) for each in findings],
            "gpus": gpus,
        }
        print(json.dumps(report, indent=1))
    else:
        for gpu in reading.gpus if reading else ():
            print(
                f"GPU {gpu.index}  {gpu.name or '-'}  {gpu.uuid or '-'}  {'lost' if gpu.lost else 'answers'}"
            )
        for each in findings:
            print(
                f"{'FAILED' if each.drains else 'warning'}: {each} (docs/operate/gpu-health.md#{each.runbook})"
            )
        if not findings:
            print(f"{config.expect.count} GPUs are as expected")
    return int(any(each.drains for each in findings))


def cuda_findings(count: int) -> list[Finding]:
    """Findings from using each GPU: ready means that CUDA works on all of them."""
    try:
        answers = cuda.check()
    except cuda.CudaError as error:
        return [Finding("cuda", str(error), "no-cuda")]
    findings = [
        Finding("cuda", answer, "no-cuda", gpu=index) for index, answer in enumerate(answers) if answer
    ]
    if len(answers) != count:
        findings.append(
            Finding("cuda", f"CUDA finds {len(answers)} GPUs, but {count} are expected", "missing-gpu")
        )
    return findings


def status_command(options: argparse.Namespace) -> int:
    config = load(options.config, GpuConfig)
    become_owner(config.state)
    quarantines = quarantine.load(config.state).quarantine
    for name in config.engines:
        entry = quarantines.get(name)
        print(
            f"{name}: quarantined since {entry.since} by {entry.by}: {entry.reason}"
            if entry
            else f"{name}: in service"
        )
    return 0


def settings_command(options: argparse.Namespace) -> int:
    """Apply the declared settings to the GPUs. Nothing is set unless everything is known to be possible."""
    config = load(options.config, GpuConfig)
    for number in (signal.SIGTERM, signal.SIGHUP):  # engines come back then, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    nvml = Nvml()
    try:
        nvml.open()
        gpus = nvml.read().gpus
        if len(gpus) != config.expect.count:
            raise OrderError(
                f"the driver finds {len(gpus)} GPUs, but {config.expect.count} are expected: no setting was changed, since "
                f"indices may have shifted"
            )
        refused = [each for gpu in gpus for each in declared.refusals(nvml, gpu, config.expect)]
        if refused:
            raise OrderError("\n".join([*refused, "no setting was changed"]))
        differences = [each for gpu in gpus for each in declared.differences(gpu, config.expect)]
        due = [each for each in differences if not each.pending]
        waiting = [each for each in differences if each.pending]
        if not options.check:
            divided = sorted({each.gpu for each in due if each.setting == declared.MIG})
            work = Maintenance(
                config, options.watch_config, options.operator, options.seconds, options.take_last
            )
            with work.of(nvml, divided):
                for each in due:
                    if declared.set_one(nvml, each, config.expect):
                        waiting.append(each)
                accept(nvml, config.expect, waiting)
            if not any(each.setting == declared.MIG for each in waiting):
                work.await_return()
    except NvmlError as error:
        raise OrderError(f"{error}; no setting was changed") from error
    finally:
        nvml.close()
    if options.json:
        print(
            json.dumps({"due": [asdict(each) for each in due], "waiting": [asdict(each) for each in waiting]})
        )
    else:
        for each in due:
            print(f"GPU {each.gpu}: {each.setting}: {each.before} -> {each.after}")
        for each in waiting:
            print(f"GPU {each.gpu}: {each.setting} is {each.after} after a reset of the GPU or a reboot")
        if not differences:
            print(f"the settings of {config.expect.count} GPUs are as declared")
    return 0


def accept(nvml: Nvml, expect: Expect, waiting: Sequence[Difference]) -> None:
    """Raises SettingError if a GPU is not as declared after it was set, unless the change waits for a reset."""
    awaited = {(each.gpu, each.setting) for each in waiting}
    try:
        gpus = nvml.read().gpus
    except NvmlError as error:
        raise SettingError(f"the GPUs do not answer after they were set: {error}") from error
    for gpu in gpus:
        for each in () if gpu.lost else declared.differences(gpu, expect):
            if (each.gpu, each.setting) not in awaited:
                raise SettingError(
                    f"{each.setting} of GPU {each.gpu} was set to {each.after}, but is {each.before}"
                )


def order_command(options: argparse.Namespace) -> int:
    """Write one order, for the watch to record and carry out."""
    config = load(options.config, GpuConfig)
    if options.command != "repaired" and options.engine not in config.engines:
        engines = ", ".join(config.engines) or "none"
        raise OrderError(f"there is no engine '{options.engine}' on this host: {engines}")
    with orders.edited(config.orders) as order_set:
        if options.command == "drain":
            orders.drain(order_set, options.engine, options.operator, options.reason)
        elif options.command == "undrain":
            orders.undrain(order_set, options.engine, options.operator, options.reason)
        else:
            if not options.uuid.startswith("GPU-"):
                raise OrderError(f"'{options.uuid}' is not the UUID of a GPU: `llm-gpu check` prints them")
            orders.repaired(order_set, options.uuid, options.operator, options.reason)
    print("ordered: llm-gpu.service records it and carries it out; `llm-gpu status` shows it")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run llm-gpu; returns the exit code (see the module's docstring)."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (ConfigError, OrderError, SettingError, StateError, OSError) as error:
        print(f"llm-gpu: {error}", file=sys.stderr)
        codes = {ConfigError: 2, OrderError: 3, SettingError: 1}
        return codes.get(type(error), 4)
    return code
